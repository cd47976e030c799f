"""Self-consistency: several sampled answers, and the one that most of them agree on.

Wang et al., *Self-Consistency Improves Chain of Thought Reasoning in Language Models*, arXiv 2203.11171.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from dmlr.config import Config
from dmlr.judge.choice import chosen
from dmlr.judge.extract import candidates, normalize_text, parse_options
from dmlr.judge.quantities import parse_number
from dmlr.loop.injection import caps_of
from dmlr.loop.optimize import example_generator
from dmlr.methods.answers import Answer, Clock, Question, answers_of
from dmlr.methods.prompting import decode, prefill_task, prompts_of
from dmlr.model.decode import Decoded, Pick
from dmlr.model.vlm import VLM

FEWEST, MOST = 3, 40  # samples at equal compute: fewer are no majority; 40 is the original's number


def self_consistency(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """Majority of n answers sampled from vanilla's prompt at `consistency_temperature`, without truncation.

    n is `consistency_samples`, or with none what DMLR's loop costs under this configuration (`equal_samples`). A
    sample's random numbers come from (seed, idx, its number) alone. The answer is the text of the first sample that
    gives the most frequent answer; among equally frequent ones the earliest wins. Samples without an answer do not
    vote.

    Details: `votes`, the answer of every sample (None: none found), and `samples`, their number. `num_new_tokens` is
    the sum over them.
    """
    clock = Clock(vlm.device)
    prefix, encoded = prefill_task(vlm, questions, config, prompts_of(config))
    clock.lap("prefill")

    def sample(jobs: list[tuple[int, int]]) -> list[Decoded]:
        """One decoded answer for each (row, number)."""
        streams = [example_generator(config.seed, questions[row].idx, f"sample {number}") for row, number in jobs]
        uniform = torch.stack([torch.rand(config.max_new_tokens, generator=stream) for stream in streams])
        part = prefix.select(torch.tensor([row for row, _ in jobs], device=vlm.device))
        return decode(vlm, part, config, pick=sampling(uniform, config.consistency_temperature))

    said = [[d] for d in sample([(row, 0) for row in range(len(questions))])]
    jobs = []
    for row, (first, e) in enumerate(zip(said, encoded, strict=True)):
        wanted = config.consistency_samples or equal_samples(config, len(e.image_columns), first[0].num_tokens)
        jobs += [(row, number) for number in range(1, wanted)]
    for start in range(0, len(jobs), len(questions)):  # never more rows at a time than the batch has
        part = jobs[start : start + len(questions)]
        for (row, _), d in zip(part, sample(part), strict=True):
            said[row].append(d)
    votes = [[vote(d.text, q.text) for d in samples] for q, samples in zip(questions, said, strict=True)]
    winners = [samples[winner(each)] for samples, each in zip(said, votes, strict=True)]
    answers = answers_of(encoded, winners, clock)
    for answer, samples, each in zip(answers, said, votes, strict=True):
        answer.num_new_tokens = sum(d.num_tokens for d in samples)
        answer.details = {"votes": each, "samples": len(samples)}
    return answers


def equal_samples(config: Config, num_patches: int, answer_tokens: int) -> int:
    """n whose cost is about DMLR's, counted in positions that go through the language model behind the prompt.

    DMLR costs `loop_positions` and one answer, n samples n answers; how long an answer is, the question's own first
    sample says (`answer_tokens`). So n = 1 + loop_positions / answer_tokens, rounded, from FEWEST to MOST. Equal
    positions are equal arithmetic, not equal time: the loop runs many positions at once, a decode one after another.
    """
    return min(MOST, max(FEWEST, 1 + round(loop_positions(config, num_patches) / answer_tokens)))


def loop_positions(config: Config, num_patches: int) -> int:
    """Most positions that DMLR's loop runs behind the prompt of a question with so many image tokens.

    Once the L think tokens alone, T iterations of M explored candidates with one tried state (`accept_at` "updated") or
    M more candidates that rank the patches ("candidate"), with all patches that the budget can allow by then, and the
    chosen state before the answer. A backward pass (`use_auto_grad`) counts as another forward.
    """
    length, steps = config.num_thought_tokens, config.max_num_steps
    caps = caps_of(config, torch.tensor([num_patches]))
    passes = config.evaluations + config.use_auto_grad
    total = length
    for t in range(steps + 1):  # the last one is the state that is decoded
        grown = num_patches
        if config.initial_patch_count is not None:
            grown = config.initial_patch_count + config.patch_increment * t
        total += (length + int(caps.clamp(max=grown).sum())) * (passes if t < steps else 1)
    return total


def sampling(uniform: torch.Tensor, temperature: float) -> Pick:
    """A pick that draws tokens by inverting the distribution function at uniform[row, step].

    uniform: [B, steps]. On every device the same numbers, and a row's tokens do not depend on its neighbours.
    """

    def pick(logits: torch.Tensor, rows: list[int], step: int) -> torch.Tensor:
        share = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)  # [B, V]
        point = uniform[rows, step].to(share) * share[:, -1]
        return torch.searchsorted(share, point[:, None], right=True)[:, 0].clamp(max=logits.shape[1] - 1)

    return pick


def vote(text: str, question: str) -> str | None:
    """What an answer text says, in a form in which equal answers are equal; None where it says nothing.

    An option's letter where the question lists options, else a number (0.50 is 1/2), else normalised words. The
    answer is the most explicit part of the text, found by the rules that the judge uses; no ground truth is involved.
    """
    found = candidates(text)
    if letter := chosen(found, parse_options(question)):
        return letter
    if not found:
        return None
    number = parse_number(found[0].text)
    if number is None:
        words = normalize_text(found[0].text)
        return words if any(letter.isalnum() for letter in words) else None
    return f"{number.value}{'%' if number.percent else ''} {number.unit}".strip()


def winner(votes: Sequence[str | None]) -> int:
    """Position of the first vote for the most frequent answer; 0 when nobody voted."""
    counts = Counter(each for each in votes if each is not None)
    return votes.index(counts.most_common(1)[0][0]) if counts else 0
