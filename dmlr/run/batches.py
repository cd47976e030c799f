"""Batches of examples, and the model of this process that answers them.

Nothing that goes wrong with one example costs another its answer: a failing batch is halved until the example that
fails is alone. Batches never change an answer, so halving is safe, also when memory runs out. While the model works,
the images of the next batches are opened and processed in threads. Knows nothing about ground truths, logs or workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from dmlr.config import Config
from dmlr.data.examples import Example, ImageError, open_image
from dmlr.data.images import ImageFile
from dmlr.machine import environment, peak_memory
from dmlr.methods import METHODS, Answer, Question
from dmlr.methods.answers import by_halves, failed, free
from dmlr.methods.prompting import encode_task, prompts_of
from dmlr.methods.workload import workload
from dmlr.model.encode import encode
from dmlr.model.families import Pictures
from dmlr.model.memory import Work
from dmlr.model.vlm import VLM

T = TypeVar("T")
Sources = tuple[str | ImageFile, ...]  # of one question's images
AHEAD = 2  # batches that wait for the model, ready
READERS = 8  # images that are opened at a time
KEPT = 2**30  # bytes of images that a run keeps for its further methods and questions


@dataclass(frozen=True)
class Batch:
    """Examples that go through the model together."""

    examples: list[Example]
    questions: list[Question]  # of those that can be asked, in order
    settled: dict[int, Answer]  # by row, the others: no ground truth, or no readable image


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
        self.vlm, self.config, self.images = vlm, config, Images(vlm)
        self.facts = ModelFacts(str(vlm.dtype), vlm.device.type, fitting, environment(), scales)

    def answers(
        self, method: str, batches: Iterable[list[Example]], partners: Mapping[int, Example]
    ) -> Iterator[tuple[Example, Answer]]:
        """Examples with their answers, batch by batch, in order; `partners` are those of their rows."""
        for batch in ahead(prepare(examples, partners, self.images) for examples in batches):
            answers = iter(answer_batch(self.vlm, method, batch.questions, self.config))
            for example in batch.examples:
                yield example, batch.settled.get(example.row) or next(answers)

    @property
    def peak_memory(self) -> int:
        return peak_memory()


class Images:
    """A run's images, opened and processed once, whatever method asks and whatever is asked about them.

    Kept are the first that fit in KEPT bytes: of a larger dataset a part, which every pass over it finds again. What is
    kept has its pixels and does not change, so that methods read it while further images are prepared in threads.
    """

    def __init__(self, vlm: VLM) -> None:
        self.vlm, self.room, self.lock = vlm, KEPT, Lock()
        self.kept: dict[Sources, Pictures] = {}

    def __call__(self, sources: Sources) -> Pictures:
        """Those of one question. ImageError as `open_image`."""
        if found := self.kept.get(sources):
            return found
        opened = opened_images(sources)
        # One at a time, since torch has threads of its own; what else is wrong with them, a method will find too.
        with self.lock, suppress(Exception):
            encode(self.vlm, "", "", opened)
            if sources not in self.kept and (size := size_of(sources, opened)) <= self.room:
                self.kept[sources], self.room = opened, self.room - size
        return opened


def opened_images(sources: Sources) -> Pictures:
    """ImageError as `open_image`."""
    return Pictures(map(open_image, sources))


def size_of(sources: Sources, pictures: Pictures) -> int:
    """Bytes of decoded images, of their pixels for the model, and of the files where these are the sources."""
    images = [*pictures, *tree_leaves(pictures.resized)]
    pixels = sum(getattr(value, "nbytes", 0) for value in tree_leaves(dict(pictures.pixels or {})))
    files = sum(len(source.content) for source in sources if isinstance(source, ImageFile))
    return 4 * sum(image.width * image.height for image in images) + pixels + files  # Pillow pads RGB to 4 bytes


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


def partners(examples: Sequence[Example]) -> dict[int, Example]:
    """By row, the example half a dataset further on: a derangement that no batch size and no order of work changes."""
    usable = [example for example in examples if example.solution]
    half = len(usable) // 2
    return {e.row: usable[(i + half) % len(usable)] for i, e in enumerate(usable)} if half else {}


def prepare(
    examples: list[Example],
    partners: Mapping[int, Example] | None = None,
    images: Callable[[Sources], Pictures] = opened_images,
) -> Batch:
    """Images opened by `images`, a partner's when a method asks for it. Examples without ground truth are skipped,
    unreadable images are errors."""

    def question(example: Example, pictures: Pictures) -> Question:
        partner = (partners or {}).get(example.row)
        return Question(
            idx=example.idx,
            text=example.question,
            images=pictures,
            partner=(lambda: question(partner, images(partner.images))) if partner else None,
            boxes=example.meta.get("boxes"),
            solution=example.meta.get("response") or example.solution,
        )

    batch = Batch(examples, [], {})
    with ThreadPoolExecutor(READERS) as readers:
        sources = {example.images for example in examples if example.solution}
        opened = {one: readers.submit(images, one) for one in sources}
    for example in examples:
        try:
            if example.solution:
                batch.questions.append(question(example, opened[example.images].result()))
            else:
                batch.settled[example.row] = Answer("", "", "skipped_no_ground_truth")
        except ImageError as error:
            batch.settled[example.row] = failed(error)
    return batch


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
