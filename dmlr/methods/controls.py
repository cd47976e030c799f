"""Controls: what a gain must be larger than before latents, patches or the search can be given the credit.

All but `random` are one mechanism: what DMLR's loop found for a question, changed, scored once and decoded again, with
the same prompt and the same decoding. So each is paired with DMLR's own answer, and differs from it in one thing.

A record of theirs has no iterations: `best_reward` is the run's reward of the state that was decoded, and `details` say
what was changed (`control`), whose loop it was (`loop_of`), how far the latents lie from the start (`displacement`, RMS
per dimension), and, for the two that have seen the truth, that they are an `oracle`.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from dmlr.config import Config
from dmlr.data.boxes import checked_boxes, distance, touched
from dmlr.loop.injection import Patches, Retrieval, choose_patches, interleave
from dmlr.loop.optimize import State, Trace, example_generator, initial_latents, optimize, stay
from dmlr.loop.score import Score, Scored, scorer, with_tokens
from dmlr.methods.answers import Answer, Clock, Question
from dmlr.methods.latent import (
    append_latents,
    latent_answers,
    prefill_latent,
    question_noise,
    reasoned,
    score_ids,
    with_notes,
)
from dmlr.methods.prompting import decode, prompts_of
from dmlr.model.cache import Prefix
from dmlr.model.vlm import VLM, Encoded


@dataclass
class Found:
    """What a loop found for a batch of B questions: the prompts, where it started, and the state it chose."""

    questions: Sequence[Question]
    config: Config
    prefix: Prefix
    encoded: list[Encoded]
    start: torch.Tensor  # [B, L, D]
    state: State

    def normal(self, purpose: str) -> torch.Tensor:
        """[B, L, D], standard normal, each question's own."""
        streams = [example_generator(self.config.seed, q.idx, purpose) for q in self.questions]
        draws = [torch.randn(self.start.shape[1:], generator=stream) for stream in streams]
        return torch.stack(draws).to(self.start.device)

    def patches_ranked(self, ranking: torch.Tensor, allowed: torch.Tensor) -> Patches:
        """The first of `ranking` [B, L, N] in [0, 1] among the image tokens `allowed` [B, N]: as many for each think
        token as the loop kept, and at least as many as the loop begins with."""
        retrieve = Retrieval(self.prefix.image_mask, self.config)
        wanted = torch.minimum(retrieve.first_budget[:, None], retrieve.caps)
        wanted = torch.maximum(wanted, self.state.patches.count)
        wanted = torch.minimum(wanted, allowed.sum(dim=1, keepdim=True))  # [B, L]
        most = wanted.amax(dim=1)
        return choose_patches(ranking, allowed, retrieve.nothing, most, wanted, int(most.max()))


# changes of what was found: Found -> the state to decode instead

Change = Callable[[Found], State]


def displaced(found: Found) -> State:
    """A random displacement of the start, for each think token as long as the loop's; no reward chose it."""
    direction, size = found.normal("displaced"), (found.state.latents - found.start).norm(dim=2, keepdim=True)
    return replace(found.state, latents=found.start + size * direction / direction.norm(dim=2, keepdim=True))


def zero(found: Found) -> State:
    """Zero vectors in the think tokens' slots."""
    return replace(found.state, latents=torch.zeros_like(found.state.latents))


def gaussian(found: Found) -> State:
    """Gaussian vectors with the RMS of each optimised think token."""
    rms = found.state.latents.pow(2).mean(dim=2, keepdim=True).sqrt()
    return replace(found.state, latents=rms * found.normal("gaussian"))


def permuted(found: Found) -> State:
    """The think tokens, each with its patches, in another order: a random cycle, so that none keeps its place."""
    length, sources = found.start.shape[1], []
    for question in found.questions:
        cycle = torch.randperm(length, generator=example_generator(found.config.seed, question.idx, "permuted"))
        sources.append(torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1)))
    source, patches = torch.stack(sources).to(found.start.device), found.state.patches  # [B, L]
    index = patches.index.gather(1, source[..., None].expand_as(patches.index))
    latents = found.state.latents.gather(1, source[..., None].expand_as(found.start))
    return State(latents, Patches(index, patches.count.gather(1, source)))


