"""Batches of examples, and the model of this process that answers them.

Nothing that goes wrong with one example costs another its answer: a failing batch is halved until the example that
fails is alone. Batches never change an answer, so halving is safe, also when memory runs out. While the model works,
the images of the next batches are opened and processed in threads. Knows nothing about ground truths, logs or workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from dmlr.config import Config
from dmlr.data.examples import Example, ImageError, open_image
from dmlr.machine import environment, peak_memory
from dmlr.methods import METHODS, Answer, Question
from dmlr.methods.answers import by_halves, failed, free
from dmlr.methods.prompting import encode_task, prompts_of
from dmlr.methods.workload import workload
from dmlr.model.families.family import Pictures
from dmlr.model.memory import Work
from dmlr.model.vlm import VLM

T = TypeVar("T")
AHEAD = 2  # batches that wait for the model, ready
READERS = 8  # images that are opened at a time


@dataclass(frozen=True)
class Batch:
    """Examples that go through the model together."""

    examples: list[Example]
    questions: list[Question]  # of those that can be asked, in order
    settled: dict[int, Answer]  # by row, the others: no ground truth, or no readable image

    def answered(self, answers: Sequence[Answer]) -> list[tuple[Example, Answer]]:
        """Every example with its answer; `answers` are those to `questions`."""
        asked = [example.row for example in self.examples if example.row not in self.settled]
        by_row = self.settled | dict(zip(asked, answers, strict=True))
        return [(example, by_row[example.row]) for example in self.examples]


@dataclass(frozen=True)
class ModelFacts:
    """What a run must know about the model that answers, in whatever process that is."""

    dtype: str
    device: str  # its type: cpu, cuda
    fitting_batch: int  # examples
    environment: dict[str, str]
    scales: dict[str, Any]  # what sigma and lr mean for it (`Config.scales`)


class InProcess:
    """The model of this process as an executor, like `workers.Workers`."""

    def __init__(self, vlm: VLM, config: Config) -> None:
        fitting, scales = vlm.fitting_batch(workload(config, vlm.context_length)), config.scales(vlm.embedding_rms)
        self.vlm, self.config = vlm, config
        self.facts = ModelFacts(str(vlm.dtype), vlm.device.type, fitting, environment(), scales)

    def answers(
        self, method: str, batches: Iterable[list[Example]], partners: Mapping[int, Example]
    ) -> Iterator[list[tuple[Example, Answer]]]:
        """Each batch's examples with their answers, in order; `partners` are those of their rows."""
        for batch in ahead(self._processed(examples, partners) for examples in batches):
            yield batch.answered(answer_batch(self.vlm, method, batch.questions, self.config))

    def _processed(self, examples: list[Example], partners: Mapping[int, Example]) -> Batch:
        """With the images' pixels as the model reads them; what is wrong with one, its method will find too."""
        batch = prepare(examples, partners)
        for question in batch.questions:
            with suppress(Exception):
                encode_task(self.vlm, question, self.config, prompts_of(self.config))
        return batch

    @property
    def peak_memory(self) -> int:
        return peak_memory()


def cut(
    examples: Sequence[Example], size: int, finished: Collection[int], begun: Collection[int]
) -> Iterator[list[Example]]:
    """The examples in batches of `size`, without those that need no answer any more.

    The same examples share a batch whatever happened before, since company decides the last bits of an answer's
    reward: where an earlier run died within a batch (some rows `begun`, in its log, and others not), the whole batch
    goes through the model again. Elsewhere only rows that are not `finished` do, as those that ended in an error.
    """
    for start in range(0, len(examples), size):
        batch = examples[start : start + size]
        if all(example.row in begun for example in batch):
            batch = [example for example in batch if example.row not in finished]
        if batch:
            yield list(batch)


def question_of(example: Example, partner: Example | None = None) -> Question:
    """The example as it is asked, its images opened (ImageError); `partner` is opened where a method asks for it."""
    return Question(
        idx=example.idx,
        text=example.question,
        images=Pictures(map(open_image, example.images)),
        partner=partial(question_of, partner) if partner else None,
        boxes=example.meta.get("boxes"),
        solution=example.meta.get("response") or example.solution,
    )


def partners(examples: Sequence[Example]) -> dict[int, Example]:
    """By row, the example half a dataset further on: a derangement that no batch size and no order of work changes."""
    usable = [example for example in examples if example.solution]
    half = len(usable) // 2
    return {e.row: usable[(i + half) % len(usable)] for i, e in enumerate(usable)} if half else {}


def prepare(examples: list[Example], partners: Mapping[int, Example] | None = None) -> Batch:
    """Images opened. Examples without ground truth are skipped, unreadable images are errors."""

    def question(example: Example) -> Question | Answer:
        if not example.solution:
            return Answer("", "", "skipped_no_ground_truth")
        try:
            return question_of(example, (partners or {}).get(example.row))
        except ImageError as error:
            return failed(error)

    with ThreadPoolExecutor(READERS) as readers:
        prepared = list(readers.map(question, examples))
    settled = {e.row: one for e, one in zip(examples, prepared, strict=True) if isinstance(one, Answer)}
    return Batch(examples, [one for one in prepared if isinstance(one, Question)], settled)


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items in order, each made in a thread while earlier ones are used; at most AHEAD wait."""
    end, iterator = object(), iter(items)
    thread = ThreadPoolExecutor(1)
    try:
        waiting = deque(thread.submit(next, iterator, end) for _ in range(AHEAD))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, iterator, end))
            yield item
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def answer_batch(vlm: VLM, method: str, questions: list[Question], config: Config) -> list[Answer]:
    """One batch; a question that cannot be answered has the reason as its answer."""

    def answered(some: Sequence[Question], again: bool = True) -> list[Answer]:
        try:
            return METHODS[method](vlm, some, config)
        except torch.OutOfMemoryError:
            if not (again and vlm.recordings):
                vlm.ran_out(work_of(vlm, method, some, config), len(some))
                raise
        vlm.recordings.clear()  # the memory that recorded kernels hold may be what is missing
        free()
        return answered(some, again=False)

    answers, left = [], questions
    while left:
        size = vlm.fitting_batch(work_of(vlm, method, left, config)) if vlm.device.type == "cuda" else len(left)
        part, left = by_halves(answered, left[:size]), left[size:]
        answers += [failed(one) if isinstance(one, Exception) else one for one in part]
    for answer in answers:
        if answer.stop_reason == "error" and answer.error is None:
            answer.error = "the model's logits are not finite numbers"
    return answers


def work_of(vlm: VLM, method: str, questions: Sequence[Question], config: Config) -> Work:
    """What the largest of these questions asks of the model, by its encoded prompt."""
    prompt = images = None
    for question in questions:
        with suppress(Exception):  # what cannot be encoded will cost its own answer
            encoded = encode_task(vlm, question, config, prompts_of(config))
            prompt = max(prompt or 0, len(encoded.input_ids))
            images = max(images or 0, len(encoded.image_columns))
    return workload(config.replace(methods=method), vlm.context_length, images, prompt)
