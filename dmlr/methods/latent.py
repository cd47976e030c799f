"""Methods that think in latents: prompt, think tokens, a loop that chooses latents and patches, then the answer.

DMLR and LTPO are one loop (optimize.py) under two configurations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dmlr.config import Config
from dmlr.loop.optimize import Trace, example_noise, optimize
from dmlr.loop.score import append_latents
from dmlr.methods.answers import Answer, Clock, Question, Reasoning, answers_of
from dmlr.methods.prompting import decode, prompts_of
from dmlr.model.cache import Prefix
from dmlr.model.encode import encode
from dmlr.model.vlm import VLM, Encoded
from dmlr.prompts import Prompts

NO_IMAGE = {"note": "no image: no patches"}  # in the details, where a method would have used some
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
    return without_patches(config, "ltpo")


def without_patches(config: Config, method: str, **more: Any) -> Config:
    """The configuration of a method with a budget of its own (`ltpo_...`, `ulr_...`) that has latents alone."""
    names = {"num_thought_tokens": "thought_tokens", "max_num_steps": "steps"}
    names |= {name: name for name in ("lr", "sigma", "sigma_decay")}
    own = {name: getattr(config, f"{method}_{theirs}") for name, theirs in names.items()}
    nothing = {"lr_relative": None, "sigma_relative": None, "initial_patch_count": 0, "patch_increment": 0}
    return config.replace(**own | nothing | more)


def reasoned(vlm: VLM, questions: Sequence[Question], config: Config, loop: Loop) -> list[Answer]:
    """Prefill, think with `loop`, put the latents and patches it chose behind the prompt, decode.

    A reward that is not a number costs that example only.
    """
    prompts, clock = prompts_of(config), Clock(vlm.device)
    prefix, encoded = prefill_latent(vlm, questions, config, prompts)
    clock.lap("prefill")
    noise = torch.stack([question_noise(vlm, q, config) for q in questions])
    trace = loop(vlm, prefix, config, noise, score_ids(vlm, prefix, prompts))
    clock.lap("optimise")
    append_latents(vlm, prefix, trace.final.latents, trace.final.patches)
    answers = answers_of(encoded, decode(vlm, prefix, config), clock)
    for answer, reasoning in zip(answers, reasonings(trace, encoded, vlm.embedding_rms), strict=True):
        answer.reasoning = reasoning
        rewards = [reasoning.start_reward, *(step["reward"] + step["explored_reward"] for step in reasoning.steps)]
        if bad := [t for t, reward in enumerate(rewards) if not math.isfinite(reward)]:
            answer.text, answer.stop_reason, answer.num_new_tokens = "", "error", 0
            answer.error = f"the reward is not a finite number at iteration {bad[0]}"
    return answers


def with_notes(answers: list[Answer], questions: Sequence[Question]) -> list[Answer]:
    """For methods that inject patches: says in the record of a text-only question that there were none."""
    for answer, question in zip(answers, questions, strict=True):
        answer.details |= {} if question.images else NO_IMAGE
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
    return example_noise(config, question.idx, vlm.text_config.hidden_size)


def score_ids(vlm: VLM, prefix: Prefix, prompts: Prompts) -> torch.Tensor:
    """Tokens that ask the model to rate its latents, then hand it the turn."""
    ids = vlm.tokenizer(prompts.self_score, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    return torch.cat([ids.to(vlm.device), prefix.suffix_ids])


def reasonings(trace: Trace, encoded: list[Encoded], rms: float) -> list[Reasoning]:
    """Each example's view of the trace, up to the iteration in which it stopped; all of it leaves the device once."""
    maps = [trace.start_attention, *(step.attention for step in trace.steps)]
    attention = torch.stack(maps).cpu()  # [1 + T, B, L, N]
    columns = (trace.start_reward.tolist(), trace.best_reward.tolist(), trace.best_step.tolist())
    finals = zip(*columns, trace.final.latents.cpu(), trace.final.patches.tolist(), strict=True)
    found = [
        Reasoning([], *final, [], attention[:, row, :, : len(e.image_columns)], e.patch_grid, rms, evaluations=1)
        for row, (e, final) in enumerate(zip(encoded, finals, strict=True))
    ]
    for t, step in enumerate(trace.steps, start=1):
        columns = (step.active, step.reward, step.explored, step.accepted, step.budget)
        rows = zip(found, *(column.tolist() for column in columns), step.tried.patches.tolist(), strict=True)
        for one, active, reward, explored, accepted, budget, patches in rows:
            if active:
                record = {"step": t, "reward": reward, "explored_reward": explored, "sigma": step.sigma}
                record |= {"is_new_best": accepted, "patch_count": sum(map(len, patches)), "patch_budget": budget}
                one.steps.append(record)
                one.patch_history.append(patches)
                one.evaluations += step.evaluations
    for one in found:
        one.attention = one.attention[: 1 + len(one.steps)]
    return found
