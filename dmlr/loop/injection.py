"""Attention to chosen patches, and where they go: pure functions on index tensors.

A think token and its patches form a *group* of `1 + K` slots: the think token, then up to K patches. Rows of a batch
keep different numbers of patches, so slots behind `count` are empty; an empty slot is never attended to and takes no
position, which makes the padded layout exactly the sequence `tau_1, patches(1), tau_2, patches(2), ...`.

Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dmlr.config import Config


@dataclass(frozen=True)
class Patches:
    """Chosen patches: `index` [B, L, K] are image tokens (row-major), of which the first `count` [B, L] are valid."""

    index: torch.Tensor
    count: torch.Tensor

    @classmethod
    def none(cls, batch: int, num_thought_tokens: int, device: torch.device) -> Patches:
        return cls.of([[[]] * num_thought_tokens] * batch, device)

    @classmethod
    def of(cls, kept: Sequence[Sequence[Sequence[int]]], device: torch.device) -> Patches:
        """From lists per example and think token, as `tolist` gives them."""
        width = max((len(row) for rows in kept for row in rows), default=0)
        index = [[[*row, *[0] * (width - len(row))] for row in rows] for rows in kept]
        count = [[len(row) for row in rows] for rows in kept]
        return cls(
            torch.tensor(index, dtype=torch.long, device=device).view(len(kept), len(kept[0]), width),
            torch.tensor(count, dtype=torch.long, device=device),
        )

    def where(self, condition: torch.Tensor, other: Patches) -> Patches:
        """Rows of self where `condition` [B] holds, of `other` elsewhere."""
        width = max(self.index.shape[2], other.index.shape[2])
        mine, theirs = (F.pad(each.index, (0, width - each.index.shape[2])) for each in (self, other))
        rows = condition[:, None]
        return Patches(torch.where(rows[..., None], mine, theirs), torch.where(rows, self.count, other.count))

    def trimmed(self) -> Patches:
        """Without the slots that no row fills. On a CPU only: looking at the counts would make a GPU wait."""
        if self.count.device.type != "cpu":
            return self
        return Patches(self.index[:, :, : int(self.count.max())], self.count)

    def tolist(self) -> list[list[list[int]]]:
        """Per example and think token, the image tokens in the order in which they are interleaved."""
        rows = zip(self.index.tolist(), self.count.tolist(), strict=True)
        return [[idx[:n] for idx, n in zip(indices, counts, strict=True)] for indices, counts in rows]


def caps_of(config: Config, num_patches: torch.Tensor) -> torch.Tensor:
    """Most patches that each think token may keep, [B, L], of examples with so many image tokens [B].

    The think tokens 0, stride, 2 stride, ... inject. `max_total_patches` is shared evenly among them; what is left over
    goes to the first ones.
    """
    length, stride = config.num_thought_tokens, config.visual_insert_stride
    place = torch.arange(length, device=num_patches.device)
    caps = num_patches[:, None] * (place % stride == 0)
    if config.num_selected_patches is not None:
        caps = caps.clamp(max=config.num_selected_patches)
    if config.max_total_patches is not None:
        share, rest = divmod(config.max_total_patches, -(-length // stride))
        caps = torch.minimum(caps, share + (place // stride < rest).long())
    return caps


class Retrieval:
    """Z_cand of Algorithm 1: which patches each think token of a batch may try."""

    def __init__(self, image_mask: torch.Tensor, config: Config):
        """image_mask: [B, N]. `initial_patch_count` none is every patch, 0 is none (in the released code 0 is all)."""
        self.image_mask, self.growth = image_mask, config.patch_increment
        counts = image_mask.sum(dim=1)
        self.caps = caps_of(config, counts)  # [B, L]
        self.most = self.caps.amax(dim=1)  # [B], no budget grows beyond this
        self.widest = int(self.most.max())
        self.first = self.widest if config.initial_patch_count is None else config.initial_patch_count
        self.first_budget = self.most.clamp(max=self.first)  # [B], patches per think token
        self.nothing = Patches.none(len(counts), config.num_thought_tokens, counts.device)

    def __call__(self, attention: torch.Tensor, kept: Patches, budget: torch.Tensor, t: int = 0) -> Patches:
        """The kept patches first, then the most attended ones, up to the budget; ties go to the lower index.

        attention: [B, L, N] of each think token over image tokens; budget: [B] patches per think token. The shapes in
        iteration t are known without looking at the rows.
        """
        width = min(self.widest, self.first + t * self.growth, attention.shape[2])
        score = attention.masked_fill(~self.image_mask[:, None], -1.0)
        slot = torch.arange(kept.index.shape[2], device=attention.device)
        priority = torch.where(slot < kept.count[..., None], 2.0 + slot.flip(0), 0.0)  # attention is at most one
        score = score.scatter_reduce(2, kept.index, priority.to(score.dtype), reduce="amax")
        index = score.sort(dim=2, descending=True, stable=True).indices[:, :, :width]
        return Patches(index, torch.maximum(torch.minimum(budget[:, None], self.caps), kept.count).clamp(max=width))


def interleave(latents: torch.Tensor, images: torch.Tensor, patches: Patches) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of think token and patches as one sequence of slots.

    latents: [B, M, L, D], M samples that share the patches; images: [B, N, D'], the merged visual features, D' = D or,
    with n deep levels beside them, (1 + n) D, of which a think token has none. Returns embeddings
    [B, M, L * (1 + K), D'] and the mask of filled slots [B, L * (1 + K)].
    """
    batch, samples, length, _ = latents.shape
    width, dim = patches.index.shape[2], images.shape[2]
    index = patches.index.reshape(batch, length * width, 1).expand(-1, -1, dim)
    features = images.gather(1, index).view(batch, 1, length, width, dim).to(latents.dtype)
    latents = F.pad(latents, (0, dim - latents.shape[3]))
    slots = torch.cat([latents[:, :, :, None], features.expand(-1, samples, -1, -1, -1)], dim=3)  # [B, M, L, 1 + K, D]
    filled = torch.arange(1 + width, device=latents.device) <= patches.count[..., None]  # [B, L, 1 + K]
    return slots.flatten(2, 3), filled.flatten(1, 2)


def reward_slots(patches: Patches, position: str, tail: int = 0) -> torch.Tensor:
    """Slots at which the reward reads its logits, [B, R]; `tail` text tokens follow the last group.

    `think`: the think tokens; `think_next`: also the first token after the last group; `group_end`: each group's last
    patch (its think token where it has none); `answer`: the last token before the answer.
    """
    batch, length = patches.count.shape
    size = 1 + patches.index.shape[2]
    starts = torch.arange(length, device=patches.count.device).mul(size).expand(batch, length)
    if position == "think":
        return starts
    if position == "group_end":
        return starts + patches.count
    if position == "answer":
        return starts.new_full((batch, 1), length * size + tail - 1)
    assert position == "think_next", position
    return torch.cat([starts, starts.new_full((batch, 1), length * size)], dim=1)
