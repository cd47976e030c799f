"""Decoding a batch from its prefix, token by token. Knows nothing about how a token goes through the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import NoBadWordsLogitsProcessor

from dmlr.model.prefix import Prefix

if TYPE_CHECKING:
    from dmlr.model.vlm import VLM

LOOK_EVERY = defaultdict(lambda: 16, cpu=1)  # decoding steps between looks at which rows are finished

# logits [B, V], which rows of the batch they are, how many tokens came before -> next tokens [B]
Pick = Callable[[torch.Tensor, list[int], int], torch.Tensor]
# prefix, a token [B] for each row, which rows of the batch they are -> the prefix with them
Feed = Callable[[Prefix, torch.Tensor, list[int]], Prefix]


@dataclass(frozen=True)
class Decoded:
    """Text of one answer, its tokens (the one that ended it included) and why it ended: `eos_token` or `length`."""

    text: str
    stop_reason: str
    ids: list[int]

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


def greedy(logits: torch.Tensor, rows: list[int], step: int) -> torch.Tensor:
    """The most probable token."""
    return logits.argmax(dim=-1)


@torch.no_grad()
def decode(
    vlm: VLM,
    prefix: Prefix,
    max_new_tokens: int,
    banned: tuple[str, ...] = (),
    pick: Pick = greedy,
    feed: Feed | None = None,
    reserve: int = 0,
) -> list[Decoded]:
    """Decoding from `prefix.logits` until end of turn, `max_new_tokens` or the end of the context.

    `pick` chooses each next token, `feed` gives it to the model (and may insert more behind it, for which
    `reserve` positions of the context are left free); both are told which rows of the batch they see, since
    finished rows leave it. The checkpoint's own sampling settings (temperature, repetition penalty) are not
    applied. The prefix is used up.
    """
    ban, feed = _ban(vlm, banned), feed or vlm.feed
    eos = torch.tensor(vlm.eos_ids, device=vlm.device)
    room = vlm.context_length - reserve - prefix.mask.sum(dim=1)
    limit = room.clamp(1, max_new_tokens)  # [B], each row's own
    tokens = torch.zeros(len(limit), 0, dtype=torch.long, device=vlm.device)
    finished = torch.zeros_like(limit, dtype=torch.bool)
    rows, limits, said = list(range(len(limit))), limit.tolist(), {}  # rows still in the batch; what others said
    last = max(limits)
    for step in range(1, last + 1):
        if step > 1:
            prefix = feed(prefix, tokens[:, -1], rows)
        logits = ban(tokens, prefix.logits) if ban else prefix.logits
        token = pick(logits, rows, step - 1)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        finished = finished | torch.isin(token, eos) | (limit == step)
        if step % LOOK_EVERY[vlm.device.type] and step < last:
            continue  # looking at `finished` makes a GPU wait
        over = finished.tolist()
        if 2 * sum(over) >= len(over):  # finished rows leave, half a batch at a time
            said |= {rows[i]: tokens[i].tolist() for i, done in enumerate(over) if done}
            rows = [row for row, done in zip(rows, over, strict=True) if not done]
            if not rows:
                break
            stay = (~finished).nonzero()[:, 0]
            prefix, tokens, limit, finished = prefix.select(stay), tokens[stay], limit[stay], finished[stay]
    return [_decoded(vlm, said[row][:end]) for row, end in enumerate(limits)]


def _ban(vlm: VLM, banned: tuple[str, ...]) -> NoBadWordsLogitsProcessor | None:
    """Forbids the strings at the start of a text and within it (tokenizers differ on the leading space)."""
    spelled = [vlm.tokenizer.encode(lead + word, add_special_tokens=False) for word in banned for lead in ("", " ")]
    return NoBadWordsLogitsProcessor(spelled, eos_token_id=vlm.eos_ids) if spelled else None


def _decoded(vlm: VLM, ids: list[int]) -> Decoded:
    end = next((i for i, token in enumerate(ids) if token in vlm.eos_ids), None)
    text = vlm.tokenizer.decode(ids[:end], skip_special_tokens=True)
    return Decoded(text, "length" if end is None else "eos_token", ids if end is None else ids[: end + 1])
