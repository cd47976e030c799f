"""The prefix: prompts that went through the model once, their keys and values, and attention over them.

Only think tokens and patches change between iterations, so the prefix's keys and values are stored once, with space
behind them. A forward writes its own keys and values there; a greater `length` makes them part of the cache (decoding),
the same one drops them (an iteration). Nothing of the prefix is ever copied.

Knows transformers' interface for caches. Knows nothing about the model that made a prefix, rewards or what is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

Pair = tuple[torch.Tensor, ...]  # keys and values of one layer


class KVCache(Cache):
    """Of each layer keys and values, both [B, H_kv, capacity, d], of which the first `length` are committed.

    column: [1], where a forward of one position writes instead, wherever `length` is; it then gets the whole capacity
    back, and its mask says what to look at. So nothing moves or grows in memory from one token to the next.
    """

    def __init__(self, stored: Iterable[Pair] = (), length: int = 0) -> None:
        super().__init__(layers=[])
        self.stored, self.length = list(stored), length
        self.column: torch.Tensor | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs) -> Pair:
        """key_states, value_states: [B, H_kv, S, d]. Returns views of the committed ones followed by these."""
        new = key_states, value_states
        if layer_idx == len(self.stored):
            self.stored.append(new)
            return new
        pair = self.stored[layer_idx]
        if key_states.requires_grad:  # writing in place would break the graph of the exact gradient
            return tuple(torch.cat([old[:, :, : self.length], x], dim=2) for old, x in zip(pair, new, strict=True))
        if self.column is not None:
            for old, x in zip(pair, new, strict=True):
                old.index_copy_(2, self.column, x)
            return pair
        end = self.length + key_states.shape[2]
        if end > pair[0].shape[2]:  # grows by half so that decoding copies rarely
            space = max(end, self.length + self.length // 2) - self.length
            pair = self.stored[layer_idx] = tuple(F.pad(old[:, :, : self.length], (0, 0, 0, space)) for old in pair)
        for old, x in zip(pair, new, strict=True):
            old[:, :, self.length : end] = x
        return tuple(old[:, :, :end] for old in pair)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for pair in self.stored for x in pair)

    def each(self, change: Callable[[torch.Tensor], torch.Tensor], length: int | None = None) -> KVCache:
        """A cache of what `change` makes of all keys and values, of which `length` are committed (as many as here)."""
        return KVCache([tuple(map(change, pair)) for pair in self.stored], self.length if length is None else length)


@dataclass
class Prefix:
    """`cache` holds the prompts, left-padded to P positions; the N image tokens are numbered as in `vlm.Encoded`."""

    cache: KVCache
    mask: torch.Tensor  # [B, committed], True where a position is real
    next_position: torch.Tensor  # [B], position of the first token after the prefix
    logits: torch.Tensor  # [B, V], float32, after the last committed position
    images: torch.Tensor  # [B, N, D], merged visual features, right-padded ([B, N, (1 + n) D] with n deep ones)
    image_states: torch.Tensor  # [B, N, D], what the last layer made of the image tokens
    image_mask: torch.Tensor  # [B, N]
    image_columns: torch.Tensor  # [B, N], their columns among the P
    prompt_ids: torch.Tensor  # [B, P + S], whole prompts, suffix included; left-padded by a row's own first token
    suffix_ids: torch.Tensor  # [S], shared by the batch

    def select(self, rows: torch.Tensor) -> Prefix:
        """These rows [B'] of the batch only."""
        names = [each.name for each in fields(self) if each.name not in ("cache", "suffix_ids")]
        cache = self.cache.each(lambda x: x[rows.to(x.device)])  # layers may lie on several devices
        return replace(self, cache=cache, **{name: getattr(self, name)[rows] for name in names})

    def branch(self) -> Prefix:
        """A continuation that can be appended to and decoded, and leaves this prefix as it is.

        It shares the storage: be done with it before this prefix goes on.
        """
        return replace(self, cache=self.cache.each(lambda x: x))

    def padded(self, columns: int, image_tokens: int) -> dict[str, torch.Tensor]:
        """What a buffer of so many columns (padded on the left as prompts are) and image tokens has beside a cache."""
        left, right = columns - self.mask.shape[1], image_tokens - self.images.shape[1]
        return {
            "mask": F.pad(self.mask, (left, 0)),
            "next_position": self.next_position,
            "images": F.pad(self.images, (0, 0, 0, right)),
            "image_mask": F.pad(self.image_mask, (0, right)),
            "image_columns": F.pad(self.image_columns + left, (0, right)),
        }

    def buffer(self, columns: int, image_tokens: int, slots: int) -> Prefix:
        """An empty prefix for as many rows, with so many columns and image tokens, and space for `slots` behind."""
        cache = self.cache.each(lambda x: x.new_zeros(*x.shape[:2], columns + slots, x.shape[3]), columns)
        empty = {name: torch.zeros_like(x) for name, x in self.padded(columns, image_tokens).items()}
        unused = {name: getattr(self, name).new_empty(0) for name in ("logits", "image_states", "prompt_ids")}
        return replace(self, cache=cache, **empty, **unused)

    def copy_to(self, buffer: Prefix) -> None:
        """Writes this batch into the buffer, which stays where it is."""
        length, end = self.cache.length, buffer.cache.length
        for mine, theirs in zip(self.cache.stored, buffer.cache.stored, strict=True):
            for new, left in zip(mine, theirs, strict=True):
                left.zero_()  # by an earlier batch: what nobody looks at must be a number all the same
                left[:, :, end - length : end] = new[:, :, :length]
        for name, tensor in self.padded(buffer.mask.shape[1], buffer.images.shape[1]).items():
            getattr(buffer, name).copy_(tensor)


class AttentionProbe:
    """Collects the attention of some query rows in one forward: the sum over its layers of the mean over heads.

    rows: [A] of the S query rows; mask: [B, A, T] bool, where they may look; total: [B, A, T], zeros at first, float32.
    What it computes is beside the forward, whose values are the same with and without a probe.
    """

    def __init__(self, rows: torch.Tensor, mask: torch.Tensor, group: int, dtype: torch.dtype) -> None:
        self.rows, self.mask = rows, additive_mask(mask, group, dtype)
        self.total = torch.zeros(mask.shape, dtype=dtype, device=mask.device)

    @torch.no_grad()
    def add(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """query: [B, H, S, d]; key: [B, H_kv, T, d] of one layer."""
        batch, kv_heads, columns, dim = key.shape
        asked = query.index_select(2, self.rows.to(query.device)) * scaling  # before the product: float16 overflows
        scores = asked.reshape(batch, kv_heads, -1, dim) @ key.transpose(2, 3)  # [B, H_kv, G A, T]
        weights = (scores + self.mask.to(scores.device)).softmax(dim=-1)
        self.total += weights.view(batch, -1, len(self.rows), columns).mean(dim=1).to(self.total.device)


def additive_mask(mask: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, G S, T] for `attend`, once for all layers: zero where `mask` [B, S, T] allows, the least number elsewhere.

    group: G, queries that share a key head. dtype: the queries' own for SDPA, float32 for a probe. Rows begin at
    multiples of 8 numbers in memory: other masks a GPU's kernel has copied in every layer.
    """
    *rows, columns = mask.shape
    least = torch.zeros(*rows, columns + -columns % 8, dtype=dtype, device=mask.device)
    least[..., :columns].masked_fill_(~mask, torch.finfo(dtype).min)
    return least.repeat(1, group, 1)[:, None, :, :columns]
