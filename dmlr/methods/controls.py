"""Controls: what a gain must be larger than before optimisation or attention can be given the credit.

`unoptimised` has think tokens and patches but no search; `random` has the search, the noise and the selection by
reward, but neither the update nor attention's choice of patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dmlr.config import Config
from dmlr.loop.optimize import Retrieval, State, Step, Trace, example_generator, initial_latents, optimize
from dmlr.loop.score import scorer
from dmlr.methods.answers import Answer, Question
from dmlr.methods.latent import reasoned, with_notes
from dmlr.model.prefix import Prefix
from dmlr.model.vlm import VLM


def unoptimised(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """The think tokens as they are, each with its initial patches as attention ranks them; no iteration.

    The initial patches are decoded whether or not they raise the reward: nothing is selected here. The reward in the
    record is that of the think tokens without them. With `visual_injection_start_step` > 0 there are none, as in DMLR
    before that step.
    """
    still = config.replace(max_num_steps=0, disable_best_reward=True)
    return with_notes(reasoned(vlm, questions, still, optimize), questions)


def random(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """Random search: DMLR's noise without its update, patches drawn at random in place of the most attended ones.

    The noise of (seed, idx) is DMLR's; prompt, number of iterations, patch budget, its growth and the acceptance by
    reward are too. An iteration costs one reward (of `num_samples` candidates), DMLR's "updated" one two.
    """

    def loop(vlm: VLM, prefix: Prefix, config: Config, noise: torch.Tensor, ids: torch.Tensor) -> Trace:
        return random_search(vlm, prefix, config, noise, ids, random_ranking(questions, prefix, config))

    return with_notes(reasoned(vlm, questions, config, loop), questions)


def random_ranking(questions: Sequence[Question], prefix: Prefix, config: Config) -> torch.Tensor:
    """[B, 1 + T, L, N] in [0, 1): what ranks the patches at the start and in each iteration.

    A question's numbers depend on (seed, its idx) and its own number of image tokens only.
    """
    counts, widest = prefix.image_mask.sum(dim=1).tolist(), prefix.image_mask.shape[1]
    shape = (1 + config.max_num_steps, config.num_thought_tokens)
    rows = [
        torch.rand(*shape, count, generator=example_generator(config.seed, q.idx, "patches"))
        for q, count in zip(questions, counts, strict=True)
    ]
    return torch.stack([F.pad(row, (0, widest - row.shape[2])) for row in rows]).to(prefix.images.device)


def random_search(
    vlm: VLM, prefix: Prefix, config: Config, noise: torch.Tensor, score_ids: torch.Tensor, ranking: torch.Tensor
) -> Trace:
    """The loop of optimize.py with the guidance taken out: every iteration tries T + ξ around the same T.

    noise: [B, T, M, L, D] as there; ranking: [B, 1 + T, L, N] in place of attention. Of M samples the best is tried.
    It is kept with its patches where it raises the best reward (which starts as in optimize.py).
    """
    latents = initial_latents(vlm, prefix, config)  # T, [B, L, D], the centre of all that is tried
    noise, rows = noise.to(latents.device), torch.arange(len(latents), device=latents.device)
    retrieval = Retrieval(prefix, config)
    budget, kept = retrieval.first_budget, retrieval.nothing
    reward_of = scorer(vlm, prefix, config, score_ids)
    start_reward, start_attention, _ = reward_of(latents[:, None], kept)
    start_reward = start_reward[:, 0]
    best, best_reward, best_step = State(latents, kept), start_reward, torch.zeros_like(budget)
    bar = torch.zeros_like(start_reward) if config.accept_at == "candidate" else start_reward
    active = torch.ones_like(budget, dtype=torch.bool)
    last, sigma, steps = best, config.sigma, []
    for t in range(config.max_num_steps):
        since = t - config.visual_injection_start_step
        if since == 0:
            kept = retrieval(ranking[:, 0], kept, budget, t)
        looks = since >= 0 and since % config.visual_injection_interval == 0
        patches = retrieval(ranking[:, 1 + t], kept, budget, t) if looks else kept
        candidates = latents[:, None] + noise[:, t] * sigma  # [B, M, L, D]
        explored, attention, _ = reward_of(candidates, patches)
        reward, first = explored.max(dim=1)
        tried = State(candidates[rows, first], patches)
        accepted = (reward > bar) & active
        steps.append(Step(reward, explored.mean(dim=1), sigma, accepted, active, budget, tried, attention))
        best, last = tried.where(accepted, best), tried.where(active, last)
        best_reward, bar = torch.where(accepted, reward, best_reward), torch.where(accepted, reward, bar)
        best_step = torch.where(accepted, t + 1, best_step)
        kept = patches.where(accepted, kept)
        budget = torch.minimum(budget + config.patch_increment * accepted, retrieval.most)
        if config.reward_threshold > 0:
            active = active & (best_reward < config.reward_threshold)
            if not active.any():
                break
        sigma *= config.sigma_decay
    final = last if config.disable_best_reward else best
    return Trace(start_reward, start_attention, best_reward, best_step, final, best, steps)
