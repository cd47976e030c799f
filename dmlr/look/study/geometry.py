"""Where think tokens lie among the embeddings of text and image, in the language model's input space.

Collected from a few questions; drawn by PCA and t-SNE (arXiv 2512.12623, fig. 10 C), and measured without a projection.
Knows nothing about figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from dmlr.config import Config
from dmlr.methods.answers import Answer, Question
from dmlr.methods.latent import prefill_latent
from dmlr.methods.prompting import prompts_of
from dmlr.model.vlm import VLM

TEXT, IMAGE, START, END = "text", "image", "think, start", "think, optimised"
KINDS = (TEXT, IMAGE, START, END)


@dataclass
class Embeddings:
    """n input embeddings [n, D], float32, of what kind (KINDS) each is and of which question."""

    points: np.ndarray
    kind: np.ndarray
    question: np.ndarray

    def sample(self, most: int, seed: int) -> Embeddings:
        """At most so many of each kind, none twice (a word is the same point wherever it stands): for a picture."""
        rng, kept = np.random.default_rng(seed), []
        for kind in KINDS:
            rows = np.flatnonzero(self.kind == kind)
            if len(rows):
                rows = rows[np.sort(np.unique(self.points[rows], axis=0, return_index=True)[1])]
                kept.append(np.sort(rng.permutation(rows)[:most]))
        chosen = np.concatenate(kept) if kept else np.zeros(0, dtype=int)
        return Embeddings(self.points[chosen], self.kind[chosen], self.question[chosen])

    @property
    def directions(self) -> np.ndarray:
        """[n, D], every point at length one."""
        return self.points / np.linalg.norm(self.points, axis=1, keepdims=True).clip(min=1e-12)


@torch.no_grad()
def collect(
    vlm: VLM, questions: Sequence[Question], answers: Sequence[Answer], config: Config, batch_size: int = 16
) -> Embeddings:
    """Embeddings of every prompt's text and image tokens, and of the think tokens at the start and as decoded.

    answers: DMLR's, in the order of the questions; one without latents is left out. Image tokens are the merged visual
    features as the language model gets them, without DeepStack's.
    """
    points, kinds, owners = [], [], []
    pairs = [(q, a) for q, a in zip(questions, answers, strict=True) if a.reasoning is not None]
    start = vlm.embed(torch.tensor([vlm.think_id])).float().cpu()
    for first in range(0, len(pairs), batch_size):
        batch = pairs[first : first + batch_size]
        prefix, encoded = prefill_latent(vlm, [q for q, _ in batch], config, prompts_of(config))
        for row, ((_, answer), one) in enumerate(zip(batch, encoded, strict=True)):
            text = one.input_ids[one.input_ids != vlm.image_token_id]
            latents = answer.reasoning.latents.float()
            parts = {
                TEXT: vlm.embed(text).float().cpu(),
                IMAGE: prefix.images[row][prefix.image_mask[row]][:, : latents.shape[1]].float().cpu(),
                START: start.expand(len(latents), -1),
                END: latents,
            }
            for kind, rows in parts.items():
                points.append(rows.numpy())
                kinds += [kind] * len(rows)
                owners += [first + row] * len(rows)
    stacked = np.concatenate(points) if points else np.zeros((0, vlm.text_config.hidden_size), dtype=np.float32)
    return Embeddings(stacked, np.array(kinds, dtype=object), np.array(owners, dtype=int))


def by_pca(found: Embeddings, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Two principal components of the directions, columns x, y, kind; and the share of the variance each explains.

    Of directions and not of the points, since where image features are many times longer than words, components of
    the points show nothing else.
    """
    pca = PCA(n_components=2, random_state=seed)
    return _flat(pca.fit_transform(found.directions), found), pca.explained_variance_ratio_


def by_tsne(found: Embeddings, seed: int = 0) -> pd.DataFrame:
    """t-SNE of the directions, columns x, y, kind. Neighbours mean something, distances between groups do not.

    In one thread: for so few points that is fastest, and on a busy machine twenty times so.
    """
    perplexity = min(30.0, (len(found.points) - 1) / 3)
    tsne = TSNE(init="pca", perplexity=perplexity, random_state=seed)
    with threadpool_limits(1):
        return _flat(tsne.fit_transform(found.directions), found)


def lengths(found: Embeddings) -> pd.DataFrame:
    """A row per kind: kind, n, median length of its embeddings."""
    size = np.linalg.norm(found.points, axis=1)
    rows = [(kind, int((found.kind == kind).sum()), size[found.kind == kind]) for kind in KINDS]
    return pd.DataFrame(
        [(kind, n, float(np.median(some)) if n else np.nan) for kind, n, some in rows], columns=["kind", "n", "length"]
    )


def neighbours(found: Embeddings) -> pd.DataFrame:
    """A row per think token and moment, measured in the whole space.

    Columns question, moment (START, END), norm (relative to the start's), moved (distance from the start, relative to
    its norm), to_text and to_image (cosine to the nearest text and image token of the same question), nearer_image (1
    where the image token is the nearer one). The text token that think tokens start from does not count as a neighbour.
    Questions without an image have no row.
    """
    rows = []
    for question in np.unique(found.question):
        of = {kind: found.points[(found.question == question) & (found.kind == kind)] for kind in KINDS}
        if not len(of[IMAGE]) or not len(of[START]):
            continue
        start = of[START][0]
        text = of[TEXT][np.abs(of[TEXT] - start).max(axis=1) > 0]
        for moment in (START, END):
            to_text, to_image = _cosines(of[moment], text).max(axis=1), _cosines(of[moment], of[IMAGE]).max(axis=1)
            for point, near, seen in zip(of[moment], to_text, to_image, strict=True):
                size = float(np.linalg.norm(start))
                rows.append(
                    {
                        "question": int(question),
                        "moment": moment,
                        "norm": float(np.linalg.norm(point)) / size,
                        "moved": float(np.linalg.norm(point - start)) / size,
                        "to_text": float(near),
                        "to_image": float(seen),
                        "nearer_image": float(seen > near),
                    }
                )
    return pd.DataFrame(rows)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[len(a), len(b)]."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(min=1e-12) for x in (a, b))
    return a @ b.T


def _flat(xy: np.ndarray, found: Embeddings) -> pd.DataFrame:
    return pd.DataFrame({"x": xy[:, 0], "y": xy[:, 1], "kind": found.kind})
