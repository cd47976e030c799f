"""The loop: latents and patches of a batch, optimised at test time (Algorithm 1).

Examples of a batch do not influence each other: every decision is per row, and an example's noise comes from
(seed, its idx) alone. Knows nothing about questions, answers or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from dmlr.config import Config
from dmlr.loop.injection import Patches, Retrieval
from dmlr.loop.score import Score, Scored, scorer
from dmlr.model.cache import Prefix
from dmlr.model.vlm import VLM


@dataclass
class State:
    """Latents [B, L, D] with their patches."""

    latents: torch.Tensor
    patches: Patches

    def where(self, condition: torch.Tensor, other: State) -> State:
        """Rows of self where `condition` [B] holds, of `other` elsewhere."""
        latents = torch.where(condition[:, None, None], self.latents, other.latents)
        return State(latents, self.patches.where(condition, other.patches))


@dataclass
class Step:
    """One iteration of a batch, as tensors on the device; `reward` is the one that acceptance compares."""

    reward: torch.Tensor  # [B]
    explored: torch.Tensor  # [B], reward that drove the update (mean of the perturbed samples; REINFORCE)
    sigma: float
    accepted: torch.Tensor  # [B] bool
    active: torch.Tensor  # [B] bool, False once an example stopped early
    budget: torch.Tensor  # [B], patches per think token allowed in this iteration
    tried: State  # the state whose reward this is
    attention: torch.Tensor  # [B, L, N] that ranked the patches
    evaluations: int  # states that went through the model


@dataclass
class Trace:
    """What the loop did. `final` is the state to decode; what `best_step` tried earned `best_reward`."""

    start_reward: torch.Tensor  # [B], think tokens as they are, without patches
    start_attention: torch.Tensor  # [B, L, N]
    best_reward: torch.Tensor  # [B]
    best_step: torch.Tensor  # [B], iteration that earned it, 1-based; 0 is the start
    final: State
    steps: list[Step] = field(default_factory=list)


def example_generator(seed: int, idx: int | str, purpose: str = "") -> torch.Generator:
    """Randomness of one example, on the CPU; each purpose has its own stream."""
    digest = hashlib.sha256(f"{seed}:{idx}{':' if purpose else ''}{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def example_noise(config: Config, idx: int | str, dim: int) -> torch.Tensor:
    """Standard normal noise [T, M, L, D] that depends on (seed, idx) only; iteration t's does not depend on T.

    Several samples are antithetic pairs: every odd one is the negative of the one before it.
    """
    generator, shape = example_generator(config.seed, idx), (max(config.num_samples // 2, 1), config.num_thought_tokens)
    draws = [torch.randn(*shape, dim, generator=generator) for _ in range(config.max_num_steps)]
    noise = torch.stack(draws) if draws else torch.zeros(0, *shape, dim)
    return noise if config.num_samples == 1 else torch.stack([noise, -noise], dim=2).flatten(1, 2)


def initial_latents(vlm: VLM, prefix: Prefix, config: Config) -> torch.Tensor:
    """[B, L, D] float32: the end-of-text embedding, or with `visual_only` the image's features.

    With `visual_only` think token l is the mean of the l-th of L equal runs of image tokens (row-major); an example
    without an image keeps the end-of-text embedding.
    """
    batch, count, length = *prefix.image_mask.shape, config.num_thought_tokens
    think = vlm.embed(torch.full((batch, length), vlm.think_id)).float()
    if not config.visual_only or count == 0:
        return think
    totals = prefix.image_mask.sum(dim=1)  # [B]
    column = torch.arange(count, device=totals.device)
    run = torch.arange(length, device=totals.device)[None, :, None]  # [1, L, 1]
    first, last = run * totals[:, None, None] // length, (run + 1) * totals[:, None, None] // length
    inside = (column >= first) & (column < torch.maximum(last, first + 1)) & prefix.image_mask[:, None]  # [B, L, N]
    weights = inside.float() / inside.sum(dim=2, keepdim=True).clamp(min=1)
    return torch.where((totals > 0)[:, None, None], weights @ prefix.images[..., : think.shape[2]].float(), think)


def optimize(
    vlm: VLM,
    prefix: Prefix,
    config: Config,
    noise: torch.Tensor,
    score_ids: torch.Tensor | None = None,
    *,
    score: Score | None = None,
    start: torch.Tensor | None = None,
    ranking: torch.Tensor | None = None,
) -> Trace:
    """Algorithm 1 over a prefilled batch. The model and the prefix are left as they were.

    noise: [B, T, M, L, D] standard normal, M samples an iteration (see `example_noise`). score_ids: tokens that ask the
    model to rate its latents, read only with `disable_conf_reward`. score: another reward than the run's. start:
    latents [B, L, D] to begin with (none: `initial_latents`).

    `accept_at = "updated"` is the paper's loop: V_best begins with the patches that the start attends to; perturb,
    update, then score the updated latents with the candidate patches: M + 1 rewards an iteration.

    `accept_at = "candidate"` is the released one. A pass over the perturbed latents ranks the patches (in iterations
    that look for some), a second one with those patches gives the one reward that drives both update and acceptance:
    up to 2 M evaluations. The state then kept is the updated one; V_best begins empty, the threshold at zero.

    ranking: [B, T, L, N], random numbers that rank the patches of an iteration in attention's place. With them the loop
    is a search at random: it perturbs the start in every iteration, and the best candidate itself is tried and kept.

    Where nothing is accepted the start is decoded as it earned its reward: without patches (the paper does not say).
    An early stop (`reward_threshold`) is for what an iteration reached, not for the start.
    """
    config = config.absolute(vlm.embedding_rms)
    score = score or scorer(vlm, prefix, config, score_ids)
    at_random = ranking is not None
    single = config.accept_at == "candidate" or at_random  # one reward for exploration and acceptance
    retrieve = Retrieval(prefix.image_mask, config)
    start = initial_latents(vlm, prefix, config) if start is None else start
    step = ascent(start, config.lr) if config.use_auto_grad else partial(reinforce, lr=config.lr)
    noise, rows = noise.to(start.device), torch.arange(len(start), device=start.device)

    latents, kept, budget = start, retrieve.nothing, retrieve.first_budget  # T, V_best, m
    began = score(start[:, None], kept)
    attention, best, best_step = began.attention, State(start, kept), torch.zeros_like(budget)
    best_reward = began.reward[:, 0]  # r_best
    if config.accept_at == "candidate":
        best_reward = torch.zeros_like(best_reward)
    active = torch.ones_like(budget, dtype=torch.bool)
    sigma, steps = 0.0 if config.use_auto_grad else config.sigma, []

    if config.visual_injection_start_step == 0 and not single:
        kept = retrieve(attention, kept, budget)
    for t in range(config.max_num_steps):
        since = t - config.visual_injection_start_step
        injects = since >= 0 and since % config.visual_injection_interval == 0
        if since == 0 and t > 0 and not single:
            kept = retrieve(attention, kept, budget, t)

        xi = noise[:, t] * sigma  # (5), [B, M, L, D]
        candidates = (start if at_random else latents)[:, None] + xi  # T'
        patches, ranked = kept, single and injects
        if ranked:
            attention = ranking[:, t] if at_random else score(candidates, kept).attention
            patches = retrieve(attention, kept, budget, t)
        explored = score(candidates, patches, with_attention=not ranked, with_gradient=config.use_auto_grad)
        attention = attention if ranked else explored.attention

        if single:
            reward, which = explored.reward.max(dim=1)
            tried = State(candidates[rows, which], patches)
        updated = tried.latents if at_random else step(latents, xi, explored, sigma)  # (8), (9)
        if not single:
            tried = State(updated, retrieve(attention, kept, budget, t) if injects else kept)  # Z_cand
            reward = score(updated[:, None], tried.patches, with_attention=False).reward[:, 0]  # (10)

        accepted = (reward > best_reward) & active
        mean, samples = explored.reward.mean(dim=1), explored.reward.shape[1]
        evaluations = samples * (1 + (ranked and not at_random)) + (not single)
        steps.append(Step(reward, mean, sigma, accepted, active, budget, tried, attention, evaluations))
        best, best_reward = State(updated, tried.patches).where(accepted, best), reward.where(accepted, best_reward)
        best_step = torch.where(accepted, t + 1, best_step)
        kept = tried.patches.where(accepted, kept)
        budget = torch.minimum(budget + config.patch_increment * accepted, retrieve.most)
        latents = torch.where(active[:, None, None], updated, latents)
        if config.reward_threshold > 0:
            active = active & ~(accepted & (reward >= config.reward_threshold))
            if not active.any():
                break
        sigma *= config.sigma_decay

    start_reward = began.reward[:, 0]
    best_reward = torch.where(best_step > 0, best_reward, start_reward)
    final = State(latents, kept) if config.disable_best_reward else best
    return Trace(start_reward, began.attention, best_reward, best_step, final, steps)


def reinforce(latents: torch.Tensor, xi: torch.Tensor, explored: Scored, sigma: float, lr: float) -> torch.Tensor:
    """(8), (9): one step along the samples' mean estimate of the gradient; xi: [B, M, L, D].

    With several samples the reward's mean over them is subtracted (antithetic pairs keep the estimate unbiased).
    """
    reward = explored.reward  # [B, M]
    advantage = reward - reward.mean(dim=1, keepdim=True) if reward.shape[1] > 1 else reward
    return latents + lr * (advantage[..., None, None] * xi).mean(dim=1) / sigma**2


def ascent(start: torch.Tensor, lr: float) -> Callable[..., torch.Tensor]:
    """Steps of Adam up the exact gradient, called as `reinforce`; element-wise, so rows stay independent."""
    moving = start.clone()
    adam = torch.optim.Adam([moving], lr=lr, maximize=True)

    def step(latents: torch.Tensor, xi: torch.Tensor, explored: Scored, sigma: float) -> torch.Tensor:
        moving.grad = explored.gradient
        adam.step()
        return moving.clone()

    return step
