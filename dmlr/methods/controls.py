"""Controls: what a gain must be larger than before latents, patches or the search can be given the credit.

All are one mechanism: a loop's result for a question, changed, scored once and decoded again, with the same prompt and
the same decoding. So each is paired with DMLR's own answer, and differs from it in one thing. (`random` alone is a loop
of its own, decoded as it is.)

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
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from dmlr.config import Config
from dmlr.data.boxes import checked_boxes, distance, touched
from dmlr.loop.injection import Patches, Retrieval, choose_patches, interleave
from dmlr.loop.optimize import State, Trace, example_generator, initial_latents, optimize
from dmlr.loop.score import Score, differentiable, scorer, with_tokens
from dmlr.methods import latent
from dmlr.methods.answers import Answer, Clock, Question
from dmlr.methods.prompting import prompts_of
from dmlr.model.cache import Prefix
from dmlr.model.vlm import VLM, Encoded


@dataclass(frozen=True)
class Result:
    """What a loop made of a batch of B questions: the prompts, where it started, and the state to decode."""

    questions: Sequence[Question]
    config: Config
    prefix: Prefix
    encoded: list[Encoded]
    start: torch.Tensor  # [B, L, D]
    state: State
    sources: Sequence[Question]  # whose loop it was

    @property
    def retrieval(self) -> Retrieval:
        return Retrieval(self.prefix.image_mask, self.config)

    def normal(self, purpose: str) -> torch.Tensor:
        """[B, L, D], standard normal, each question's own."""
        streams = [example_generator(self.config.seed, q.idx, purpose) for q in self.questions]
        draws = [torch.randn(self.start.shape[1:], generator=stream) for stream in streams]
        return torch.stack(draws).to(self.start.device)

    def patches_ranked(self, ranking: torch.Tensor, allowed: torch.Tensor) -> Patches:
        """The first of `ranking` [B, L, N] in [0, 1] among the image tokens `allowed` [B, N]: as many for each think
        token as the loop kept, and at least as many as the loop begins with."""
        retrieve = self.retrieval
        wanted = torch.minimum(retrieve.first_budget[:, None], retrieve.caps)
        wanted = torch.maximum(wanted, self.state.patches.count)
        wanted = torch.minimum(wanted, allowed.sum(dim=1, keepdim=True))  # [B, L]
        most = wanted.amax(dim=1)
        return choose_patches(ranking, allowed, retrieve.nothing, most, wanted, int(most.max()))


# changes: a loop's result -> the state to decode instead


def displaced(result: Result) -> State:
    """A random displacement of the start, for each think token as long as the loop's; no reward chose it."""
    direction, size = result.normal("displaced"), (result.state.latents - result.start).norm(dim=2, keepdim=True)
    return replace(result.state, latents=result.start + size * direction / direction.norm(dim=2, keepdim=True))


def gaussian(result: Result) -> State:
    """Gaussian vectors with the RMS of each optimised think token."""
    rms = result.state.latents.pow(2).mean(dim=2, keepdim=True).sqrt()
    return replace(result.state, latents=rms * result.normal("gaussian"))


def permuted(result: Result) -> State:
    """The think tokens, each with its patches, in another order: a random cycle, so that none keeps its place."""
    length, sources = result.start.shape[1], []
    for question in result.questions:
        cycle = torch.randperm(length, generator=example_generator(result.config.seed, question.idx, "permuted"))
        sources.append(torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1)))
    source, patches = torch.stack(sources).to(result.start.device), result.state.patches  # [B, L]
    index = patches.index.gather(1, source[..., None].expand_as(patches.index))
    latents = result.state.latents.gather(1, source[..., None].expand_as(result.start))
    return State(latents, Patches(index, patches.count.gather(1, source)))


def random_patches(result: Result) -> State:
    """Patches of random places instead of the loop's; with `max_num_steps` 0 behind the start's think tokens."""
    ranking = random_ranking(result.questions, result.prefix, result.config, "random patches", 1)[:, 0]
    return replace(result.state, patches=result.patches_ranked(ranking, result.prefix.image_mask))


