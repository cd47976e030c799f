"""What if a patch were left out, a think token frozen, the seed another one: the loop and the model asked again.

Changes of one question go through as one batch. Knows nothing about figures or widgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dmlr.look.walk import Walk, answers_from, parts
from dmlr.loop.injection import Patches
from dmlr.loop.optimize import State, optimize
from dmlr.loop.score import scorer
from dmlr.methods.latent import question_noise


@dataclass(frozen=True)
class Change:
    """What is different in a what-if. Nothing: the answer as it was.

    drop: (think token, image token) pairs left out when the answer is decoded; freeze: think tokens whose latents stay
    at the start, the loop run again without noise on them; seed: the loop run again with another noise.
    """

    drop: frozenset[tuple[int, int]] = frozenset()
    freeze: frozenset[int] = frozenset()
    seed: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a change: the state decoded, its answer and its own reward."""

    change: Change
    patches: list[list[int]]
    latents: torch.Tensor  # [L, D]
    reward: float
    best_step: int
    answer: str
    is_right: bool | None


def try_changes(walk: Walk, changes: Sequence[Change]) -> list[Outcome]:
    """Each change tried on its own. Loops that have to run again run as one batch; so does the decoding.

    Raises ValueError for a think token or a patch that is not there, and for `freeze` or `seed` under the exact
    gradient (`use_auto_grad`), which has no noise to hold back or to change.
    """
    for change in changes:
        _check(walk, change)
    length, keys = walk.config.num_thought_tokens, [(change.seed, change.freeze) for change in changes]
    again = list(dict.fromkeys(key for key in keys if key != (None, frozenset())))
    finals, steps = [walk.trace.final], walk.trace.best_step.tolist()
    if again:
        noise = torch.stack([_noise(walk, *key) for key in again])
        prefix = walk.prefix.select(walk.prefix.next_position.new_zeros(len(again)))
        trace = optimize(walk.vlm, prefix, walk.config, noise, walk.ids)
        finals.append(trace.final)
        steps += trace.best_step.tolist()
    latents = torch.cat([state.latents for state in finals])  # the original, then those run again
    kept = [row for state in finals for row in state.patches.tolist()]
    rows = [1 + again.index(key) if key in again else 0 for key in keys]
    patches = [
        [[p for p in kept[row][token] if (token, p) not in change.drop] for token in range(length)]
        for row, change in zip(rows, changes, strict=True)
    ]
    states = State(latents[rows], Patches.of(patches, latents.device))
    decoded = answers_from(walk.vlm, walk.prefix, walk.config, states)
    rewards = _rewards(walk, states)
    return [
        Outcome(
            change=change,
            patches=patches[i],
            latents=states.latents[i].cpu(),
            reward=rewards[i],
            best_step=steps[rows[i]],
            answer=decoded[i].text,
            is_right=walk.is_right(decoded[i].text, decoded[i].stop_reason),
        )
        for i, change in enumerate(changes)
    ]


def usual_changes(walk: Walk, seeds: int = 3) -> list[Change]:
    """What one asks first: nothing; without each kept patch, and without any; each think token frozen; other seeds."""
    kept = [(token, patch) for token, patches in enumerate(walk.dmlr.reasoning.patches) for patch in patches]
    changes = [Change(), *(Change(drop=frozenset([pair])) for pair in kept)]
    changes += [Change(drop=frozenset(kept))] * (len(kept) > 1)
    if walk.config.use_auto_grad or not walk.trace.steps:
        return changes
    changes += [Change(freeze=frozenset([token])) for token in range(walk.config.num_thought_tokens)]
    return changes + [Change(seed=walk.config.seed + n) for n in range(1, seeds + 1)]


# the pieces


def _rewards(walk: Walk, states: State) -> list[float]:
    found = []
    for prefix, part in parts(walk.vlm, walk.prefix, walk.config, states):
        score = scorer(walk.vlm, prefix, walk.config, walk.ids)
        found += score(part.latents[:, None], part.patches, with_attention=False).reward[:, 0].tolist()
    return found


def _noise(walk: Walk, seed: int | None, freeze: frozenset[int]) -> torch.Tensor:
    """[T, M, L, D]. Where there is no noise REINFORCE moves nothing."""
    config = walk.config if seed is None else walk.config.replace(seed=seed)
    noise = question_noise(walk.vlm, walk.question, config).clone()
    noise[:, :, sorted(freeze)] = 0
    return noise


def _check(walk: Walk, change: Change) -> None:
    length, count = walk.config.num_thought_tokens, len(walk.encoded.image_columns)
    tokens = {*change.freeze, *(token for token, _ in change.drop)}
    if wrong := [token for token in tokens if not 0 <= token < length]:
        raise ValueError(f"there is no think token {wrong[0] + 1}; there are {length}")
    if wrong := [patch for _, patch in change.drop if not 0 <= patch < count]:
        raise ValueError(f"there is no image token {wrong[0]}; there are {count}")
    if walk.config.use_auto_grad and (change.freeze or change.seed is not None):
        raise ValueError("the exact gradient (use_auto_grad) uses no noise: there is none to hold back or to change")
