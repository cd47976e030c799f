"""Batches of examples, and the model of this process that answers them.

Nothing that goes wrong with one example costs another its answer: a failing batch is halved until the example that
fails is alone. Batches never change an answer, so halving is safe, also when memory runs out. Knows nothing about
ground truths, logs or workers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from dmlr.config import Config
from dmlr.data.examples import Example, ImageError, open_image
from dmlr.machine import environment, peak_memory
from dmlr.methods import METHODS, Answer, Question
from dmlr.methods.workload import workload
from dmlr.model.vlm import VLM

S, T = TypeVar("S"), TypeVar("T")


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

    def lost(self, error: Exception) -> list[tuple[Example, Answer]]:
        """Every example whose question was asked as an error."""
        return self.answered([failed(error)] * len(self.questions))


@dataclass(frozen=True)
class ModelFacts:
    """What a run must know about the model that answers, in whatever process that is."""

    dtype: str
    device: str  # its type: cpu, cuda
    fitting_batch: int  # examples
    environment: dict[str, str]

    @classmethod
    def of(cls, vlm: VLM, config: Config) -> ModelFacts:
        fitting = vlm.fitting_batch(workload(config, vlm.context_length))
        return cls(str(vlm.dtype), vlm.device.type, fitting, environment())


class InProcess:
    """The model of this process, as the one that answers. Use as a context manager, like `workers.Workers`."""

    def __init__(self, vlm: VLM, config: Config) -> None:
        self.vlm, self.config, self.facts = vlm, config, ModelFacts.of(vlm, config)

    def answers(self, method: str, batches: Iterable[Batch]) -> Iterator[list[tuple[Example, Answer]]]:
        """Each batch's examples with their answers, in order."""
        for batch in batches:
            yield batch.answered(answer_batch(self.vlm, method, batch.questions, self.config))

    @property
    def peak_memory(self) -> int:
        return peak_memory()

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


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
        images=[open_image(source) for source in example.images],
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
    questions, settled, partners = [], {}, partners or {}
    for example in examples:
        if not example.solution:
            settled[example.row] = Answer("", "", "skipped_no_ground_truth")
            continue
        try:
            questions.append(question_of(example, partners.get(example.row)))
        except ImageError as error:
            settled[example.row] = failed(error)
    return Batch(examples, questions, settled)


def answer_batch(vlm: VLM, method: str, questions: list[Question], config: Config) -> list[Answer]:
    """One batch; a question that cannot be answered has the reason as its answer."""

    def answered(some: Sequence[Question]) -> list[Answer]:
        try:
            return METHODS[method](vlm, some, config)
        except torch.OutOfMemoryError:
            if not vlm.prepared:
                raise
        vlm.prepared.clear()  # the memory that recorded kernels hold may be what is missing
        _free()
        return METHODS[method](vlm, some, config)

    found = by_halves(answered, questions)
    return [failed(one) if isinstance(one, Exception) else one for one in found]


def by_halves(work: Callable[[Sequence[S]], list[T]], items: Sequence[S]) -> list[T | Exception]:
    """What `work` makes of the items; where it fails, of their halves, down to the single item with its error."""
    if not items:
        return []
    try:
        return work(items)
    except Exception as error:  # whatever it is, it may cost one record and not the run
        if len(items) == 1:
            return [error]
    _free()
    half = len(items) // 2
    return by_halves(work, items[:half]) + by_halves(work, items[half:])


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def failed(error: Exception) -> Answer:
    """An answer that says why there is none."""
    return Answer("", "", "error", error=f"{type(error).__name__}: {error}".split("\n")[0])
