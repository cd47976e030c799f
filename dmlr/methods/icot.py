"""ICoT: image patches inserted into the chain of thought while it is written.

Gao et al., *Interleaved-Modal Chain-of-Thought*, arXiv 2411.19488: attention-driven selection at line breaks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dmlr.config import Config
from dmlr.loop.injection import Patches
from dmlr.loop.score import slots_of
from dmlr.methods.answers import Answer, Clock, Question, answers_of
from dmlr.methods.latent import with_notes
from dmlr.methods.prompting import decode, prefill_task, prompts_of
from dmlr.model.cache import Prefix
from dmlr.model.vlm import VLM


def icot(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """Vanilla's prompt, greedy; at every `icot_newlines`-th newline the `icot_patches` most attended patches are
    inserted, at most `icot_insertions` times.

    As the DMLR paper ran it: what counts is the attention of the newline itself over the image tokens, mean over all
    layers and heads; the patches stand in image order between vision start and end tokens.

    Uncertain, and chosen here: newlines are counted as characters of the generated tokens (a token that brings several
    is followed by one insertion at most); a patch may be inserted again; inserted patches take text positions, as
    DMLR's do; inserted tokens do not count against `max_new_tokens`; and the prompt holds no interleaved example,
    which the original's one-shot setting has.

    Details: `insertions`, each with the number of tokens said before it and the patches. A question without an image
    is answered as by vanilla.
    """
    clock = Clock(vlm.device)
    prefix, encoded = prefill_task(vlm, questions, config, prompts_of(config))
    clock.lap("prefill")
    feed = InsertAtNewlines(vlm, config, len(questions))
    decoded = decode(vlm, prefix, config, feed=feed, reserve=config.icot_insertions * (config.icot_patches + 2))
    answers = answers_of(encoded, decoded, clock)
    for answer, insertions in zip(answers, feed.insertions, strict=True):
        # finished rows may stay in the batch for a while; what was inserted then is not part of the answer
        said = answer.num_new_tokens
        answer.details["insertions"] = [each for each in insertions if each["after_tokens"] < said]
    return with_notes(answers, questions)


class InsertAtNewlines:
    """A `Feed` for `VLM.decode`: gives a token to the model, and patches behind it where a newline calls for them.

    `insertions` are those of each row of the batch, in order.
    """

    def __init__(self, vlm: VLM, config: Config, batch: int):
        self.vlm, self.config = vlm, config
        self.said, self.newlines = [0] * batch, [0] * batch
        self.insertions: list[list[dict]] = [[] for _ in range(batch)]

    def __call__(self, prefix: Prefix, token: torch.Tensor, rows: list[int]) -> Prefix:
        """token: [B]. Looks at every token, so a GPU waits at each step."""
        vlm, device = self.vlm, token.device
        first = torch.zeros(len(rows), 1, dtype=torch.long, device=device)
        filled = torch.ones_like(first, dtype=torch.bool)
        embeds = vlm.embed(token[:, None])
        logits, attention = vlm.extend(prefix, embeds, filled, read=first, probe_rows=first[0], commit=True)
        prefix.logits = logits[:, 0]
        due = torch.tensor([self._due(row, i) for row, i in zip(rows, token.tolist(), strict=True)], device=device)
        due = due & prefix.image_mask.any(dim=1)
        return self._insert(prefix, attention, due, rows) if due.any() else prefix

    def _due(self, row: int, token: int) -> bool:
        every, before = self.config.icot_newlines, self.newlines[row]
        self.said[row] += 1
        self.newlines[row] += self.vlm.tokenizer.decode([token]).count("\n")
        reached = self.newlines[row] // every > before // every
        return reached and len(self.insertions[row]) < self.config.icot_insertions

    def _insert(self, prefix: Prefix, attention: torch.Tensor, due: torch.Tensor, rows: list[int]) -> Prefix:
        """attention: [B, 1, N] of the last token; due: [B], rows that get patches, the others stay as they are."""
        vlm, batch = self.vlm, len(rows)
        order = attention[:, 0].masked_fill(~prefix.image_mask, -1.0).argsort(dim=1, descending=True, stable=True)
        counts = prefix.image_mask.sum(dim=1).clamp(max=self.config.icot_patches)
        patches = [sorted(row[:n]) for row, n in zip(order.tolist(), counts.tolist(), strict=True)]  # in image order
        chosen = Patches.of([[row] for row in patches], vlm.device)
        start, end = (torch.tensor(ids, dtype=torch.long, device=vlm.device) for ids in vlm.family.marks)
        mark = vlm.embed(start) if len(start) else vlm.embed(end.new_zeros(1))  # [1, D]
        embeds, filled = slots_of(vlm, prefix, mark.expand(batch, 1, 1, -1), chosen, end)
        filled[:, 0] &= len(start) > 0
        before = prefix.logits
        vlm.append(prefix, embeds[:, 0], filled & due[:, None])
        prefix.logits = torch.where(due[:, None], prefix.logits, before)
        for at in due.nonzero()[:, 0].tolist():
            row = rows[at]
            self.insertions[row].append({"after_tokens": self.said[row], "patches": patches[at]})
        return prefix
