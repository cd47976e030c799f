"""What a displaced think token means to the models that listen: how much it is a hypothesis about each object.

An object's direction is its merged visual feature in the leading principal components of such features, whitened. A
hypothesis is a softmax over the cosines between displacement and directions, with a constant for "none of them".

Knows nothing about questions, targets or training.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from data.shapes.scenes import SEEK, Scene, Thing, random_scene, render
from notebooks.training.learner import see
from notebooks.training.packing import pixel_rows


@torch.no_grad()
def look_at(model, scenes: Sequence[Scene]) -> torch.Tensor:
    """Merged visual features [B, IMAGE_TOKENS, D]."""
    return see(model, torch.from_numpy(np.concatenate([pixel_rows(render(scene)) for scene in scenes])))[0]


class Landscape:
    """Directions of objects in `rank` dimensions; `tau` is the size of a hypothesis, per dimension.

    `sharpness` is the factor on cosines, `none` the logit of no hypothesis.
    """

    def __init__(self, model, tau: float, rank: int, sharpness: float, none: float, scenes: int = 300):
        self.tau, self.sharpness, self.none = tau, sharpness, none
        rng = random.Random("landscape")
        drawn = [random_scene(rng, "train", SEEK) for _ in range(scenes)]
        seen = torch.cat([look_at(model, drawn[i : i + 50]) for i in range(0, scenes, 50)])
        objects = torch.cat([seen[i, cells(scene.things)] for i, scene in enumerate(drawn)])
        self.mean = objects.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((objects - self.mean).T))
        self.basis = vectors[:, -rank:]  # [D, r], orthonormal
        self.scale = values[-rank:].sqrt()

    def directions(self, features: torch.Tensor) -> torch.Tensor:
        """Unit vectors [..., r] of visual features [..., D]."""
        return F.normalize((features - self.mean) @ self.basis / self.scale, dim=-1)

    def displacement(self, directions: torch.Tensor, size: float = 4.0) -> torch.Tensor:
        """Displacements [..., D] that are hypotheses about the objects of these directions [..., r]."""
        return self.tau * size * directions @ self.basis.T

    def weights(self, displacements: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """Mass [K, L, N] on each of N objects, at each think token; what is missing to one is on none.

        displacements: [K, L, D]; a think token's hypothesis is the mean of those up to it. directions: [N, r].
        """
        count = torch.arange(1, displacements.shape[1] + 1)[:, None]
        inside = (displacements @ self.basis).cumsum(1) / count / self.tau  # [K, L, r]
        size = inside.norm(dim=-1, keepdim=True)
        cosine = inside / size.clamp(min=1e-6) @ directions.T * (2 * size).clamp(max=1)  # fades in below .5
        return F.pad(self.sharpness * cosine, (0, 1), value=self.none).softmax(-1)[..., :-1]


def cells(things: Sequence[Thing]) -> list[int]:
    return [thing.cell for thing in things]
