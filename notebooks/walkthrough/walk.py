"""One question, opened up: every state that the loop tried, and what the model would have answered from it.

Runs the method's own steps (methods/latent.py) and keeps what a benchmark throws away. Knows nothing about figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from dmlr.config import Config
from dmlr.data.examples import Example
from dmlr.loop.injection import Patches, interleave, reward_slots
from dmlr.loop.optimize import Trace, initial_latents, optimize
from dmlr.loop.score import scorer
from dmlr.methods import METHODS
from dmlr.methods.answers import Answer, Question
from dmlr.methods.latent import append_latents, reasoned, with_notes
from dmlr.methods.prompting import decode
from dmlr.model.cache import Prefix
from dmlr.model.decode import Decoded
from dmlr.model.memory import Work
from dmlr.model.vlm import VLM
from dmlr.run.verdicts import verdict_of

NextTokens = list[list[tuple[str, float]]]  # per think token, the most probable next tokens with their probabilities


@dataclass(frozen=True, kw_only=True)
class State:
    """Think tokens, and what the model makes of them. L think tokens, N image tokens, numbered as in `Encoded`."""

    latents: torch.Tensor  # [L, D], on the CPU
    patches: list[list[int]]  # per think token
    reward: float
    next_tokens: NextTokens  # what the reward reads with "think"
    answer: str
    is_right: bool | None  # None without a ground truth


@dataclass(frozen=True, kw_only=True)
class Moment(State):
    """The state that an iteration tried; iteration 0 is the start."""

    iteration: int
    accepted: bool  # it became the best one
    sigma: float  # noise that led to it; 0 at the start
    attention: torch.Tensor  # [L, N], what ranked its patches


@dataclass
class Walk:
    """A question with its two answers and every moment of the loop; what a what-if starts from (what_if.py)."""

    vlm: VLM
    config: Config  # sigma and lr in embedding units
    example: Example
    question: Question
    vanilla: Answer
    dmlr: Answer
    prefix: Prefix  # one row, up to the first think token
    trace: Trace
    ids: torch.Tensor  # tokens that ask for a self score
    moments: list[Moment] = field(default_factory=list)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the first image in image tokens."""
        return self.dmlr.reasoning.patch_grid

    def prefixes(self, count: int) -> Prefix:
        """The prefix, `count` times; what goes on from a copy leaves the prefix as it is."""
        return self.prefix.select(self.prefix.next_position.new_zeros(count))

    def is_right(self, said: Answer | Decoded) -> bool | None:
        """The rules' verdict; None without a ground truth, or where there is no answer to judge."""
        if not self.example.solution:
            return None
        return verdict_of(self.example, said.text, said.stop_reason)["is_correct"]


def explore(vlm: VLM, config: Config, example: Example, images: Sequence[Image.Image], top: int = 5) -> Walk:
    """Vanilla and DMLR on one question, and every state that the loop tried with the answer decoded from it.

    `top` next tokens are kept for each think token. Raises PromptError for a question that the model cannot be
    given.
    """
    config, question = config.absolute(vlm.embedding_rms), Question(example.idx, example.question, list(images))
    seen = {}

    def watched(vlm: VLM, prefix: Prefix, config: Config, noise: torch.Tensor, ids: torch.Tensor) -> Trace:
        copy = prefix.select(prefix.next_position.new_zeros(1))  # the answer is appended to the other
        seen.update(prefix=copy, trace=optimize(vlm, prefix, config, noise, ids), ids=ids)
        return seen["trace"]

    (vanilla,) = METHODS["vanilla"](vlm, [question], config)
    (dmlr,) = with_notes(reasoned(vlm, [question], config, watched), [question])
    walk = Walk(vlm, config, example, question, vanilla, dmlr, **seen)
    record, tried = dmlr.reasoning, [step.tried.latents for step in walk.trace.steps]
    latents = torch.cat([initial_latents(vlm, walk.prefix, config), *tried])
    patches = [[[] for _ in range(config.num_thought_tokens)], *record.patch_history]
    steps = [{"reward": record.start_reward, "is_new_best": False, "sigma": 0.0}, *record.steps]
    walk.moments = [
        Moment(
            **vars(state) | {"reward": step["reward"]},
            iteration=t,
            accepted=step["is_new_best"],
            sigma=step["sigma"],
            attention=record.attention[t].float(),
        )
        for t, (step, state) in enumerate(zip(steps, read(walk, latents, patches, top), strict=True))
    ]
    return walk


@torch.no_grad()
def read(walk: Walk, latents: torch.Tensor, patches: Sequence[list[list[int]]], top: int = 1) -> list[State]:
    """S states of the walk's question, latents [S, L, D] with patches, as many at a time as fit."""
    vlm, config, length = walk.vlm, walk.config, latents.shape[1]
    slots = length * (1 + max(len(group) for kept in patches for group in kept))
    size = vlm.fitting_batch(Work(walk.prefix.mask.shape[1], 0, slots, length, slots, 1, config.max_new_tokens))
    found = []
    for at in range(0, len(latents), size):
        some, kept = latents[at : at + size], patches[at : at + size]
        prefix, part = walk.prefixes(len(some)), Patches.of(kept, latents.device)
        rewards = scorer(vlm, prefix, config, walk.ids)(some[:, None], part, with_attention=False).reward[:, 0]
        embeds, filled = interleave(some[:, None], prefix.images, part)
        logits, _ = vlm.extend(prefix, embeds[:, 0], filled, read=reward_slots(part, "think"))
        best = logits.softmax(dim=-1).topk(min(top, logits.shape[-1]), dim=-1)  # [S, L, top]
        append_latents(vlm, prefix, some, part)
        said = decode(vlm, prefix, config)
        for row, (answer, reward) in enumerate(zip(said, rewards.tolist(), strict=True)):
            ranked = zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True)
            next_tokens = [[(vlm.tokenizer.decode([i]), p) for i, p in zip(*token, strict=True)] for token in ranked]
            state = {"latents": some[row].cpu(), "patches": kept[row], "reward": reward, "next_tokens": next_tokens}
            found.append(State(**state, answer=answer.text, is_right=walk.is_right(answer)))
    return found
