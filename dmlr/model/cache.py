"""The prefix: prompts that went through the model once, their keys and values, and attention over them.

Only think tokens and patches change between iterations, so the prefix's keys and values are stored once, with space
behind them. A forward writes its own keys and values there; `commit` makes them part of the cache (decoding), not
committing drops them (an iteration). Nothing of the prefix is ever copied.

Knows transformers' interface for caches. Knows nothing about the model that made a prefix, rewards or what is asked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, CacheLayerMixin


class PrefixLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, H_kv, capacity, d], of which the first `length` are committed.

    column: [1], where a forward of one position writes instead, wherever `length` is; it then gets the whole capacity
    back, and its mask says what to look at. So nothing moves or grows in memory from one token to the next.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.column: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """key_states, value_states: [B, H_kv, S, d]. Returns views of the committed ones followed by these."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return self.keys, self.values
        if key_states.requires_grad:  # writing in place would break the graph of the exact gradient
            return (
                torch.cat([self.keys[:, :, : self.length], key_states], dim=2),
                torch.cat([self.values[:, :, : self.length], value_states], dim=2),
            )
        if self.column is not None:
            self.keys.index_copy_(2, self.column, key_states)
            self.values.index_copy_(2, self.column, value_states)
            return self.keys, self.values
        end = self.length + key_states.shape[2]
        self.reserve(end)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reserve(self, capacity: int) -> None:
        """Make space for `capacity` positions; grows by half so that decoding copies rarely."""
        if self.is_initialized and capacity > self.keys.shape[2]:
            space = max(capacity, self.length + self.length // 2) - self.length
            self.keys = F.pad(self.keys[:, :, : self.length], (0, 0, 0, space))
            self.values = F.pad(self.values[:, :, : self.length], (0, 0, 0, space))

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1


class KVCache(Cache):
    """One PrefixLayer per layer of the language model."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=PrefixLayer)

    @property
    def length(self) -> int:
        """Committed positions."""
        return self.get_seq_length()

    def commit(self, count: int) -> None:
        """Keep the `count` positions that the last forward wrote."""
        for layer in self.layers:
            layer.length += count

    def branch(self) -> KVCache:
        """A cache that continues from here. It shares the storage: be done with it before the original goes on."""
        return self._with(lambda x: x)

    def select(self, rows: torch.Tensor) -> KVCache:
        """A cache of these rows [B'] of the batch only."""
        return self._with(lambda x: x[rows.to(x.device)])  # layers may lie on several devices

    def buffer(self, columns: int, slots: int) -> KVCache:
        """A cache for as many rows: `columns` committed, of zeros, and space for `slots` more."""
        return self._with(lambda x: x.new_zeros(*x.shape[:2], columns + slots, x.shape[3]), columns)

    def copy_to(self, buffer: KVCache) -> None:
        """Writes its committed columns into the last of the buffer's, which stays where it is in memory."""
        for mine, theirs in zip(self.layers, buffer.layers, strict=True):
            begin, end = theirs.length - mine.length, theirs.length
            for left in (theirs.keys, theirs.values):
                left.zero_()  # by an earlier batch: what nobody looks at must be a number all the same
            theirs.keys[:, :, begin:end] = mine.keys[:, :, : mine.length]
            theirs.values[:, :, begin:end] = mine.values[:, :, : mine.length]

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor], length: int | None = None) -> KVCache:
        """A cache of what `change` makes of every layer's keys and values."""
        twin = KVCache()
        twin.layers = [copy.copy(layer) for layer in self.layers]
        for layer in twin.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)
            layer.length = layer.length if length is None else length
        return twin


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
        return replace(self, cache=self.cache.select(rows), **{name: getattr(self, name)[rows] for name in names})

    def branch(self) -> Prefix:
        """A continuation that can be appended to and decoded, and leaves this prefix as it is."""
        return replace(self, cache=self.cache.branch())

    def buffer(self, columns: int, image_tokens: int, slots: int) -> Prefix:
        """An empty prefix for as many rows, with so many columns and image tokens, and space for `slots` behind."""
        batch, count, width = self.images.shape
        assert columns >= self.mask.shape[1] and image_tokens >= count
        return Prefix(
            cache=self.cache.buffer(columns, slots),
            mask=self.mask.new_zeros(batch, columns),
            next_position=torch.zeros_like(self.next_position),
            logits=self.logits.new_empty(batch, 0),
            images=self.images.new_zeros(batch, image_tokens, width),
            image_states=self.image_states[:, :0],
            image_mask=self.image_mask.new_zeros(batch, image_tokens),
            image_columns=self.image_columns.new_zeros(batch, image_tokens),
            prompt_ids=self.prompt_ids[:, :0],
            suffix_ids=self.suffix_ids,
        )

    def copy_to(self, buffer: Prefix) -> None:
        """Writes this batch into the buffer, padded on the left as prompts are; the buffer stays where it is."""
        columns, count = buffer.mask.shape[1] - self.mask.shape[1], buffer.images.shape[1] - self.images.shape[1]
        self.cache.copy_to(buffer.cache)
        buffer.mask.copy_(F.pad(self.mask, (columns, 0)))
        buffer.next_position.copy_(self.next_position)
        buffer.images.copy_(F.pad(self.images, (0, 0, 0, count)))
        buffer.image_mask.copy_(F.pad(self.image_mask, (0, count)))
        buffer.image_columns.copy_(F.pad(self.image_columns + columns, (0, count)))


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


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision is widened for softmax and entropy; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
