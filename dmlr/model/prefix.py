"""A batch of prompts that went through the model once: what every continuation starts from.

Knows which columns are real and where the images are. Knows nothing about the model that made it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from dmlr.model.cache import KVCache


@dataclass
class Prefix:
    """`cache` holds the prompts, left-padded to P positions; the N image tokens are numbered as in `Encoded`."""

    cache: KVCache
    mask: torch.Tensor  # [B, committed], True where a position is real
    next_position: torch.Tensor  # [B], position of the first token after the prefix
    logits: torch.Tensor  # [B, V], float32, after the last committed position
    images: torch.Tensor  # [B, N, D], merged visual features, right-padded ([B, N, (1 + n) D] with n deep ones)
    image_mask: torch.Tensor  # [B, N]
    image_columns: torch.Tensor  # [B, N], their columns among the P
    suffix_ids: torch.Tensor  # [S], shared by the batch

    def select(self, rows: torch.Tensor) -> Prefix:
        """These rows [B'] of the batch only."""
        names = ("mask", "next_position", "logits", "images", "image_mask", "image_columns")
        return replace(self, cache=self.cache.select(rows), **{name: getattr(self, name)[rows] for name in names})

    def branch(self) -> Prefix:
        """A continuation that can be appended to and decoded, and leaves this prefix as it is."""
        return replace(self, cache=self.cache.branch())

    def room(self, columns: int, image_tokens: int, slots: int) -> Prefix:
        """An empty prefix for as many rows, with so many columns and image tokens and space for `slots` behind them."""
        batch, count, width = self.images.shape
        assert columns >= self.mask.shape[1] and image_tokens >= count
        return Prefix(
            cache=self.cache.room(columns, slots),
            mask=self.mask.new_zeros(batch, columns),
            next_position=torch.zeros_like(self.next_position),
            logits=self.logits.new_empty(batch, 0),  # nothing is decoded from here
            images=self.images.new_zeros(batch, image_tokens, width),
            image_mask=self.image_mask.new_zeros(batch, image_tokens),
            image_columns=self.image_columns.new_zeros(batch, image_tokens),
            suffix_ids=self.suffix_ids,
        )

    def copy_to(self, room: Prefix) -> None:
        """Writes this batch into `room`, padded there on the left as prompts are; nothing of `room` moves in memory."""
        columns, count = room.mask.shape[1] - self.mask.shape[1], room.images.shape[1] - self.images.shape[1]
        self.cache.copy_to(room.cache)
        room.mask.copy_(F.pad(self.mask, (columns, 0)))
        room.next_position.copy_(self.next_position)
        room.images.copy_(F.pad(self.images, (0, 0, 0, count)))
        room.image_mask.copy_(F.pad(self.image_mask, (0, count)))
        room.image_columns.copy_(F.pad(self.image_columns + columns, (0, count)))

    def compact(self) -> Prefix:
        """The same in as few columns as the longest row needs: empty ones leave, real ones close up to the right.

        Keys carry their positions with them, so attention over them is what it was.
        """
        width = int(self.mask.sum(dim=1).max())
        order = self.mask.long().argsort(dim=1, stable=True)  # [B, committed], real columns last, in their order
        columns, dropped = order[:, -width:], order.shape[1] - width
        ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
        moved = torch.empty_like(order).scatter_(1, order, ranks) - dropped  # where each column is now
        return replace(
            self,
            cache=self.cache.take(columns),
            mask=self.mask.gather(1, columns),
            image_columns=moved.gather(1, self.image_columns).clamp(min=0),
        )
