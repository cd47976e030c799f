"""Methods that think in latents: prompt, think tokens, a loop that chooses latents and patches, then the answer.

DMLR and LTPO are one loop (optimize.py) under two configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dmlr.config import Config
from dmlr.loop.injection import interleave
from dmlr.loop.optimize import Trace, example_noise, optimize
from dmlr.loop.score import with_tokens
from dmlr.methods.answers import Answer, Clock, Question, Reasoning, notes
from dmlr.methods.prompting import decode, prompts_of
from dmlr.model.cache import Prefix
from dmlr.model.decode import Decoded
from dmlr.model.encode import encode
from dmlr.model.vlm import VLM, Encoded
from dmlr.prompts import Prompts

# model, prefix, configuration, noise [B, T, M, L, D], tokens that ask for a self score -> what to decode, and why
Loop = Callable[[VLM, Prefix, Config, torch.Tensor, torch.Tensor], Trace]


def dmlr(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """Think tokens optimised at test time, patches interleaved, answer decoded after them (Algorithm 1)."""
    return with_notes(reasoned(vlm, questions, config, optimize), questions)


def ltpo(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """Latent thought policy optimisation (Ye et al., *Thinking on the Fly*, arXiv 2510.04182): DMLR's loop without
    patches, with LTPO's published budget (`ltpo_...`). The image stays in the prompt.

    What the published defaults do not say follows the run's configuration, so that both are compared alike: reward and
    where it is read, `top_k`, `accept_at`, `num_samples`, early stopping, and this project's prompt.
    """
    return reasoned(vlm, questions, ltpo_config(config), optimize)


def ltpo_config(config: Config) -> Config:
    """The configuration under which the loop is LTPO."""
    return config.replace(
        num_thought_tokens=config.ltpo_thought_tokens,
        max_num_steps=config.ltpo_steps,
        lr=config.ltpo_lr,
        lr_relative=None,
        sigma=config.ltpo_sigma,
        sigma_relative=None,
        sigma_decay=config.ltpo_sigma_decay,
        initial_patch_count=0,
        patch_increment=0,
    )


def reasoned(vlm: VLM, questions: Sequence[Question], config: Config, loop: Loop) -> list[Answer]:
    """Prefill, think with `loop`, put the latents and patches it chose behind the prompt, decode."""
    prompts, clock = prompts_of(config), Clock(vlm.device)
    prefix, encoded = prefill_latent(vlm, questions, config, prompts)
    clock.lap("prefill")
    noise = torch.stack([question_noise(vlm, q, config) for q in questions])
    trace = loop(vlm, prefix, config, noise, score_ids(vlm, prefix, prompts))
    clock.lap("optimise")
    append_latents(vlm, prefix, trace.final.latents, trace.final.patches)
    decoded = decode(vlm, prefix, config)
    clock.lap("decode")
    return latent_answers(decoded, encoded, trace, vlm.embedding_rms, clock.per_example(len(questions)))


def with_notes(answers: list[Answer], questions: Sequence[Question]) -> list[Answer]:
    """For methods that inject patches: says in the record of a text-only question that there were none."""
    for answer, question in zip(answers, questions, strict=True):
        answer.details |= notes(question)
    return answers


# the pieces of `reasoned`


def prefill_latent(
    vlm: VLM, questions: Sequence[Question], config: Config, prompts: Prompts
) -> tuple[Prefix, list[Encoded]]:
    """Prefix up to the first think token: image, task and the hint that think tokens follow."""
    length = config.num_thought_tokens
    encoded = [
        encode(vlm, prompts.system, prompts.latent_task(q.text, length, config.solver_prompt_idx), q.images, length)
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
    embeds, filled = with_tokens(vlm, embeds, filled, prefix.suffix_ids)
    vlm.append(prefix, embeds[:, 0], filled)


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
            answers.append(
                Answer(d.text, e.prompt, d.stop_reason, d.num_tokens, seconds, None, reasoning, e.num_tokens)
            )
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
        "evaluations": [s.evaluations for s in steps],
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
        evaluations=1 + sum(host["evaluations"][t] for t in ran),
    )
