"""The loop: latents and patches of a batch, optimised at test time (Algorithm 1).

Examples of a batch do not influence each other: every decision is per row, and an example's noise comes from
(seed, its idx) alone. Knows nothing about questions, answers or files.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch

from dmlr.config import Config
from dmlr.loop.injection import Patches, choose_patches
from dmlr.loop.score import caps_of, scorer
from dmlr.model.prefix import Prefix
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


@dataclass
class Trace:
    """What the loop did. `final` is the state to decode; `scored` is the state that earned `best_reward`."""

    start_reward: torch.Tensor  # [B], think tokens as they are, without patches
    start_attention: torch.Tensor  # [B, L, N]
    best_reward: torch.Tensor  # [B]
    best_step: torch.Tensor  # [B], iteration that earned it, 1-based; 0 is the start
    final: State
    scored: State
    steps: list[Step] = field(default_factory=list)


def example_generator(seed: int, idx: int | str, purpose: str = "") -> torch.Generator:
    """Randomness of one example, on the CPU; each purpose has its own stream."""
    digest = hashlib.sha256(f"{seed}:{idx}{':' if purpose else ''}{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def example_noise(
    seed: int, idx: int | str, steps: int, samples: int, num_thought_tokens: int, dim: int
) -> torch.Tensor:
    """Standard normal noise [T, M, L, D] that depends on (seed, idx) only; iteration t's does not depend on T.

    Several samples are antithetic pairs: every odd one is the negative of the one before it.
    """
    generator = example_generator(seed, idx)
    draws = [torch.randn(max(samples // 2, 1), num_thought_tokens, dim, generator=generator) for _ in range(steps)]
    noise = torch.stack(draws) if draws else torch.zeros(0, max(samples // 2, 1), num_thought_tokens, dim)
    return noise if samples == 1 else torch.stack([noise, -noise], dim=2).flatten(1, 2)


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


def optimize(vlm: VLM, prefix: Prefix, config: Config, noise: torch.Tensor, score_ids: torch.Tensor) -> Trace:
    """Algorithm 1 over a prefilled batch.

    noise: [B, T, M, L, D] standard normal, M samples an iteration (see `example_noise`); score_ids: tokens that ask the
    model to rate its latents, read only with `disable_conf_reward`. The model and the prefix are left as they were.

    `accept_at = "updated"` is the paper's loop: perturb, update, then score the updated latents with the candidate
    patches. `accept_at = "candidate"` is the released one: a single reward, of the perturbed latents with the
    candidate patches, drives the update and the acceptance; the state then kept is the updated one, and the bar
    starts at zero. With several samples the update takes the mean of their estimates, the reward's mean over them
    subtracted (antithetic pairs keep it unbiased), and "candidate" tries the best of them.
    """
    latents = initial_latents(vlm, prefix, config)  # T, [B, L, D]
    noise = noise.to(latents.device)
    reward_of = scorer(vlm, prefix, config, score_ids)
    retrieval = Retrieval(prefix, config)
    budget, kept = retrieval.first_budget, retrieval.nothing  # kept is V_best

    start_reward, start_attention, _ = reward_of(latents[:, None], kept)
    start_reward, attention = start_reward[:, 0], start_attention
    best = scored = State(latents, kept)
    best_reward, best_step = start_reward, torch.zeros_like(budget)
    bar = torch.zeros_like(start_reward) if config.accept_at == "candidate" else start_reward  # r_best
    active = torch.ones_like(budget, dtype=torch.bool)
    adam = torch.optim.Adam([latents.clone()], lr=config.lr, maximize=True) if config.use_auto_grad else None
    sigma, steps = 0.0 if adam else config.sigma, []

    if config.visual_injection_start_step == 0:
        kept = retrieval(attention, kept, budget, 0)
    for t in range(config.max_num_steps):
        since = t - config.visual_injection_start_step
        looks = since >= 0 and since % config.visual_injection_interval == 0
        if since == 0 and t > 0:
            kept = retrieval(attention, kept, budget, t)

        perturbation = noise[:, t] * sigma  # (5), [B, M, L, D]
        candidates = latents[:, None] + perturbation
        patches = retrieval(attention, kept, budget, t) if looks and config.accept_at == "candidate" else kept
        explored, attention, gradient = reward_of(candidates, patches, with_gradient=adam is not None)
        if adam:
            updated = ascend(adam, latents, gradient)
        else:
            advantage = explored - explored.mean(dim=1, keepdim=True) if explored.shape[1] > 1 else explored  # [B, M]
            estimate = (advantage[..., None, None] * perturbation).mean(dim=1) / sigma**2  # (8)
            updated = latents + config.lr * estimate  # (9)

        if config.accept_at == "candidate":
            reward, first = explored.max(dim=1)
            tried = State(candidates[torch.arange(len(first), device=first.device), first], patches)
        else:
            tried = State(updated, retrieval(attention, kept, budget, t) if looks else kept)
            reward = reward_of(updated[:, None], tried.patches, with_attention=False)[0][:, 0]  # (10)

        accepted = (reward > bar) & active
        steps.append(Step(reward, explored.mean(dim=1), sigma, accepted, active, budget, tried, attention))
        best = State(updated, tried.patches).where(accepted, best)
        scored = tried.where(accepted, scored)
        best_reward, bar = torch.where(accepted, reward, best_reward), torch.where(accepted, reward, bar)
        best_step = torch.where(accepted, t + 1, best_step)
        kept = tried.patches.where(accepted, kept)
        budget = torch.minimum(budget + config.patch_increment * accepted, retrieval.most)
        latents = torch.where(active[:, None, None], updated, latents)
        if config.reward_threshold > 0:
            active = active & (best_reward < config.reward_threshold)
            if not active.any():
                break
        sigma *= config.sigma_decay

    final = State(latents, kept) if config.disable_best_reward else best
    return Trace(start_reward, start_attention, best_reward, best_step, final, scored, steps)


class Retrieval:
    """Z_cand: which patches each think token of a batch may try, given attention, kept patches and budget."""

    def __init__(self, prefix: Prefix, config: Config):
        self.image_mask, self.growth = prefix.image_mask, config.patch_increment
        counts, length = prefix.image_mask.sum(dim=1), config.num_thought_tokens
        self.caps = caps_of(config, counts)  # [B, L]
        self.most = self.caps.amax(dim=1)  # [B], no budget grows beyond this
        self.widest = int(self.most.max())
        self.first = self.widest if config.initial_patch_count is None else config.initial_patch_count
        self.first_budget = self.most.clamp(max=self.first)  # [B], patches per think token
        self.nothing = Patches.none(len(counts), length, counts.device)

    def __call__(self, attention: torch.Tensor, kept: Patches, budget: torch.Tensor, t: int) -> Patches:
        """attention: [B, L, N]. The shapes in iteration t are known without looking at the rows."""
        width = min(self.widest, self.first + t * self.growth)
        return choose_patches(attention, self.image_mask, kept, budget, self.caps, width)


def ascend(adam: torch.optim.Adam, latents: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Latents after one Adam step up the exact gradient; element-wise, so rows stay independent."""
    (parameter,) = adam.param_groups[0]["params"]
    parameter.data.copy_(latents)
    parameter.grad = gradient
    adam.step()
    return parameter.detach().clone()