def true_patches(result: Result) -> State:
    """An ORACLE: patches of the true object's boxes, the nearest to a box's centre first, instead of the loop's.

    As many as "random-patches" has, at most all that a box touches; none where the dataset says that the object is not
    in the image (no box).
    """
    batch, count = result.prefix.image_mask.shape
    inside, nearness = torch.zeros(batch, count, dtype=torch.bool), torch.zeros(batch, count)
    for row, (question, encoded) in enumerate(zip(result.questions, result.encoded, strict=True)):
        boxes, grid = checked_boxes(question.boxes), encoded.patch_grid
        if boxes and question.images:
            size, tokens = question.images[0].size, math.prod(grid)
            inside[row, :tokens] = torch.from_numpy(touched(boxes, size, grid))
            nearness[row, :tokens] = 1 / (1 + torch.from_numpy(distance(boxes, size, grid)).float())
    ranking = nearness[:, None].expand(-1, result.start.shape[1], -1).to(result.start.device)
    return replace(result.state, patches=result.patches_ranked(ranking, inside.to(result.start.device)))


# other loops: questions -> a result


def without_iterations(vlm: VLM, questions: Sequence[Question], config: Config) -> Result:
    """The think tokens as they are, each with its initial patches as attention ranks them.

    The initial patches are decoded whether or not they raise the reward: nothing is selected here. With
    `visual_injection_start_step` > 0 there are none, as in DMLR before that step.
    """
    return loop_result(vlm, questions, config.replace(max_num_steps=0, disable_best_reward=True, accept_at="updated"))


def of_partners(vlm: VLM, questions: Sequence[Question], config: Config) -> Result:
    """The optimised latents of another question of the dataset (`Question.partner`), with the features of the patches
    that its loop chose in its own image."""
    theirs = loop_result(vlm, [question.partner() for question in questions], config)
    prefix, encoded = latent.prefill_latent(vlm, questions, config, prompts_of(config))
    start, prefix = initial_latents(vlm, prefix, config), replace(prefix, images=theirs.prefix.images)
    config = config.replace(cuda_graphs=False)  # their buffers are made for a prefix with its own images
    return Result(questions, config, prefix, encoded, start, theirs.state, theirs.questions)


def towards_the_truth(vlm: VLM, questions: Sequence[Question], config: Config) -> Result:
    """An ORACLE, the ceiling: the exact gradient of log p(true answer | prompt, latents, patches), the mean over the
    answer's tokens, by Adam with a step of a tenth of sigma. What no reward could reach through these latents."""
    absolute = config.absolute(vlm.embedding_rms)
    exact = {"use_auto_grad": True, "num_samples": 1, "lr": absolute.sigma / 10, "accept_at": "updated"}
    exact |= {"reward_threshold": -1, "disable_conf_reward": False}

    def loop(vlm: VLM, prefix: Prefix, config: Config, noise: torch.Tensor, ids: torch.Tensor) -> Trace:
        return optimize(vlm, prefix, config, noise, score=truth_score(vlm, prefix, questions))

    return replace(loop_result(vlm, questions, absolute.replace(**exact), loop), config=config)


