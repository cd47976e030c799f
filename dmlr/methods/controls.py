"""Controls: what a gain must be larger than before latents, patches or the search can be given the credit.

All are one mechanism: DMLR's state for a question, changed, scored once and decoded again, with the same prompt and the
same decoding. So each is paired with DMLR's own answer, and differs from it in one thing. (`random` alone is a loop of
its own, decoded as it is.)

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
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from dmlr.config import Config
from dmlr.data.boxes import checked_boxes, distance, touched
from dmlr.loop.injection import Patches, Retrieval
from dmlr.loop.optimize import State, Trace, example_generator, initial_latents, optimize
from dmlr.loop.score import Score, differentiable, scorer, slots_of
from dmlr.methods.answers import Answer, Method, Question
from dmlr.methods.latent import prefill_latent, question_noise, reasoned, with_notes
from dmlr.methods.prompting import prompts_of
from dmlr.model.cache import Prefix
from dmlr.model.encode import encode
from dmlr.model.vlm import VLM

KEPT = 4096  # states of a model that are kept
_STATES: WeakKeyDictionary[VLM, OrderedDict] = WeakKeyDictionary()


@dataclass
class Batch:
    """B prefilled questions, and what DMLR's loop makes of them where a control asks for it."""

    vlm: VLM
    questions: Sequence[Question]
    prefix: Prefix
    config: Config
    noise: torch.Tensor  # [B, T, M, L, D]
    score_ids: torch.Tensor

    @cached_property
    def start(self) -> torch.Tensor:
        """[B, L, D]"""
        return initial_latents(self.vlm, self.prefix, self.config)

    @property
    def nothing(self) -> Patches:
        return Patches.none(*self.start.shape[:2], self.start.device)

    @cached_property
    def state(self) -> State:
        """What DMLR decodes. Kept per model, question and configuration, so that a run's controls share one loop."""
        device, kept = self.start.device, _STATES.setdefault(self.vlm, OrderedDict())
        images = [[hashlib.blake2b(image.tobytes()).digest() for image in q.images] for q in self.questions]
        keys = [(self.config, q.idx, q.text, *seen) for q, seen in zip(self.questions, images, strict=True)]
        if rows := [row for row, key in enumerate(keys) if key not in kept]:
            part = self.prefix if len(rows) == len(keys) else self.prefix.select(torch.tensor(rows, device=device))
            final = optimize(self.vlm, part, self.config, self.noise[rows], self.score_ids).final
            states = zip(final.latents.cpu(), final.patches.tolist(), strict=True)
            kept |= zip([keys[row] for row in rows], states, strict=True)
        latents, patches = zip(*(kept[key] for key in keys), strict=True)
        while len(kept) > KEPT:
            kept.popitem(last=False)
        return State(torch.stack(latents).to(device), Patches.of(patches, device))

    def drawn(self, draw: Callable[..., torch.Tensor], purpose: str, *shape: int) -> torch.Tensor:
        """[B, *shape] by `torch.randn` or its like; a question's numbers depend on (seed, its idx) only."""
        streams = [example_generator(self.config.seed, q.idx, purpose) for q in self.questions]
        return torch.stack([draw(*shape, generator=stream) for stream in streams]).to(self.prefix.images.device)

    def random_ranking(self, purpose: str, steps: int) -> torch.Tensor:
        """[B, steps, L, N] in [0, 1): what ranks the patches of each step, drawn for a question's own image tokens."""
        mask, shape = self.prefix.image_mask, (steps, self.config.num_thought_tokens)
        ranking = torch.zeros(len(mask), *shape, mask.shape[1], device=mask.device)
        for row, count in enumerate(mask.sum(dim=1).tolist()):
            one = replace(self, questions=self.questions[row : row + 1])
            ranking[row, :, :, :count] = one.drawn(torch.rand, purpose, *shape, count)[0]
        return ranking

    def patches_ranked(self, ranking: torch.Tensor, allowed: torch.Tensor) -> Patches:
        """The first of `ranking` [B, L, N] in [0, 1] among the image tokens `allowed` [B, N]: as many for each think
        token as the loop kept, and at least as many as the loop begins with."""
        retrieve = Retrieval(self.prefix.image_mask, self.config)
        wanted = torch.minimum(retrieve.first_budget[:, None], retrieve.caps)
        wanted = torch.maximum(wanted, self.state.patches.count)
        wanted = torch.minimum(wanted, allowed.sum(dim=1, keepdim=True))  # [B, L]
        order = ranking.masked_fill(~allowed[:, None], -1).sort(dim=2, descending=True, stable=True).indices
        return Patches(order[:, :, : int(wanted.max())], wanted)


# changes: a batch -> the state to decode instead of DMLR's