def latents_only(found: Found) -> State:
    """The optimised latents without their patches."""
    return replace(found.state, patches=Retrieval(found.prefix.image_mask, found.config).nothing)


def patches_only(found: Found) -> State:
    """The loop's patches behind think tokens that are reset to the start."""
    return replace(found.state, latents=found.start)


def random_patches(found: Found) -> State:
    """Patches of random places instead of the loop's; with `max_num_steps` 0 behind the start's think tokens."""
    ranking = random_ranking(found.questions, found.prefix, found.config, "random patches", 1)[:, 0]
    return replace(found.state, patches=found.patches_ranked(ranking, found.prefix.image_mask))


def true_patches(found: Found) -> State:
    """An ORACLE: patches of the true object's boxes, the nearest to a box's centre first, instead of the loop's.

    As many as "random-patches" has, at most all that a box touches; none where the dataset says that the object is not
    in the image (no box). ValueError where it says nothing about boxes.
    """
    batch, count = found.prefix.image_mask.shape
    inside, nearness = torch.zeros(batch, count, dtype=torch.bool), torch.zeros(batch, count)
    for row, (question, encoded) in enumerate(zip(found.questions, found.encoded, strict=True)):
        if question.boxes is None:
            raise ValueError("true-patches: the dataset says nothing about this question's boxes")
        boxes, grid = checked_boxes(question.boxes), encoded.patch_grid
        if boxes and question.images:
            size, tokens = question.images[0].size, math.prod(grid)
            inside[row, :tokens] = torch.from_numpy(touched(boxes, size, grid))
            nearness[row, :tokens] = 1 / (1 + torch.from_numpy(distance(boxes, size, grid)).float())
    ranking = nearness[:, None].expand(-1, found.start.shape[1], -1).to(found.start.device)
    return replace(found.state, patches=found.patches_ranked(ranking, inside.to(found.start.device)))


# the methods


