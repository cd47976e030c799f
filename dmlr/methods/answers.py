"""What goes into a method and what comes out, and the clock beside it. Knows nothing about how a method works."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image


@dataclass(frozen=True)
class Question:
    """What a method may know about an example.

    NO METHOD THAT IS COMPARED MAY READ `boxes` OR `solution`: they are for the oracles of controls.py ("true-patches",
    "oracle-latents"), which ask what could be reached at best, and whose records say so.
    """

    idx: int | str  # seeds the noise
    text: str
    images: list[Image.Image]
    partner: Callable[[], Question] | None = None  # another question of the dataset, for "swapped"
    boxes: list | None = None  # [left, top, right, bottom] of what is asked about, in pixels of the first image
    solution: str | None = None  # the text that a right answer begins with


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


NO_IMAGE = {"note": "no image: no patches"}  # in the details, where a method would have used some


def notes(question: Question) -> dict[str, str]:
    """Details of a question that a method which injects patches had to answer without any."""
    return {} if question.images else dict(NO_IMAGE)


class Clock:
    """Seconds per phase; waits for the GPU, so that a phase pays for its own work."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.last = device, {}, time.perf_counter()

    def lap(self, phase: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def per_example(self, batch: int) -> dict[str, float]:
        return {phase: seconds / batch for phase, seconds in self.seconds.items()}
