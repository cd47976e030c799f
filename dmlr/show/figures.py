"""Figures of one question: one moment of the loop, and several beside each other. Draws from data.

An image without tokens of its own on a grid (a text-only question) gives an empty panel that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from dmlr.show.plots import METHOD_COLOURS, Grid, draw_image, figure, outline, styled

DARK, REJECTED = "#1f2328", "#9aa0a6"


@dataclass(frozen=True)
class Heat:
    """What is drawn over an image: attention [L, N] of the think tokens, row-major on its grid, and their patches."""

    attention: Any
    patches: Sequence[Sequence[int]]
    token: int | None = None  # the think token that is shown; None: the mean of all, and every token's patches
    title: str = ""
    solid: bool = True  # outlines of patches that stayed; dashed: tried and dropped again

    def on(self, grid: Grid) -> np.ndarray:
        """Attention [height, width] on the first image's grid."""
        rows = np.asarray(self.attention, dtype=float)[:, : grid[0] * grid[1]]
        return (rows.mean(axis=0) if self.token is None else rows[self.token]).reshape(grid)


def brightest(heats: Sequence[Heat], grid: Grid) -> float:
    """The largest attention that any of them shows: one scale for all."""
    return max(float(heat.on(grid).max(initial=0)) for heat in heats)


@styled
def moment(
    image: Image.Image | None,
    grid: Grid,
    heat: Heat,
    curve: Sequence[tuple[float, bool]],
    iteration: int,
    limit: float | None = None,
) -> Figure:
    """Left what the think tokens attend to and which patches they try, right the reward with this iteration marked.

    curve: per iteration, 0 the start, the reward of the state tried and whether it was kept; limit: attention that
    leaves the image as bright as it is, the same for all moments that are compared (none: the most there is).
    """
    fig, axes = figure(1, 2, (8.6, 3.9), width_ratios=(1, 1.25))
    left, right = axes[0]
    over_image(left, image, grid, heat, brightest([heat], grid) if limit is None else limit)
    tried = pd.DataFrame(curve, columns=["reward", "kept"])
    tried.loc[0, "kept"] = True
    kept, dropped, blue = tried["reward"].where(tried["kept"]), tried[~tried["kept"]], METHOD_COLOURS["dmlr"]
    right.plot(kept.ffill(), color=blue, linewidth=1.6, drawstyle="steps-post")
    right.plot(kept, "o", color=blue)
    right.plot(dropped["reward"], "o", markerfacecolor="white", markeredgecolor=REJECTED)
    right.axvline(iteration, color=DARK, linewidth=0.9, alpha=0.5)
    right.plot(iteration, tried["reward"][iteration], "o", markersize=13, fillstyle="none", color=DARK)
    right.set(title="Reward: filled where the state was kept", xlabel="iteration", ylabel="reward")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    return fig


@styled
def strip(image: Image.Image | None, grid: Grid, heats: Sequence[Heat], columns: int = 4) -> Figure:
    """Heats beside each other, so many in a row; one scale for all."""
    columns = min(columns, len(heats))
    rows = -(-len(heats) // columns)
    fig, axes = figure(rows, columns, (2.35 * columns, 2.6 * rows))
    limit = brightest(heats, grid)
    for axis, heat in zip(axes.flat, heats, strict=False):
        over_image(axis, image, grid, heat, limit)
        axis.set_title(heat.title, fontsize=8.5, fontweight="normal")
    for axis in axes.flat[len(heats) :]:
        axis.set_axis_off()
    return fig


def over_image(axis: Axes, image: Image.Image | None, grid: Grid, heat: Heat, limit: float) -> None:
    """The image, darker where it is attended to less, with the patches outlined in their think token's colour."""
    axis.set_title(heat.title)
    if image is None or not grid[0] * grid[1]:
        axis.text(0.5, 0.5, "no image: no patches", ha="center", va="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    draw_image(axis, image)
    shade = np.zeros((*grid, 4))
    shade[..., 3] = 0.5 * (1 - np.clip(heat.on(grid) / (limit or 1.0), 0, 1))
    axis.imshow(shade, extent=(0, image.width, image.height, 0), interpolation="nearest")
    patches = [some if heat.token in (None, token) else [] for token, some in enumerate(heat.patches)]
    outline(axis, image, patches, grid, "-" if heat.solid else (0, (2, 1.2)))