@dataclass(frozen=True)
class Control:
    """A method: what `loop` gives (DMLR's own where nothing is said), changed, scored and decoded."""

    name: str
    change: Callable[[Result], State] = lambda result: result.state
    loop: Callable[[VLM, Sequence[Question], Config], Result] | None = None
    needs: str = ""  # what a question must have, which a dataset need not say: ValueError without it
    oracle: bool = False

    def __call__(self, vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
        if self.needs and any(getattr(question, self.needs) in (None, "") for question in questions):
            raise ValueError(f"{self.name}: the dataset has no {self.needs} for this question")
        clock, result = Clock(vlm.device), (self.loop or loop_result)(vlm, questions, config)
        config, prefix, state = result.config, result.prefix, self.change(result)
        clock.lap("optimise")
        score = scorer(vlm, prefix, config, latent.score_ids(vlm, prefix, prompts_of(config)))
        start = score(result.start[:, None], result.retrieval.nothing)
        reward = score(state.latents[:, None], state.patches, with_attention=False).reward[:, 0]
        none = torch.zeros_like(state.patches.count[:, 0])
        trace = Trace(start.reward[:, 0], start.attention, reward, none, state)
        answers = latent.decoded_after(vlm, prefix, config, result.encoded, trace, clock)
        sizes = (state.latents - result.start).pow(2).mean(dim=(1, 2)).sqrt().tolist()
        for answer, question, source, size in zip(answers, questions, result.sources, sizes, strict=True):
            answer.details |= {"control": self.name, "loop_of": source.idx, "displacement": float(f"{size:.4g}")}
            answer.details |= {"oracle": True} if self.oracle else {}
            if source is not question:  # the patches lie in another image
                answer.details["patches"] = answer.reasoning.patches
                answer.reasoning.patches = [[] for _ in answer.reasoning.patches]
        return latent.with_notes(answers, questions)


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
        return optimize(vlm, prefix, config, noise, ids, ranking=ranking)

    answers = latent.reasoned(vlm, questions, config.replace(use_auto_grad=False), loop)
    return latent.with_notes(answers, questions)


CONTROLS: dict[str, Callable[[VLM, Sequence[Question], Config], list[Answer]]] = {"random": random} | {
    control.name: control
    for control in (
        Control("unoptimised", loop=without_iterations),
        Control("swapped", loop=of_partners, needs="partner"),
        Control("displaced", displaced),
        Control("zero", lambda result: replace(result.state, latents=torch.zeros_like(result.start))),
        Control("gaussian", gaussian),
        Control("permuted", permuted),
        Control("latents-only", lambda result: replace(result.state, patches=result.retrieval.nothing)),
        Control("patches-only", lambda result: replace(result.state, latents=result.start)),
        Control("random-patches", random_patches),
        Control("true-patches", true_patches, needs="boxes", oracle=True),
        Control("oracle-latents", loop=towards_the_truth, needs="solution", oracle=True),
    )
}


# the pieces

KEPT = 4096  # states of a model that are kept
_STATES: WeakKeyDictionary[VLM, OrderedDict] = WeakKeyDictionary()


def loop_result(vlm: VLM, questions: Sequence[Question], config: Config, loop: latent.Loop | None = None) -> Result:
    """What DMLR's loop makes of the questions; `loop`: another one, in its place.

    DMLR's states are kept per model, question and configuration, so that the controls of a run share one loop.
    """
    prompts = prompts_of(config)
    prefix, encoded = latent.prefill_latent(vlm, questions, config, prompts)
    start = initial_latents(vlm, prefix, config)
    kept = OrderedDict() if loop else _STATES.setdefault(vlm, OrderedDict())
    keys = [(config, q.idx, q.text, *(hashlib.blake2b(im.tobytes()).digest() for im in q.images)) for q in questions]
    if rows := [row for row, key in enumerate(keys) if key not in kept]:
        part = prefix if len(rows) == len(questions) else prefix.select(torch.tensor(rows, device=start.device))
        noise = torch.stack([latent.question_noise(vlm, questions[row], config) for row in rows])
        final = (loop or optimize)(vlm, part, config, noise, latent.score_ids(vlm, part, prompts)).final
        states = zip(final.latents.cpu(), final.patches.tolist(), strict=True)
        kept |= zip([keys[row] for row in rows], states, strict=True)
    latents, patches = zip(*(kept[key] for key in keys), strict=True)
    while len(kept) > KEPT:
        kept.popitem(last=False)
    state = State(torch.stack(latents).to(start.device), Patches.of(patches, start.device))
    return Result(questions, config, prefix, encoded, start, state, questions)


def truth_score(vlm: VLM, prefix: Prefix, questions: Sequence[Question]) -> Score:
    """A reward in place of confidence: mean log-probability of the solution's tokens as the answer, with its gradient.

    Of one sample at a time.
    """
    tokens = [torch.tensor(vlm.tokenizer.encode(q.solution, add_special_tokens=False)) for q in questions]
    ids = pad_sequence(tokens, batch_first=True).to(vlm.device)  # [B, A]
    given = pad_sequence([row >= 0 for row in tokens], batch_first=True).to(vlm.device)
    text = torch.cat([prefix.suffix_ids.expand(len(ids), -1), ids], dim=1)

    def reward_of(latents: torch.Tensor, patches: Patches, with_attention: bool):
        embeds, filled = with_tokens(vlm, *interleave(latents, prefix.images, patches), text)
        filled[:, -ids.shape[1] :] = given
        slots = torch.arange(embeds.shape[2], device=embeds.device)
        read = slots[-ids.shape[1] - 1 : -1].expand_as(ids)  # the slot before each of the answer's tokens
        think = slots[: -text.shape[1] : 1 + patches.index.shape[2]] if with_attention else None
        logits, attention = vlm.extend(prefix, embeds[:, 0], filled, read=read, probe_rows=think)
        chances = logits.log_softmax(dim=-1).gather(2, ids[..., None])[..., 0]  # [B, A]
        return ((chances * given).sum(dim=1) / given.sum(dim=1))[:, None], attention

    return differentiable(reward_of)


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