def unoptimised(batch: Batch) -> State:
    """The think tokens as they are, each with its initial patches as attention ranks them.

    The initial patches are decoded whether or not they raise the reward: nothing is selected here. With
    `visual_injection_start_step` > 0 there are none, as in DMLR before that step.
    """
    config = batch.config.replace(max_num_steps=0, disable_best_reward=True, accept_at="updated")
    state = optimize(batch.vlm, batch.prefix, config, batch.noise, batch.score_ids).final
    return replace(state, patches=state.patches.trimmed())


def displaced(batch: Batch) -> State:
    """A random displacement of the start, for each think token as long as the loop's; no reward chose it."""
    size = (batch.state.latents - batch.start).norm(dim=2, keepdim=True)
    direction = batch.drawn(torch.randn, "displaced", *batch.start.shape[1:])
    return replace(batch.state, latents=batch.start + size * direction / direction.norm(dim=2, keepdim=True))


def gaussian(batch: Batch) -> State:
    """Gaussian vectors with the RMS of each optimised think token."""
    rms = batch.state.latents.pow(2).mean(dim=2, keepdim=True).sqrt()
    return replace(batch.state, latents=rms * batch.drawn(torch.randn, "gaussian", *batch.start.shape[1:]))


def permuted(batch: Batch) -> State:
    """The think tokens, each with its patches, in another order: a random cycle, so that none keeps its place."""
    cycle = batch.drawn(torch.randperm, "permuted", batch.start.shape[1])
    source = torch.empty_like(cycle).scatter_(1, cycle, cycle.roll(1, dims=1))  # [B, L]
    patches = batch.state.patches
    index = patches.index.gather(1, source[..., None].expand_as(patches.index))
    latents = batch.state.latents.gather(1, source[..., None].expand_as(batch.start))
    return State(latents, Patches(index, patches.count.gather(1, source)))


def random_patches(batch: Batch) -> State:
    """Patches of random places instead of the loop's; with `max_num_steps` 0 behind the start's think tokens."""
    ranking = batch.random_ranking("random patches", 1)[:, 0]
    return replace(batch.state, patches=batch.patches_ranked(ranking, batch.prefix.image_mask))


def true_patches(batch: Batch) -> State:
    """An ORACLE: patches of the true object's boxes, the nearest to a box's centre first, instead of the loop's.

    As many as "random-patches" has, at most all that a box touches; none where the dataset says that the object is not
    in the image (no box).
    """
    inside = torch.zeros_like(batch.prefix.image_mask)  # [B, N]
    nearness = torch.zeros_like(inside, dtype=torch.float)
    for row, question in enumerate(batch.questions):
        if (boxes := checked_boxes(question.boxes)) and question.images:
            size, grid = question.images[0].size, encode(batch.vlm, "", "", question.images).patch_grid
            inside[row, : math.prod(grid)] = torch.from_numpy(touched(boxes, size, grid))
            nearness[row, : math.prod(grid)] = 1 / (1 + torch.from_numpy(distance(boxes, size, grid)).float())
    ranking = nearness[:, None].expand(-1, batch.start.shape[1], -1)
    return replace(batch.state, patches=batch.patches_ranked(ranking, inside))


def swapped(batch: Batch) -> State:
    """The optimised latents of another question of the dataset (`Question.partner`), with the features of the patches
    that its loop chose in its own image, which the prefix has from here on."""
    vlm, config, prefix = batch.vlm, batch.config, batch.prefix
    batch.questions = [question.partner() for question in batch.questions]
    theirs, _ = prefill_latent(vlm, batch.questions, config, prompts_of(config))
    noise = torch.stack([question_noise(vlm, q, config) for q in batch.questions])
    state = replace(batch, prefix=theirs, noise=noise).state
    more = theirs.images.shape[1] - prefix.images.shape[1]  # image tokens
    prefix.images = F.pad(theirs.images, (0, 0, 0, max(-more, 0)))
    prefix.image_mask = F.pad(prefix.image_mask, (0, max(more, 0)))
    prefix.image_columns = F.pad(prefix.image_columns, (0, max(more, 0)))
    return state


def oracle_latents(batch: Batch) -> State:
    """An ORACLE, the ceiling: the exact gradient of log p(true answer | prompt, latents, patches), the mean over the
    answer's tokens, by Adam with a step of a tenth of sigma. What no reward could reach through these latents."""
    absolute = batch.config.absolute(batch.vlm.embedding_rms)
    exact = {"use_auto_grad": True, "num_samples": 1, "lr": absolute.sigma / 10, "accept_at": "updated"}
    exact |= {"reward_threshold": -1, "disable_conf_reward": False}
    score = truth_score(batch.vlm, batch.prefix, batch.questions)
    state = optimize(batch.vlm, batch.prefix, absolute.replace(**exact), batch.noise[:, :, :1], score=score).final
    return replace(state, patches=state.patches.trimmed())


