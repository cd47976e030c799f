"""Confidence gain: what each reasoning step adds to the probability of the true answer.

`G_t = log π(Y_gt | I, q, steps ≤ t) − log π(Y_gt | I, q, steps < t)` (arXiv 2512.12623, fig. 3). Where a step is an
assertion about a place, the record's object boxes can tell whether it is so. Knows nothing about figures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import torch

from dmlr.config import ConfigError
from dmlr.judge.choice import as_choice
from dmlr.judge.extract import parse_options, unbox
from dmlr.look.study.boxes import Box, centre
from dmlr.look.study.perception import Chain, forced
from dmlr.look.study.words import Span, rationale, steps
from dmlr.model.prefix import Prefix
from dmlr.model.vlm import VLM

ANSWER = "{answer}"


def truth_text(solution: str, question: str) -> str:
    """The true answer as a model would write it: what is in the box, of an option its letter."""
    inner = unbox(solution)
    choice = as_choice(inner, parse_options(question), None)
    return choice[0] if choice and choice[0] else inner


def parts(form: str) -> tuple[str, str]:
    """What stands before and behind `{answer}` in the form of an answer; ConfigError unless it is there once."""
    if form.count(ANSWER) != 1:
        raise ConfigError(f"answer_form = {form!r}: it must hold {ANSWER} exactly once")
    before, _, after = form.partition(ANSWER)
    return before, after


def step_spans(text: str, form: str, ends: re.Pattern) -> list[Span]:
    """The steps of a chain: its rationale, cut behind every match of `ends`."""
    return steps(text, rationale(text, parts(form)[0]), ends)


@torch.no_grad()
def answer_log_probs(
    vlm: VLM, prefix: Prefix, chains: Sequence[Chain], truths: Sequence[str], form: str, ends: re.Pattern
) -> list[list[float]]:
    """log π(Y_gt) of each chain before its first step and after every one, [1 + steps]; empty for an empty truth.

    The model's reasoning is cut there, `form` continues it with the true answer in place of `{answer}`, and the
    log-probabilities of the answer's tokens and of what closes it are summed. Reasoning and form are tokenised apart,
    as they would be if reasoning had ended there. Leaves the prefix as it is.
    """
    before, after = parts(form)
    cut = [_step_ids(vlm, chain.text, step_spans(chain.text, form, ends)) for chain in chains]
    forms = [_form_ids(vlm, before, truth, after) for truth in truths]
    branch, scores = prefix.branch(), [[] for _ in chains]
    for moment in range(max(map(len, cut))):
        fed = [row[moment] if moment < len(row) else [] for row in cut]
        _feed(vlm, branch, fed)
        log_probs, _ = forced(vlm, branch, [ids for ids, _ in forms])
        for row, (_, first) in enumerate(forms):
            if moment < len(cut[row]) and truths[row]:
                scores[row].append(float(log_probs[row][first:].sum()))
    return scores


def gains(truth: Sequence[float]) -> list[float]:
    """G_t of every step, in nats."""
    return [after - before for before, after in pairwise(truth)]


def named_cells(step: str, pattern: re.Pattern) -> list[tuple[int | None, int | None]]:
    """(row, column) of the places a step names, from 1; None where it names only the other.

    `pattern` has the groups `row` and `column`; a match without either is no place.
    """
    found = [match.groupdict() for match in pattern.finditer(step)]
    cells = [tuple(int(m[k]) if m.get(k) else None for k in ("row", "column")) for m in found]
    return [cell for cell in cells if cell != (None, None)]


def grounded(
    step: str, pattern: re.Pattern, board: int, boxes: Sequence[Box] | None, size: tuple[int, int]
) -> bool | None:
    """Whether every place that a step names holds an object that was asked about; None where it cannot be told.

    It cannot where the step names no place, or the record says nothing about boxes. boxes: pixels of an image of `size`
    (width, height), none if what was asked about is not there; the places are cells of a board × board grid over that
    image. An object is where its centre is.
    """
    cells = named_cells(step, pattern)
    if not cells or boxes is None:
        return None
    there = [centre(box, size, (board, board)) for box in boxes]
    return all(
        any((row is None or row == r + 1) and (column is None or column == c + 1) for r, c in there)
        for row, column in cells
    )


def _step_ids(vlm: VLM, text: str, spans: Sequence[Span]) -> list[list[int]]:
    """Tokens of what precedes the first step, then of each step."""
    end = spans[-1].end if spans else rationale(text).start
    coded = vlm.tokenizer(text[:end], add_special_tokens=False, return_offsets_mapping=True)
    starts = [span.start for span in spans]
    rows: list[list[int]] = [[] for _ in range(1 + len(spans))]
    for token, (a, b) in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
        own = text[a:b]
        first = a + len(own) - len(own.lstrip())  # a blank before a step goes with it
        rows[sum(start <= first for start in starts)].append(token)
    return rows


def _form_ids(vlm: VLM, before: str, truth: str, after: str) -> tuple[list[int], int]:
    """Tokens of the form with the answer in it, and the first of them that holds a part of the answer."""
    coded = vlm.tokenizer(before + truth + after, add_special_tokens=False, return_offsets_mapping=True)
    offsets = coded["offset_mapping"]
    return coded["input_ids"], next((n for n, (_, end) in enumerate(offsets) if end > len(before)), len(offsets))


def _feed(vlm: VLM, prefix: Prefix, ids: Sequence[Sequence[int]]) -> None:
    """Makes each row's tokens part of the prefix; a row without any keeps its logits."""
    longest = max(map(len, ids))
    if not longest:
        return
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=vlm.device)
    filled = torch.arange(longest, device=vlm.device) < torch.tensor([[len(row)] for row in ids], device=vlm.device)
    before = prefix.logits
    vlm.append(prefix, vlm.embed(tokens), filled)
    prefix.logits = torch.where(filled.any(dim=1)[:, None], prefix.logits, before)
