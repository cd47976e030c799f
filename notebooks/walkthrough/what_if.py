"""What if a patch were left out, a think token frozen, the seed another one: the loop and the model asked again.

Changes of one question go through as one batch. Knows nothing about figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dmlr.loop.optimize import optimize
from dmlr.methods.latent import question_noise
from notebooks.walkthrough.walk import State, Walk, read


@dataclass(frozen=True)
class Change:
    """What is different in a what-if. Nothing: the answer as it was.

    drop: (think token, image token) pairs left out when the answer is decoded; freeze: think tokens whose latents stay
    at the start, the loop run again without noise on them; seed: the loop run again with another noise.
    """

    drop: frozenset[tuple[int, int]] = frozenset()
    freeze: frozenset[int] = frozenset()
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome(State):
    """What came of a change: the state decoded."""

    change: Change


def try_changes(walk: Walk, changes: Sequence[Change]) -> list[Outcome]:
    """Each change tried on its own. Loops that have to run again run as one batch; so does the decoding.

    Raises ValueError for `freeze` or `seed` under the exact gradient (`use_auto_grad`), which has no noise to hold
    back or to change.
    """
    if walk.config.use_auto_grad and any(change.freeze or change.seed is not None for change in changes):
        raise ValueError("the exact gradient (use_auto_grad) uses no noise: there is none to hold back or to change")
    ends = {(None, frozenset()): (walk.trace.final, 0)}  # of each loop, by seed and frozen tokens: states and row
    again = [key for key in dict.fromkeys((change.seed, change.freeze) for change in changes) if key not in ends]
    if again:
        noise = torch.stack([_noise(walk, *key) for key in again])
        final = optimize(walk.vlm, walk.prefixes(len(again)), walk.config, noise, walk.ids).final
        ends |= {key: (final, row) for row, key in enumerate(again)}
    latents, patches = [], []
    for change in changes:
        state, row = ends[change.seed, change.freeze]
        latents.append(state.latents[row])
        kept = enumerate(state.patches.tolist()[row])
        patches.append([[p for p in some if (token, p) not in change.drop] for token, some in kept])
    states = read(walk, torch.stack(latents), patches)
    return [Outcome(**vars(state), change=change) for change, state in zip(changes, states, strict=True)]


def usual_changes(walk: Walk, seeds: int = 3) -> list[Change]:
    """What one asks first: nothing; without each kept patch, and without any; each think token frozen; other seeds."""
    kept = [(token, patch) for token, patches in enumerate(walk.dmlr.reasoning.patches) for patch in patches]
    changes = [Change(), *(Change(drop=frozenset([pair])) for pair in kept)]
    changes += [Change(drop=frozenset(kept))] * (len(kept) > 1)
    if walk.config.use_auto_grad or not walk.trace.steps:
        return changes
    changes += [Change(freeze=frozenset([token])) for token in range(walk.config.num_thought_tokens)]
    return changes + [Change(seed=walk.config.seed + n) for n in range(1, seeds + 1)]


def _noise(walk: Walk, seed: int | None, freeze: frozenset[int]) -> torch.Tensor:
    """[T, M, L, D]. Where there is no noise REINFORCE moves nothing."""
    config = walk.config if seed is None else walk.config.replace(seed=seed)
    noise = question_noise(walk.vlm, walk.question, config).clone()
    noise[:, :, sorted(freeze)] = 0
    return noise
