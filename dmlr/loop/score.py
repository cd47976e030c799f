"""Reward of latents with their patches: one pass of a few slots over the cached prefix, for a whole batch.

Knows nothing about how latents and patches are chosen, or what the loop does with a reward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dmlr.config import Config
from dmlr.loop.injection import Patches, caps_of, interleave, reward_slots
from dmlr.loop.rewards import REWARDS, parse_score
from dmlr.model.cache import Prefix
from dmlr.model.decode import decode
from dmlr.model.vlm import VLM


class Scored(NamedTuple):
    """What a pass tells of M samples: their rewards, where the think tokens look (mean over samples), and the reward's
    gradient in the latents (of a single sample). None for what was not asked."""

    reward: torch.Tensor  # [B, M]
    attention: torch.Tensor | None  # [B, L, N]
    gradient: torch.Tensor | None  # [B, L, D]


# latents [B, M, L, D], patches, with_attention=True, with_gradient=False
Score = Callable[..., Scored]
# The same without a gradient: latents, patches, with_attention -> reward [B, M], attention [B, L, N] or None
Reward = Callable[[torch.Tensor, Patches, bool], tuple[torch.Tensor, torch.Tensor | None]]


def differentiable(reward_of: Reward) -> Score:
    """A reward with, where asked, its gradient in the latents of a single sample."""

    def score(
        latents: torch.Tensor, patches: Patches, with_attention: bool = True, with_gradient: bool = False
    ) -> Scored:
        with torch.set_grad_enabled(with_gradient):
            latents = latents.detach().requires_grad_(with_gradient)
            reward, attention = reward_of(latents, patches, with_attention)
            gradient = torch.autograd.grad(reward.sum(), latents)[0][:, 0] if with_gradient else None
        return Scored(reward.detach(), attention, gradient)

    return score


def confidence(
    vlm: VLM, prefix: Prefix, config: Config, latents: torch.Tensor, patches: Patches, with_attention: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One pass of M times [T, patches] over the cached [Q, Z]: reward [B, M], and attention [B, L, N] where asked.

    latents: [B, M, L, D]; where the reward is read follows `reward_position`. Every reward is computed in this way,
    whatever else is wanted of the pass, so that equal states of equal shapes have equal rewards to the last bit, in
    half precision too.
    """
    _, samples, length, _ = latents.shape
    tail = prefix.suffix_ids[: {"think_next": 1, "answer": None}.get(config.reward_position, 0)]
    embeds, filled = slots_of(vlm, prefix, latents, patches, tail)
    if config.reward_position == "think":  # nothing that is read can see the patches of the last group
        used = 1 + (length - 1) * (1 + patches.index.shape[2])
        embeds, filled = embeds[:, :, :used], filled[:, :used]
    starts = embeds.shape[2] * torch.arange(samples, device=embeds.device)[:, None]  # [M, 1], first slots
    read = reward_slots(patches, config.reward_position, len(tail))  # [B, R]
    think = torch.arange(length, device=embeds.device) * (1 + patches.index.shape[2])  # [L]
    logits, attention = vlm.extend(
        prefix,
        embeds.flatten(1, 2),
        filled.repeat(1, samples),
        read=(starts + read[:, None]).flatten(1),
        probe_rows=(starts + think).flatten() if with_attention else None,
        samples=samples,
    )
    if attention is not None:
        attention = attention.unflatten(1, (samples, length)).mean(dim=1)
    return REWARDS[config.reward](logits.unflatten(1, (samples, -1)), config.top_k), attention


def self_score(
    vlm: VLM, prefix: Prefix, latents: torch.Tensor, patches: Patches, score_ids: torch.Tensor
) -> torch.Tensor:
    """[B]: the model's own 0-1 score of its latents [B, L, D], decoded after a request for it; 0 without a number."""
    branch = prefix.branch()
    append_latents(vlm, branch, latents, patches, score_ids)
    scores = [parse_score(reply.text) for reply in decode(vlm, branch, max_new_tokens=8)]
    return torch.tensor(scores, device=latents.device).nan_to_num(nan=0.0)


def append_latents(
    vlm: VLM, prefix: Prefix, latents: torch.Tensor, patches: Patches, ids: torch.Tensor | None = None
) -> None:
    """Puts think tokens [B, L, D], their patches and text behind the prompt (none: the assistant prefix); decoding
    comes next."""
    embeds, filled = slots_of(vlm, prefix, latents[:, None], patches, prefix.suffix_ids if ids is None else ids)
    vlm.append(prefix, embeds[:, 0], filled)


def slots_of(
    vlm: VLM, prefix: Prefix, latents: torch.Tensor, patches: Patches, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Think tokens [B, M, L, D] with patches, followed by text tokens, `ids` [B, A] or [A] in every row: embeddings
    [B, M, S, D] and the mask of filled slots [B, S]."""
    embeds, filled = interleave(latents, prefix.images, patches)
    text = vlm.embed(ids.expand(len(embeds), -1)).to(embeds.dtype)[:, None].expand(-1, embeds.shape[1], -1, -1)
    text = F.pad(text, (0, embeds.shape[3] - text.shape[3]))
    return torch.cat([embeds, text], dim=2), F.pad(filled, (0, ids.shape[-1]), value=True)


def scorer(vlm: VLM, prefix: Prefix, config: Config, score_ids: torch.Tensor | None = None) -> Score:
    """The run's reward of this batch: `confidence`, or with `disable_conf_reward` the model's own score, asked for by
    `score_ids`. With `cuda_graphs` on a GPU confidence is computed by kernels recorded once (model/graphs.py)."""

    def plain(latents: torch.Tensor, patches: Patches, with_attention: bool):
        patches = patches.trimmed()
        reward, attention = confidence(vlm, prefix, config, latents, patches, with_attention)
        if config.disable_conf_reward:
            said = [self_score(vlm, prefix, sample, patches, score_ids) for sample in latents.unbind(1)]
            reward = torch.stack(said, dim=1)
        return reward, attention

    if not (config.cuda_graphs and vlm.on_one_gpu) or config.use_auto_grad or config.disable_conf_reward:
        return differentiable(plain)
    images = prefix.images.shape[1]
    widest = int(caps_of(config, torch.tensor([images])).max())
    slots = config.evaluations * (config.num_thought_tokens * (1 + widest) + len(prefix.suffix_ids))
    recorded = vlm.recordings.over(prefix, slots, (config.reward, config.reward_position, config.top_k))

    def of_tensors(latents, index, count, with_attention):
        return confidence(vlm, recorded.buffer, config, latents, Patches(index, count), with_attention)

    def replayed(latents: torch.Tensor, patches: Patches, with_attention: bool):
        width = patches.index.shape[2]
        width = min(widest, 1 << (width - 1).bit_length()) - width if width else 0  # few widths, few recordings
        index = F.pad(patches.index, (0, width))
        reward, attention = recorded(of_tensors, latents, index, patches.count, with_attention=with_attention)
        return reward, None if attention is None else attention[..., :images]

    return differentiable(replayed)