def truth_score(vlm: VLM, prefix: Prefix, questions: Sequence[Question]) -> Score:
    """A reward in place of confidence: mean log-probability of the solution's tokens as the answer, with its gradient.

    Of one sample at a time.
    """
    tokens = [torch.tensor(vlm.tokenizer.encode(q.solution, add_special_tokens=False)) for q in questions]
    ids = pad_sequence(tokens, batch_first=True).to(vlm.device)  # [B, A]
    given = pad_sequence([row >= 0 for row in tokens], batch_first=True).to(vlm.device)
    text = torch.cat([prefix.suffix_ids.expand(len(ids), -1), ids], dim=1)

    def reward_of(latents: torch.Tensor, patches: Patches, with_attention: bool):
        embeds, filled = slots_of(vlm, prefix, latents, patches, text)
        filled[:, -ids.shape[1] :] = given
        slots = torch.arange(embeds.shape[2], device=embeds.device)
        read = slots[-ids.shape[1] - 1 : -1].expand_as(ids)  # the slot before each of the answer's tokens
        think = slots[: -text.shape[1] : 1 + patches.index.shape[2]] if with_attention else None
        logits, attention = vlm.extend(prefix, embeds[:, 0], filled, read=read, probe_rows=think)
        chances = logits.log_softmax(dim=-1).gather(2, ids[..., None])[..., 0]  # [B, A]
        return ((chances * given).sum(dim=1) / given.sum(dim=1))[:, None], attention

    return differentiable(reward_of)


# methods: they, and `random`


@dataclass(frozen=True)
class Control:
    """DMLR's state, changed, scored and decoded."""

    name: str
    change: Callable[[Batch], State]
    needs: str = ""  # what a question must have, which a dataset need not say: ValueError without it

    def __call__(self, vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
        if self.needs and any(getattr(question, self.needs) in (None, "") for question in questions):
            raise ValueError(f"{self.name}: the dataset has no {self.needs} for this question")
        details = []

        def loop(vlm: VLM, prefix: Prefix, config: Config, noise: torch.Tensor, ids: torch.Tensor) -> Trace:
            batch = Batch(vlm, questions, prefix, config, noise, ids)
            start, state = batch.start, self.change(batch)
            score, none = scorer(vlm, prefix, config, ids), batch.nothing
            began = score(start[:, None], none)
            reward = score(state.latents[:, None], state.patches, with_attention=False).reward[:, 0]
            sizes = (state.latents - start).pow(2).mean(dim=(1, 2)).sqrt().tolist()
            for source, size in zip(batch.questions, sizes, strict=True):
                details.append({"control": self.name, "loop_of": source.idx, "displacement": float(f"{size:.4g}")})
            return Trace(began.reward[:, 0], began.attention, reward, none.count[:, 0], state)

        answers = reasoned(vlm, questions, config, loop)
        for answer, own in zip(answers, details, strict=True):
            answer.details |= own | ({"oracle": True} if self.needs in ("boxes", "solution") else {})
            if self.change is swapped:  # the patches lie in another image
                answer.details["patches"] = answer.reasoning.patches
                answer.reasoning.patches = [[] for _ in answer.reasoning.patches]
        return with_notes(answers, questions)


def random(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """Random search by the same reward with as many evaluations: DMLR's loop without its update and its retrieval.

    In an iteration of DMLR M + 1 states go through the model (`accept_at` "candidate": 2 M); here as many displacements
    of the start, with patches drawn at random; the best is kept, with its patches, where it raises the best reward.
    sigma, its decay, the patch budget and its growth are DMLR's; the random numbers come from (seed, idx) alone.
    """

    def loop(vlm: VLM, prefix: Prefix, config: Config, noise: torch.Tensor, ids: torch.Tensor) -> Trace:
        batch = Batch(vlm, questions, prefix, config, noise, ids)
        noise = batch.drawn(torch.randn, "random", config.max_num_steps, config.evaluations, *noise.shape[3:])
        ranking = batch.random_ranking("patches", config.max_num_steps)
        return optimize(vlm, prefix, config, noise, ids, ranking=ranking)

    return with_notes(reasoned(vlm, questions, config.replace(use_auto_grad=False), loop), questions)


CONTROLS: dict[str, Method] = {"random": random} | {
    control.name: control
    for control in (
        Control("unoptimised", unoptimised),
        Control("swapped", swapped, needs="partner"),
        Control("displaced", displaced),
        Control("zero", lambda batch: replace(batch.state, latents=torch.zeros_like(batch.start))),
        Control("gaussian", gaussian),
        Control("permuted", permuted),
        Control("latents-only", lambda batch: replace(batch.state, patches=batch.nothing)),
        Control("patches-only", lambda batch: replace(batch.state, latents=batch.start)),
        Control("random-patches", random_patches),
        Control("true-patches", true_patches, needs="boxes"),
        Control("oracle-latents", oracle_latents, needs="solution"),
    )
}
