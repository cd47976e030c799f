"""Attention over packed training sequences, as matrix products of the size of a branch instead of a scene.

Dense attention with a mask computes every pair of positions of a scene and throws most away; on a CPU that was two
thirds of a training step. Here the prefix attends to itself, and each branch to the prefix and to itself.

Knows transformers' interface for attention functions, and nothing about what the branches mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

TREE = "tree"  # the name under which transformers finds `_attend`


@dataclass(frozen=True)
class Tree:
    """Which slots of a packed batch make up each branch; lengths are rounded up so that few shapes occur.

    Branches of a scene are sorted by length into groups, so that short ones are not padded to the longest.
    """

    prefix: torch.Tensor  # [B, P], True for slots of the prefix
    shapes: tuple[tuple[int, int], ...]  # (branches k, slots M) of each group
    slots: torch.Tensor  # [R], which of the B * S slots each padded row of the groups is
    rows: torch.Tensor  # [B * S], the row of each slot; R, a row of zeros, for those in no branch

    def to(self, device: torch.device) -> Tree:
        moved = (x.to(device) for x in (self.prefix, self.slots, self.rows))
        return Tree(next(moved), self.shapes, *moved)

    @classmethod
    def of(cls, branch: torch.Tensor, parts: int = 2) -> Tree:
        """branch: [B, S] on the CPU, 0 for the prefix, -1 for padding, else the branch's number from 1."""
        count, length = branch.shape
        sizes = torch.stack([(branch == n).sum(1) for n in range(int(branch.max()) + 1)])  # [1 + K, B]
        starts = sizes.cumsum(0) - sizes
        order = sizes[1:].argsort(dim=0) + 1  # [K, B]
        width = min(_rounded(int(sizes[0].max())), length)
        shapes, slots, real = [], [], []
        for part in order.chunk(parts):
            size, start = sizes.gather(0, part).T[..., None], starts.gather(0, part).T[..., None]  # [B, k, 1]
            offset = torch.arange(_rounded(int(size.max())))
            scene = torch.arange(count)[:, None, None] * length
            slots.append((scene + start + torch.minimum(offset, size - 1)).flatten())
            real.append((offset < size).flatten())
            shapes.append((len(part), len(offset)))
        flat, real = torch.cat(slots), torch.cat(real)
        rows = torch.full((count * length,), len(flat))
        rows[flat[real]] = real.nonzero()[:, 0]
        return cls(torch.arange(width) < sizes[0][:, None], tuple(shapes), flat, rows)


def _rounded(size: int, to: int = 16) -> int:
    return -(-size // to) * to


class _Take(torch.autograd.Function):
    """Rows `index` of x; row n of x came to be row `back[n]` (one past the last: nowhere, or only as padding)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, index: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (back,) = ctx.saved_tensors
        return F.pad(grad, (0, 0, 0, 1)).index_select(0, back), None, None


class _Put(torch.autograd.Function):
    """The inverse of _Take: slots from rows, zeros for slots in no branch; padded rows get no gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, index: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index, back)
        return F.pad(x, (0, 0, 0, 1)).index_select(0, back)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        index, back = ctx.saved_tensors
        real = back[index] == torch.arange(len(index), device=index.device)
        return grad.index_select(0, index) * real[:, None].to(grad.dtype), None, None


def tree_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, tree: Tree):
    """Causal attention over the prefix and the own branch: query [B, H, S, d], key and value [B, H_kv, S, d].

    The same as dense attention with `Batch.mask()`, in matrix products of the size of a branch instead of a scene.
    Returns [B, S, H, d].
    """
    batch, heads, length, dim = query.shape
    width = tree.prefix.shape[1]
    query = query * scaling
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    first_key, first_value = key[:, :, :width].mT.contiguous(), value[:, :, :width].contiguous()
    hidden = torch.zeros_like(tree.prefix, dtype=query.dtype).masked_fill(~tree.prefix, -1e4)[:, None, None]
    scores = query[:, :, :width] @ first_key + _causal(width, query)
    first = (scores.softmax(dim=-1) @ first_value).transpose(1, 2) * tree.prefix[..., None, None].to(query.dtype)
    flat = [x.transpose(1, 2).reshape(batch * length, -1) for x in (query, key, value)]
    flat = [_Take.apply(x, tree.slots, tree.rows) for x in flat]
    sizes = [batch * k * room for k, room in tree.shapes]
    outputs = []
    for (branches, room), q, k, v in zip(tree.shapes, *(x.split(sizes) for x in flat), strict=True):
        q, k, v = (x.view(batch, branches * room, heads, dim).transpose(1, 2).contiguous() for x in (q, k, v))
        own_q, own_k, own_v = (x.view(batch, heads, branches, room, dim) for x in (q, k, v))
        to_prefix = (q @ first_key + hidden).view(batch, heads, branches, room, width)
        to_own = own_q @ own_k.mT + _causal(room, query)
        weights = torch.cat([to_prefix, to_own], dim=-1).softmax(dim=-1)
        out = weights[..., :width].flatten(2, 3) @ first_value + (weights[..., width:] @ own_v).flatten(2, 3)
        outputs.append(out.transpose(1, 2).reshape(-1, heads * dim))
    rest = _Put.apply(torch.cat(outputs), tree.slots, tree.rows).view(batch, length, heads, dim)
    return rest + F.pad(first, (0, 0, 0, 0, 0, length - width))


def _causal(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((size, size), -1e4, dtype=like.dtype, device=like.device).triu(1)


def _attend(module, query, key, value, attention_mask, scaling=None, tree: Tree | None = None, **kw):
    """`tree_attention` as transformers' attention function."""
    with torch.autocast(query.device.type, enabled=False):
        dtype = value.dtype
        return tree_attention(query.to(dtype), key.to(dtype), value, scaling, tree), None


AttentionInterface.register(TREE, _attend)
AttentionMaskInterface.register(TREE, lambda *args, **kwargs: None)  # the tree is the mask
