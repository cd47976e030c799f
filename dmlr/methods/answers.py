"""What goes into a method and what comes out, and the clock beside it. Knows nothing about how a method works."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from PIL import Image

from dmlr.config import Config, ConfigError
from dmlr.model.decode import Decoded
from dmlr.model.vlm import VLM, Encoded

S, T = TypeVar("S"), TypeVar("T")


@dataclass(frozen=True)
class Question:
    """What a method may know about an example.

    NO METHOD THAT IS COMPARED MAY READ `boxes` OR `solution`: they are for the oracles of controls.py ("true-patches",
    "oracle-latents"), which ask what could be reached at best, and whose records say so.
    """

    idx: int | str  # seeds the noise
    text: str
    images: list[Image.Image]  # or one image alone
    partner: Callable[[], Question] | None = None  # another question of the dataset, for "swapped"
    boxes: list | None = None  # [left, top, right, bottom] of what is asked about, in pixels of the first image
    solution: str | None = None  # the text that a right answer begins with

    def __post_init__(self) -> None:
        if isinstance(self.images, Image.Image):
            object.__setattr__(self, "images", [self.images])


@dataclass
class Answer:
    """What a method said about one question. `reasoning` is None for methods without latents."""

    text: str
    prompt: str
    stop_reason: str  # eos_token, length, error, skipped_no_ground_truth
    num_new_tokens: int = 0  # all that were generated for it, those of earlier calls and other samples included
    seconds: dict[str, float] = field(default_factory=dict)  # prefill, optimise, decode: the batch's, shared equally
    error: str | None = None
    reasoning: Reasoning | None = None
    prompt_tokens: int = 0  # of the prompt that was answered, image and think tokens included
    details: dict[str, Any] = field(default_factory=dict)  # what else the method did, as plain values for the record


@dataclass
class Reasoning:
    """One example's view of a Trace, on the host. N image tokens lie row-major in `patch_grid`."""

    steps: list[dict[str, Any]]  # step, reward, explored_reward, sigma, is_new_best, patch_count, patch_budget
    start_reward: float
    best_reward: float
    best_step: int
    latents: torch.Tensor  # [L, D], as decoded
    patches: list[list[int]]  # per think token, as decoded
    patch_history: list[list[list[int]]]  # the same per iteration, as tried
    attention: torch.Tensor  # [1 + T, L, N]: at the start, then at each iteration
    patch_grid: tuple[int, int]
    embedding_rms: float  # what sigma is relative to
    evaluations: int = 0  # states that the loop ran through the model, the start included


Method = Callable[[VLM, Sequence[Question], Config], list[Answer]]


def answered(method: Method, vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """What `method` says to each question, in order. A question that cannot be answered has the reason as its answer,
    and costs no other question its own; what concerns all of them alike (ConfigError, out of memory) is raised."""
    answers = by_halves(lambda some: method(vlm, some, config), questions, (ConfigError, torch.OutOfMemoryError))
    return [failed(one) if isinstance(one, Exception) else one for one in answers]


def by_halves(
    work: Callable[[Sequence[S]], list[T]], items: Sequence[S], raised: tuple[type[Exception], ...] = ()
) -> list[T | Exception]:
    """What `work` makes of the items; where it fails, of their halves, down to the single item with its error."""
    if not items:
        return []
    try:
        return work(items)
    except raised:
        raise
    except Exception as error:  # whatever it is, it may cost one record and not the run
        if len(items) == 1:
            return [error.with_traceback(None)]  # whose frames hold tensors
    free()  # after the error is gone, and its traceback with it
    half = len(items) // 2
    return by_halves(work, items[:half], raised) + by_halves(work, items[half:], raised)


def free() -> None:
    """Gives the GPU's memory back that nothing holds any more."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def failed(error: Exception) -> Answer:
    """An answer that says why there is none."""
    return Answer("", "", "error", error=f"{type(error).__name__}: {error}".split("\n")[0])


class Clock:
    """Seconds per phase; waits for the GPU, so that a phase pays for its own work."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.last = device, defaultdict(float), time.perf_counter()

    def lap(self, phase: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now


def answers_of(encoded: Sequence[Encoded], decoded: Sequence[Decoded], clock: Clock) -> list[Answer]:
    """What was decoded, just now, after each prompt of a batch."""
    clock.lap("decode")
    each = {phase: seconds / len(encoded) for phase, seconds in clock.seconds.items()}
    return [
        Answer(d.text, e.prompt, d.stop_reason, d.num_tokens, each, prompt_tokens=e.num_tokens)
        for e, d in zip(encoded, decoded, strict=True)
    ]
