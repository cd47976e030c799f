"""Studied examples as tables, a row per word, chain, step or attention share: what is averaged and drawn.

Columns `question` (dataset and idx) and `image` say which rows belong together. Knows nothing about models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from dmlr.look.study import Studied
from dmlr.look.study.boxes import share_inside, share_kept, touched
from dmlr.look.study.confidence import gains, grounded
from dmlr.look.study.words import class_of, places, singular, vocabulary, words


def word_table(found: Sequence[Studied], classes: Mapping[str, re.Pattern]) -> pd.DataFrame:
    """A row per word of every chain of a question with an image.

    Columns question, image, position, word, start, end, kind (its class), asked (the question holds the word), and a
    column per perturbation: the word's visual dependency in nats, the sum over its tokens.
    """
    rows = []
    for one in found:
        chain, spans, known = one.chain, words(one.chain.text), vocabulary(one.question.text)
        if not chain.perturbed:
            continue
        owner = places(chain.text, chain.ends, spans)
        sums = {kind: _sums(chain.dependency(kind).tolist(), owner, len(spans)) for kind in chain.perturbed}
        for n, span in enumerate(spans):
            text = chain.text[span.start : span.end]
            rows.append(
                {
                    **_who(one),
                    "position": n,
                    "word": text,
                    "start": span.start,
                    "end": span.end,
                    "kind": class_of(chain.text, span, classes),
                    "asked": singular(text) in known,
                    **{kind: values[n] for kind, values in sums.items()},
                }
            )
    return pd.DataFrame(rows)


def chain_table(found: Sequence[Studied]) -> pd.DataFrame:
    """A row per chain: question, image, right, tokens, and per perturbation the mean dependency of its tokens."""
    return pd.DataFrame(
        {
            **_who(one),
            "right": one.right,
            "tokens": len(one.chain.ids),
            **{kind: float(one.chain.dependency(kind).mean()) for kind in one.chain.perturbed},
        }
        for one in found
        if len(one.chain.ids)
    )


def step_table(found: Sequence[Studied], place: re.Pattern | None, board: int, margin: float = 0.0) -> pd.DataFrame:
    """A row per reasoning step.

    Columns question, image, right (the chain's answer), step (from 1), text, before and after (log π of the true
    answer), gain, positive (gain > margin, as 0 or 1), grounded (True, False or None; see `confidence.grounded`),
    confidence (mean probability of its tokens), and per perturbation the mean dependency of its tokens.
    """
    rows = []
    for one in found:
        chain = one.chain
        owner = places(chain.text, chain.ends, one.steps)
        for n, (span, gain) in enumerate(zip(one.steps, gains(chain.truth), strict=False)):
            own = np.array([at == n for at in owner])
            text = chain.text[span.start : span.end].strip()
            told = grounded(text, place, board, one.boxes, one.size) if place and one.size else None
            rows.append(
                {
                    **_who(one),
                    "right": one.right,
                    "step": n + 1,
                    "text": text,
                    "before": chain.truth[n],
                    "after": chain.truth[n + 1],
                    "gain": gain,
                    "positive": float(gain > margin),
                    "grounded": told,
                    "confidence": _mean(chain.log_probs.exp().numpy(), own),
                    **{kind: _mean(chain.dependency(kind).numpy(), own) for kind in chain.perturbed},
                }
            )
    return pd.DataFrame(rows).astype({"grounded": object}) if rows else pd.DataFrame(rows)


MOMENTS = ("vanilla answer", "answer after DMLR", "think tokens, start", "think tokens, end")


def share_table(found: Sequence[Studied]) -> pd.DataFrame:
    """A row per question with a box: how much lies on the patches that the asked objects touch.

    Columns question, image, chance (share of those patches); of the attention, MOMENTS: the positions that predict the
    tokens of an answer, vanilla's and DMLR's, and the think tokens at the start and in the last iteration; kept patches
    (their share, nan where none were kept) and kept (their number); and how much of each attention goes to the image at
    all (`... on image`).
    """
    rows = []
    for one in found:
        if not usable_boxes(one):
            continue
        inside, latent = inside_of(one), one.latent.reasoning
        said = (one.chain.attention[1:], one.latent_attention[1:])
        attention = dict(zip(MOMENTS, (*said, latent.attention[0], latent.attention[-1]), strict=True))
        cells = len(inside)
        rows.append(
            {
                **_who(one),
                "chance": float(inside.mean()),
                **{moment: share_inside(weights[..., :cells].numpy(), inside) for moment, weights in attention.items()},
                "kept patches": share_kept(latent.patches, inside),
                "kept": sum(map(len, latent.patches)),
                **{f"{m} on image": float(w.float().sum(dim=-1).mean()) for m, w in attention.items()},
            }
        )
    return pd.DataFrame(rows)


def share_over_iterations(found: Sequence[Studied]) -> pd.DataFrame:
    """A row per question with a box and iteration: question, image, iteration (0 is the start), share, chance."""
    rows = []
    for one in found:
        if not usable_boxes(one):
            continue
        inside = inside_of(one)
        for iteration, weights in enumerate(one.latent.reasoning.attention):
            share = share_inside(weights[..., : len(inside)].numpy(), inside)
            rows.append({**_who(one), "iteration": iteration, "share": share, "chance": float(inside.mean())})
    return pd.DataFrame(rows)


def usable_boxes(one: Studied) -> bool:
    """Whether attention inside the boxes can be measured: an image, a box, and patches outside of it."""
    if not one.boxes or not one.size or one.latent.reasoning is None or not np.prod(one.chain.patch_grid):
        return False
    return 0 < inside_of(one).mean() < 1


def inside_of(one: Studied) -> np.ndarray:
    """Patches of the first image that an asked object touches, bool [N]."""
    return touched(one.boxes, one.size, one.chain.patch_grid)


def _who(one: Studied) -> dict[str, str]:
    return {"question": one.key, "image": str(one.example.image or one.key), "dataset": one.dataset}


def _sums(values: Sequence[float], owner: Sequence[int | None], count: int) -> list[float]:
    sums = [0.0] * count
    for value, at in zip(values, owner, strict=True):
        if at is not None:
            sums[at] += value
    return sums


def _mean(values: np.ndarray, mask: np.ndarray) -> float:
    return float(values[mask].mean()) if mask.any() else math.nan
