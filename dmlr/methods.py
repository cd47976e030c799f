"""The methods: a batch of questions in, answers out. Each is a small function on the same core.

Every method gets the same images, task wording, decoding and token limit; they differ only in what the model may do
before it answers. Knows nothing about ground truth, judging or files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from dmlr.config import Config
from dmlr.encode import Encoded
from dmlr.injection import interleave
from dmlr.optimize import Trace, example_noise, optimize, with_tokens
from dmlr.prompts import Prompts, load_prompts
from dmlr.vlm import VLM, Decoded, Prefix


@dataclass(frozen=True)
class Question:
    """What a method may know about an example: not its solution."""

    idx: int | str  # seeds the noise
    text: str
    images: list[Image.Image]


@dataclass
class Answer:
    """What a method said about one question. `reasoning` is None for methods without latents."""

    text: str
    prompt: str
    stop_reason: str  # eos_token, length, error
    num_new_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # prefill, optimise, decode: the batch's, shared equally
    error: str | None = None
    reasoning: Reasoning | None = None


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


def vanilla(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """The model's own prompt, greedy: the baseline."""
    prompts, clock = load_prompts(config.prompts_file or None), Clock(vlm.device)
    encoded = [vlm.encode(prompts.system, prompts.task(q.text, config.solver_prompt_idx), q.images) for q in questions]
    prefix = vlm.prefill(encoded)
    clock.lap("prefill")
    decoded = decode(vlm, prefix, config)
    clock.lap("decode")
    seconds = clock.per_example(len(questions))
    return [
        Answer(d.text, e.prompt, d.stop_reason, d.num_tokens, seconds) for d, e in zip(decoded, encoded, strict=True)
    ]


def dmlr(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """Think tokens optimised at test time, patches interleaved, answer decoded after them (Algorithm 1)."""
    prompts, clock = load_prompts(config.prompts_file or None), Clock(vlm.device)
    prefix, encoded = prefill_latent(vlm, questions, config, prompts)
    clock.lap("prefill")
    noise = torch.stack([question_noise(vlm, q, config) for q in questions])
    trace = optimize(vlm, prefix, config, noise, score_ids(vlm, prefix, prompts))
    clock.lap("optimise")
    append_latents(vlm, prefix, trace.final.latents, trace.final.patches)
    decoded = decode(vlm, prefix, config)
    clock.lap("decode")
    return latent_answers(decoded, encoded, trace, vlm.embedding_rms, clock.per_example(len(questions)))


METHODS: dict[str, Callable[[VLM, Sequence[Question], Config], list[Answer]]] = {"vanilla": vanilla, "dmlr": dmlr}


# the pieces that methods share


def prefill_latent(
    vlm: VLM, questions: Sequence[Question], config: Config, prompts: Prompts
) -> tuple[Prefix, list[Encoded]]:
    """Prefix up to the first think token: image, task and the hint that think tokens follow."""
    length = config.num_thought_tokens
    encoded = [
        vlm.encode(prompts.system, prompts.latent_task(q.text, length, config.solver_prompt_idx), q.images, length)
        for q in questions
    ]
    return vlm.prefill(encoded), encoded


def question_noise(vlm: VLM, question: Question, config: Config) -> torch.Tensor:
    """[T, M, L, D], the same whatever batch the question is in."""
    dim = vlm.text_config.hidden_size
    return example_noise(
        config.seed, question.idx, config.max_num_steps, config.num_samples, config.num_thought_tokens, dim
    )


def score_ids(vlm: VLM, prefix: Prefix, prompts: Prompts) -> torch.Tensor:
    """Tokens that ask the model to rate its latents, then hand it the turn."""
    ids = vlm.tokenizer(prompts.self_score, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    return torch.cat([ids.to(vlm.device), prefix.suffix_ids])


def append_latents(vlm: VLM, prefix: Prefix, latents: torch.Tensor, patches) -> None:
    """Puts think tokens, their patches and the assistant prefix behind the prompt; decoding comes next."""
    embeds, filled = interleave(latents[:, None], prefix.images, patches)
    vlm.append(prefix, *with_tokens(vlm, embeds[:, 0], filled, prefix.suffix_ids))


def decode(vlm: VLM, prefix: Prefix, config: Config) -> list[Decoded]:
    """The answer, greedy, within `max_new_tokens`."""
    banned = tuple(word for word in config.banned_strings.split("|") if word)
    return vlm.decode(prefix, config.max_new_tokens, banned)


def latent_answers(
    decoded: list[Decoded], encoded: list[Encoded], trace: Trace, rms: float, seconds: dict[str, float]
) -> list[Answer]:
    """Answers with each example's view of the trace. A reward that is not a number costs that example only."""
    host = _to_host(trace)
    answers = []
    for row, (d, e) in enumerate(zip(decoded, encoded, strict=True)):
        reasoning = _reasoning(host, row, e, rms)
        bad = next(
            (s["step"] for s in reasoning.steps if not torch.tensor(s["reward"] + s["explored_reward"]).isfinite()),
            None,
        )
        if bad is None and not torch.tensor(reasoning.start_reward).isfinite():
            bad = 0
        if bad is not None:
            error = f"the reward is not a finite number at iteration {bad}"
            answers.append(Answer("", e.prompt, "error", 0, seconds, error, reasoning))
        else:
            answers.append(Answer(d.text, e.prompt, d.stop_reason, d.num_tokens, seconds, None, reasoning))
    return answers


def _to_host(trace: Trace) -> dict[str, Any]:
    """All rows of the trace, moved once."""
    steps = trace.steps
    return {
        "start_reward": trace.start_reward.tolist(),
        "best_reward": trace.best_reward.tolist(),
        "best_step": trace.best_step.tolist(),
        "latents": trace.final.latents.cpu(),
        "patches": trace.final.patches.tolist(),
        "tried": [s.tried.patches.tolist() for s in steps],
        "attention": torch.stack([trace.start_attention, *(s.attention for s in steps)]).cpu(),  # [1 + T, B, L, N]
        "sigma": [s.sigma for s in steps],
        **{name: [getattr(s, name).tolist() for s in steps] for name in _STEP_COLUMNS},
    }


_STEP_COLUMNS = ("reward", "explored", "accepted", "active", "budget")


def _reasoning(host: dict[str, Any], row: int, encoded: Encoded, rms: float) -> Reasoning:
    ran = [t for t in range(len(host["sigma"])) if host["active"][t][row]]
    steps = [
        {
            "step": t + 1,
            "reward": host["reward"][t][row],
            "explored_reward": host["explored"][t][row],
            "sigma": host["sigma"][t],
            "is_new_best": host["accepted"][t][row],
            "patch_count": sum(len(p) for p in host["tried"][t][row]),
            "patch_budget": host["budget"][t][row],
        }
        for t in ran
    ]
    return Reasoning(
        steps=steps,
        start_reward=host["start_reward"][row],
        best_reward=host["best_reward"][row],
        best_step=host["best_step"][row],
        latents=host["latents"][row],
        patches=host["patches"][row],
        patch_history=[host["tried"][t][row] for t in ran],
        attention=host["attention"][[0, *(t + 1 for t in ran)], row, :, : len(encoded.image_columns)],
        patch_grid=encoded.patch_grid,
        embedding_rms=rms,
    )
