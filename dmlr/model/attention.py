"""Attention of the language model, and of a vision tower on a GPU, under the names by which transformers finds them.

Who imports this imports transformers' models, which takes seconds: the rest of the package does so where one is loaded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dmlr.model.cache import AttentionProbe

ATTENTION = "dmlr"
WINDOWS = "dmlr_flash_windows"  # what has "flash" in its name is given all windows in one call


def attend(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, probe: AttentionProbe | None = None, **kw
):
    """Attention function of the language model, in transformers' interface.

    query: [B, H, S, d]; key, value: [B, H_kv, T, d]; attention_mask: in prefill bool [B, 1, S, T], True where a row may
    look (None: plain causal), else what `additive_mask` made of it. Queries that share a key head are stacked along S
    instead of repeating keys and values, which would copy the prefix at every step. The values are computed in one way
    whether or not a probe looks on, since rewards that are compared must not differ by how they were rounded.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, columns = key.shape[1], key.shape[2]
    if rows == columns:  # prefill: compute-bound, and the mask of the stacked form would be the largest tensor
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kw)
    if probe is not None:
        probe.add(query, key, scaling)
    stacked = query.reshape(batch, kv_heads, -1, dim)  # [B, H_kv, G S, d]
    out = F.scaled_dot_product_attention(stacked, key, value, attn_mask=attention_mask, scale=scaling)
    # a GPU's kernel returns it laid out as [B, G S, H_kv, d], a CPU's as it is: no view of the heads fits both
    out = out.unflatten(2, (-1, rows)).permute(0, 3, 1, 2, 4)  # [B, S, H_kv, G, d]
    return out.reshape(batch, rows, heads, dim), None


def attend_windows(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kw):
    """Attention function of a vision tower: each window (or image) sees itself, those of one length in one call.

    query, key, value: [1, H, S, d]; cu_seq_lens_q: [W + 1], where the windows begin and end. One by one, as
    transformers' own, 32 images of 1024 tokens in Qwen2.5-VL's windows of 16 are 57,000 calls.
    """
    heads, count, dim = query.shape[1:]
    ends, out = cu_seq_lens_q.cpu().long(), query.new_empty(count, heads, dim)
    lengths = ends.diff()
    for length in lengths.unique():
        rows = (ends[:-1][lengths == length][:, None] + torch.arange(length)).to(query.device)  # [W', w]
        parts = (x[0][:, rows].transpose(0, 1) for x in (query, key, value))  # [W', H, w, d]
        out[rows] = F.scaled_dot_product_attention(*parts, scale=scaling).transpose(1, 2)
    return out[None], None  # [1, S, H, d]


AttentionInterface.register(ATTENTION, attend)
AttentionInterface.register(WINDOWS, attend_windows)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
