"""Decoding a batch from its prefix, token by token. Knows nothing about how a token goes through the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as processing

from dmlr.model.cache import Prefix
from dmlr.model.vlm import VLM

LOOK_EVERY = defaultdict(lambda: 16, cpu=1)  # decoding steps between looks at which rows are finished

# logits [B, V], which rows of the batch they are, how many tokens came before -> next tokens [B]
Pick = Callable[[torch.Tensor, list[int], int], torch.Tensor]
# prefix, a token [B] for each row, which rows of the batch they are -> the prefix with them
Feed = Callable[[Prefix, torch.Tensor, list[int]], Prefix]


@dataclass(frozen=True)
class Decoded:
    """Text of one answer, its tokens (the one that ended it included) and why it ended.

    stop_reason: `eos_token`, `length`, or `error` where logits are not finite: there is no text then.
    """

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
    generation: str = "plain",
    pick: Pick = greedy,
    feed: Feed | None = None,
    reserve: int = 0,
    recorded: bool = False,
) -> list[Decoded]:
    """Decoding from `prefix.logits` until end of turn, `max_new_tokens` or the end of the context.

    banned: strings that are never generated. generation: "checkpoint" applies the rules of its generation_config
    (`processors`), "plain" none; sampling is `pick`'s alone. `pick` chooses each next token, `feed` gives it to the
    model (and may insert more behind it, for which `reserve` positions of the context are left free); both are given
    the rows of the batch that they see, since finished rows leave it. recorded: each step as recorded kernels, in which
    all rows stay. The prefix is used up.
    """
    rules = processors(vlm, banned, generation, prefix.prompt_ids.shape[1])
    eos = torch.tensor(vlm.eos_ids, device=vlm.device)
    left = vlm.context_length - reserve - prefix.mask.sum(dim=1)
    limit = left.clamp(1, max_new_tokens)  # [B], each row's own
    stay = recorded and feed is None
    feed = recorded_feed(vlm, prefix, max_new_tokens) if stay else feed or partial(follow, vlm)
    ids = prefix.prompt_ids if rules else prefix.prompt_ids[:, :0]  # [B, P + S + step]
    begin, sound = ids.shape[1], prefix.logits.isfinite().all(dim=1)
    finished = ~sound
    rows, limits, generated = list(range(len(limit))), limit.tolist(), {}  # rows still in the batch; what others have
    last = max(limits)
    for step in range(1, last + 1):
        if step > 1:
            prefix = feed(prefix, ids[:, -1], rows)
        token = pick(rules(ids, prefix.logits), rows, step - 1)
        ids = torch.cat([ids, token[:, None]], dim=1)
        finished = finished | torch.isin(token, eos) | (limit == step)
        if step % LOOK_EVERY[vlm.device.type] and step < last:
            continue  # looking at `finished` makes a GPU wait
        over = finished.tolist()
        if all(over) or (2 * sum(over) >= len(over) and not stay):  # finished rows leave, half a batch at a time
            generated |= {rows[i]: ids[i, begin:].tolist() for i, done in enumerate(over) if done}
            rows = [row for row, done in zip(rows, over, strict=True) if not done]
            if not rows:
                break
            going = (~finished).nonzero()[:, 0]
            prefix, ids, limit, finished = prefix.select(going), ids[going], limit[going], finished[going]
    return [
        _decoded(vlm, generated[row][:end]) if fine else Decoded("", "error", [])
        for row, (end, fine) in enumerate(zip(limits, sound.tolist(), strict=True))
    ]


def follow(vlm: VLM, prefix: Prefix, token: torch.Tensor, rows: list[int]) -> Prefix:
    """The feed of plain decoding: the token itself goes behind each row."""
    vlm.append(prefix, vlm.embed(token[:, None]), torch.ones_like(token, dtype=torch.bool)[:, None])
    return prefix


def recorded_feed(vlm: VLM, prefix: Prefix, max_new_tokens: int) -> Feed:
    """The same as one recording, replayed for every token: keys are written at a column that is itself a tensor."""
    recorded = vlm.recordings.over(prefix, max_new_tokens, "decode")
    position = prefix.next_position.clone()  # [B]
    column = position.new_full((1,), recorded.buffer.mask.shape[1])

    def step(*where: torch.Tensor) -> tuple[torch.Tensor]:
        return (vlm.step(recorded.buffer, *where),)

    def feed(prefix: Prefix, token: torch.Tensor, rows: list[int]) -> Prefix:
        """Of the prefix that it returns only `logits` is of use."""
        (logits,) = recorded(step, token, position, column)
        position.add_(1)
        column.add_(1)
        return replace(prefix, logits=logits)

    return feed


def processors(
    vlm: VLM, banned: tuple[str, ...], generation: str, prompt_length: int
) -> processing.LogitsProcessorList:
    """What changes logits before a token is picked, as `generate` does; they see the prompt's tokens and the answer's.

    Of the checkpoint's generation_config: repetition_penalty, no_repeat_ngram_size, bad_words_ids, min_new_tokens,
    suppress_tokens. Latents and interleaved patches are no tokens, and count for none of them. Banned strings are
    forbidden at the start of a text and within it (tokenizers differ on the leading space).
    """
    settings = vlm.model.generation_config if generation == "checkpoint" else GenerationConfig()
    spelled = [vlm.tokenizer.encode(lead + word, add_special_tokens=False) for word in banned for lead in ("", " ")]
    spelled += settings.bad_words_ids or []
    where = {"device": vlm.device}
    rules = processing.LogitsProcessorList()
    if (settings.repetition_penalty or 1.0) != 1.0:
        rules.append(processing.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.no_repeat_ngram_size:
        rules.append(processing.NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    if spelled:
        rules.append(processing.NoBadWordsLogitsProcessor(spelled, eos_token_id=vlm.eos_ids))
    if settings.min_new_tokens:
        least = settings.min_new_tokens
        rules.append(processing.MinNewTokensLengthLogitsProcessor(prompt_length, least, vlm.eos_ids, **where))
    if settings.suppress_tokens:
        rules.append(processing.SuppressTokensLogitsProcessor(settings.suppress_tokens, **where))
    return rules


def _decoded(vlm: VLM, ids: list[int]) -> Decoded:
    end = next((i for i, token in enumerate(ids) if token in vlm.eos_ids), None)
    text = vlm.tokenizer.decode(ids[:end], skip_special_tokens=True)
    return Decoded(text, "length" if end is None else "eos_token", ids if end is None else ids[: end + 1])