def unoptimised(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """The think tokens as they are, each with its initial patches as attention ranks them; no iteration.

    The initial patches are decoded whether or not they raise the reward: nothing is selected here. With
    `visual_injection_start_step` > 0 there are none, as in DMLR before that step.
    """
    still = config.replace(max_num_steps=0, disable_best_reward=True, accept_at="updated")
    clock, found = Clock(vlm.device), found_by_loop(vlm, questions, still)
    return decoded_again(vlm, found, found.state, {"control": "unoptimised"}, clock)


def changed(vlm: VLM, questions: Sequence[Question], config: Config, *, change: Change, name: str) -> list[Answer]:
    """Answers decoded from what `change` makes of DMLR's result."""
    clock = Clock(vlm.device)
    found = found_by_loop(vlm, questions, config)
    details = {"control": name} | ({"oracle": True} if change is true_patches else {})
    return decoded_again(vlm, found, change(found), details, clock)


def swapped(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """The optimised latents of another question of the dataset (`Question.partner`), with the features of the patches
    that its loop chose in its own image. ValueError for a question that stands alone."""
    if any(question.partner is None for question in questions):
        raise ValueError("swapped needs another question of the same dataset; there is none")
    clock, partners = Clock(vlm.device), [question.partner() for question in questions]
    theirs = found_by_loop(vlm, partners, config)
    prefix, encoded = prefill_latent(vlm, questions, config, prompts_of(config))
    ours = Found(questions, config, prefix, encoded, initial_latents(vlm, prefix, config), theirs.state)
    answers = decoded_again(vlm, ours, theirs.state, {"control": "swapped"}, clock, theirs.prefix.images)
    for answer, partner in zip(answers, partners, strict=True):
        answer.details |= {"loop_of": partner.idx, "patches": answer.reasoning.patches}
        answer.reasoning.patches = [[] for _ in answer.reasoning.patches]  # they lie in another image
    return answers


def oracle_latents(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """An ORACLE, the ceiling: DMLR's loop with the exact gradient of log p(true answer | prompt, latents, patches),
    the mean over the answer's tokens, by Adam with a step of a tenth of sigma. What no reward could reach through these
    latents. ValueError where the solution is not known."""
    if any(not question.solution for question in questions):
        raise ValueError("oracle-latents: the solution of this question is not known")
    clock, absolute = Clock(vlm.device), config.absolute(vlm.embedding_rms)
    exact = absolute.replace(
        use_auto_grad=True,
        num_samples=1,
        lr=absolute.sigma / 10,
        accept_at="updated",
        reward_threshold=-1,
        disable_conf_reward=False,
    )

    def loop(vlm: VLM, prefix: Prefix, config: Config, noise: torch.Tensor, ids: torch.Tensor) -> Trace:
        return optimize(vlm, prefix, config, noise, score=truth_score(vlm, prefix, questions))

    found = replace(found_by_loop(vlm, questions, exact, loop), config=config)
    return decoded_again(vlm, found, found.state, {"control": "oracle-latents", "oracle": True}, clock)


def random(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """Random search by the same reward with as many evaluations: DMLR's loop without its update and its retrieval.

    In an iteration of DMLR M + 1 states go through the model (`accept_at` "candidate": 2 M); here as many displacements
    of the start, with patches drawn at random; the best is kept, with its patches, where it raises the best reward.
    sigma, its decay, the patch budget and its growth are DMLR's; the random numbers come from (seed, idx) alone.
    """

    def loop(vlm: VLM, prefix: Prefix, config: Config, noise: torch.Tensor, ids: torch.Tensor) -> Trace:
        shape = (config.max_num_steps, config.evaluations, config.num_thought_tokens, noise.shape[-1])
        streams = [example_generator(config.seed, q.idx, "random") for q in questions]
        noise = torch.stack([torch.randn(shape, generator=stream) for stream in streams])
        ranking = random_ranking(questions, prefix, config, "patches", config.max_num_steps)
        return optimize(vlm, prefix, config, noise, ids, update=stay, ranking=ranking)

    return with_notes(reasoned(vlm, questions, config.replace(use_auto_grad=False), loop), questions)


CHANGES: dict[str, Change] = {
    "displaced": displaced,
    "zero": zero,
    "gaussian": gaussian,
    "permuted": permuted,
    "latents-only": latents_only,
    "patches-only": patches_only,
    "random-patches": random_patches,
    "true-patches": true_patches,
}
CONTROLS: dict[str, Callable[[VLM, Sequence[Question], Config], list[Answer]]] = {
    "unoptimised": unoptimised,
    "random": random,
    "swapped": swapped,
    **{name: partial(changed, change=change, name=name) for name, change in CHANGES.items()},
    "oracle-latents": oracle_latents,
}


# the pieces

KEPT = 4096  # states of a model that are kept
_STATES: WeakKeyDictionary[VLM, OrderedDict] = WeakKeyDictionary()


def found_by_loop(vlm: VLM, questions: Sequence[Question], config: Config, loop: Callable | None = None) -> Found:
    """What DMLR's loop finds; `loop`: another one, in its place.

    DMLR's states are kept per model, question and configuration, so that the controls of a run share one loop.
    """
    prompts = prompts_of(config)
    prefix, encoded = prefill_latent(vlm, questions, config, prompts)
    start, kept = initial_latents(vlm, prefix, config), _STATES.setdefault(vlm, OrderedDict())
    keys = [(config, q.idx, q.text, *(_digest(image) for image in q.images)) for q in questions]
    rows = list(range(len(questions))) if loop else [row for row, key in enumerate(keys) if key not in kept]
    states = {}
    if rows:
        part = prefix if len(rows) == len(questions) else prefix.select(torch.tensor(rows, device=start.device))
        noise = torch.stack([question_noise(vlm, questions[row], config) for row in rows])
        final = (loop or optimize)(vlm, part, config, noise, score_ids(vlm, part, prompts)).final
        states = dict(zip(rows, zip(final.latents.cpu(), final.patches.tolist(), strict=True), strict=True))
    if not loop:
        kept |= {keys[row]: state for row, state in states.items()}
    found = [states[row] if row in states else kept[key] for row, key in enumerate(keys)]
    while len(kept) > KEPT:
        kept.popitem(last=False)
    latents = torch.stack([latents for latents, _ in found]).to(start.device)
    state = State(latents, Patches.of([patches for _, patches in found], start.device))
    return Found(questions, config, prefix, encoded, start, state)


def decoded_again(
    vlm: VLM, found: Found, state: State, details: dict, clock: Clock, images: torch.Tensor | None = None
) -> list[Answer]:
    """Answers from `state` behind the prompts of `found`; images: [B, N', D'], what its patches are tokens of, if not
    the questions' own."""
    config, prefix = found.config, found.prefix
    ids = score_ids(vlm, prefix, prompts_of(config))
    clock.lap("optimise")
    start = scorer(vlm, prefix, config, ids)(found.start[:, None], Retrieval(prefix.image_mask, config).nothing)
    if images is not None:
        prefix, config = replace(prefix, images=images), config.replace(cuda_graphs=False)
    reward = scorer(vlm, prefix, config, ids)(state.latents[:, None], state.patches, with_attention=False).reward[:, 0]
    none = torch.zeros_like(state.patches.count[:, 0])
    append_latents(vlm, prefix, state.latents, state.patches)
    decoded = decode(vlm, prefix, config)
    clock.lap("decode")
    trace = Trace(start.reward[:, 0], start.attention, reward, none, state, state)
    seconds = clock.per_example(len(found.questions))
    answers = latent_answers(decoded, found.encoded, trace, vlm.embedding_rms, seconds)
    sizes = (state.latents - found.start).pow(2).mean(dim=(1, 2)).sqrt().tolist()
    for answer, question, size in zip(answers, found.questions, sizes, strict=True):
        answer.details |= {**details, "loop_of": question.idx, "displacement": float(f"{size:.4g}")}
    return with_notes(answers, found.questions)


def truth_score(vlm: VLM, prefix: Prefix, questions: Sequence[Question]) -> Score:
    """A reward in place of confidence: mean log-probability of the solution's tokens as the answer, with its gradient.

    Of one sample at a time.
    """
    told = [vlm.tokenizer.encode(question.solution, add_special_tokens=False) for question in questions]
    width = max(map(len, told))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in told], device=vlm.device)  # [B, A]
    given = torch.tensor([[i < len(row) for i in range(width)] for row in told], device=vlm.device)

    def score(
        latents: torch.Tensor, patches: Patches, with_attention: bool = True, with_gradient: bool = False
    ) -> Scored:
        with torch.set_grad_enabled(with_gradient):
            latents = latents.detach().requires_grad_(with_gradient)
            embeds, filled = with_tokens(vlm, *interleave(latents, prefix.images, patches), prefix.suffix_ids)
            first = embeds.shape[2] - 1  # the slot before the answer's first token
            text = F.pad(vlm.embed(ids).to(embeds.dtype), (0, embeds.shape[3] - vlm.text_config.hidden_size))
            read = first + torch.arange(width, device=embeds.device).expand_as(ids)
            think = torch.arange(latents.shape[2], device=embeds.device) * (1 + patches.index.shape[2])
            logits, attention = vlm.extend(
                prefix,
                torch.cat([embeds[:, 0], text], dim=1),
                torch.cat([filled, given], dim=1),
                read=read,
                probe_rows=think if with_attention else None,
            )
            chances = logits.log_softmax(dim=-1).gather(2, ids[..., None])[..., 0]  # [B, A]
            reward = (chances * given).sum(dim=1) / given.sum(dim=1)
            gradient = torch.autograd.grad(reward.sum(), latents)[0][:, 0] if with_gradient else None
        return Scored(reward.detach()[:, None], attention, gradient)

    return score


def random_ranking(
    questions: Sequence[Question], prefix: Prefix, config: Config, purpose: str, steps: int
) -> torch.Tensor:
    """[B, steps, L, N] in [0, 1): what ranks the patches of each step.

    A question's numbers depend on (seed, its idx) and its own number of image tokens only.
    """
    counts, widest = prefix.image_mask.sum(dim=1).tolist(), prefix.image_mask.shape[1]
    rows = [
        torch.rand(steps, config.num_thought_tokens, count, generator=example_generator(config.seed, q.idx, purpose))
        for q, count in zip(questions, counts, strict=True)
    ]
    return torch.stack([F.pad(row, (0, widest - row.shape[2])) for row in rows]).to(prefix.images.device)


def _digest(image) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()
