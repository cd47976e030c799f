"""Figures from data; computes nothing that a result rests on.

Every function takes plain data and returns the Figure; `page.show` puts one on a page with its caption. One style, one
colour per method, all colour-blind safe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

Grid = tuple[int, int]  # (height, width) in image tokens

METHOD_COLOURS = {"vanilla": "#8a8f98", "dmlr": "#0b6fa4"}
OTHER_COLOURS = sns.color_palette("colorblind").as_hex()
# Okabe and Ito's palette without black and grey: one colour per think token, repeated beyond seven.
TOKEN_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
STYLE = {
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#3b4148",
    "axes.edgecolor": "#9aa0a6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#ececea",
    "xtick.color": "#5b636d",
    "ytick.color": "#5b636d",
    "legend.frameon": False,
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in the project's style and leaves matplotlib's settings as they were."""
    return mpl.rc_context(STYLE)(draw)


def figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure, known to no window manager, with a grid of axes [rows, columns]."""
    fig = Figure(figsize=size, layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **options)


def colour(method: str, position: int = 0) -> str:
    """A method's colour in every figure."""
    return METHOD_COLOURS.get(method) or OTHER_COLOURS[(position + 1) % len(OTHER_COLOURS)]


@styled
def rewards_over_iterations(table: pd.DataFrame) -> Figure:
    """Thin line per example and mean with its 95 % band.

    table: one row per example and iteration with columns example, iteration, tried (reward of the state tried in that
    iteration) and best (best so far).
    """
    fig, axes = figure(1, 2, (8.6, 3.3), sharey=True)
    titles = {"tried": "Reward of the state tried", "best": "Best reward so far"}
    thin = table[table["example"].isin(table["example"].drop_duplicates().iloc[:150])]
    for axis, (column, title) in zip(axes[0], titles.items(), strict=True):
        for _, one in thin.groupby("example", sort=False):
            axis.plot(one["iteration"], one[column], color="#b9c4cd", linewidth=0.5, alpha=0.35)
        mean = {"color": METHOD_COLOURS["dmlr"], "linewidth": 2, "errorbar": ("ci", 95), "seed": 0}
        sns.lineplot(table, x="iteration", y=column, ax=axis, **mean)
        axis.set(title=title, xlabel="iteration", ylabel="reward")
        axis.xaxis.get_major_locator().set_params(integer=True)
    return fig


@styled
def accuracy_bars(table: pd.DataFrame, baseline: str = "vanilla") -> Figure:
    """Accuracy with interval per dataset and method; a dashed line carries the baseline across.

    table: columns dataset, method, accuracy, low, high, total (as metrics.summary gives them).
    """
    datasets, methods = list(dict.fromkeys(table["dataset"])), list(dict.fromkeys(table["method"]))
    fig, axes = figure(1, 1, (max(4.2, 1.2 + 0.75 * len(datasets) * len(methods)), 3.4))
    axis, width = axes[0, 0], 0.8 / len(methods)
    for m, method in enumerate(methods):
        for d, dataset in enumerate(datasets):
            rows = table[(table["dataset"] == dataset) & (table["method"] == method)]
            for _, row in rows.iterrows():
                x, value = d + (m - (len(methods) - 1) / 2) * width, 100 * row["accuracy"]
                interval = [[value - 100 * row["low"]], [100 * row["high"] - value]]
                label = method if d == 0 else None
                axis.bar(x, value, 0.9 * width, color=colour(method, m), label=label, zorder=2)
                axis.errorbar(x, value, interval, color="#1f2328", linewidth=1.1, capsize=3, zorder=3)
                axis.annotate(f"{value:.1f}", (x, 100 * row["high"]), (0, 3), textcoords="offset points", ha="center")
                if method == baseline:
                    axis.hlines(value, d - 0.42, d + 0.42, color="#1f2328", linewidth=0.9, linestyle="--", zorder=4)
    axis.set_xticks(range(len(datasets)), datasets)
    axis.set(ylim=(0, 112), yticks=range(0, 101, 20), ylabel="accuracy (%)", xlabel="")
    axis.grid(axis="x", visible=False)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(methods), borderaxespad=0.2)
    return fig


@styled
def reward_by_outcome(table: pd.DataFrame) -> Figure:
    """Distribution of the best reward for right and wrong answers: what confidence says about correctness.

    table: one row per example with columns best_reward and outcome.
    """
    order = list(dict.fromkeys(table["outcome"]))
    fig, axes = figure(1, 1, (6.4, 0.9 + 0.55 * len(order)))
    axis = axes[0, 0]
    groups = [table.loc[table["outcome"] == outcome, "best_reward"] for outcome in order]
    style = {"boxprops": {"facecolor": "#dfe7ec", "edgecolor": "#5b636d"}, "medianprops": {"color": "#1f2328"}}
    places = range(len(order))
    axis.boxplot(groups, positions=places, orientation="horizontal", widths=0.5, sym="", patch_artist=True, **style)
    sns.stripplot(
        table, x="best_reward", y="outcome", order=order, ax=axis, size=2.4, alpha=0.45, color="#0b6fa4", jitter=0.18
    )
    axis.set(xlabel="best reward", ylabel="", ylim=(len(order) - 0.5, -0.5))
    axis.set_yticks(places, order)
    axis.grid(axis="y", visible=False)
    return fig


@styled
def reliability_curve(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """Accuracy over the best reward, a panel per name: a point per bin at its mean reward, with its interval.

    curves: by name (its last word is the method), as metrics.reliability gives them; the dotted line is the accuracy
    over all bins.
    """
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    fig, axes = figure(rows, columns, (max(4.4, 2.9 * columns), 2.7 * rows), sharey=True)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    for axis, (name, table) in zip(axes.flat, curves.items(), strict=False):
        shade = colour(name.rpartition(" ")[2])
        value, low, high = (100 * table[column] for column in ("value", "low", "high"))
        style = {"color": shade, "marker": "o", "markersize": 5, "linewidth": 1.4, "capsize": 3}
        axis.errorbar(table["score"], value, [value - low, high - value], **style)
        axis.axhline(100 * table["correct"].sum() / table["total"].sum(), color=shade, linewidth=0.9, linestyle=":")
        axis.set(title=name, xlabel="best reward", ylim=(-2, 102), yticks=range(0, 101, 20))
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy (%)")
    return fig


@styled
def kept_patches(image: Image.Image, patches: Sequence[Sequence[int]], grid: Grid) -> Figure:
    """The image with its token grid; the cells that each think token kept are outlined in its colour."""
    width, height = image.size
    fig, axes = figure(1, 1, (4.4, 4.4 * height / width + 0.25 * (1 + len(patches) // 4)))
    axis = axes[0, 0]
    draw_image(axis, image)
    for line in range(1, grid[1]):
        axis.axvline(line * width / grid[1], color="#9aa0a6", linewidth=0.4, alpha=0.6)
    for line in range(1, grid[0]):
        axis.axhline(line * height / grid[0], color="#9aa0a6", linewidth=0.4, alpha=0.6)
    outline(axis, image, patches, grid)
    tokens = range(len(patches))
    handles = [Rectangle((0, 0), 1, 1, fill=False, linewidth=2, edgecolor=token_colour(token)) for token in tokens]
    labels = [f"think token {token + 1}" for token in tokens]
    fig.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, handlelength=1.1, columnspacing=1)
    return fig


def save_kept_patches(path: str | Path, image: Image.Image, patches: Sequence[Sequence[int]], grid: Grid) -> None:
    """`kept_patches` as a PNG file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    kept_patches(image, patches, grid).savefig(path, dpi=130)


@styled
def attention_maps(
    image: Image.Image,
    attention: np.ndarray,
    grid: Grid,
    patches: Sequence[Sequence[int]] | None = None,
    row_titles: Sequence[str] = ("",),
) -> Figure:
    """Heat map over the image per think token, one row of panels per moment; one colour scale for all.

    attention: [moments, L, N], of which the first grid height × grid width lie row-major on the image (see `Encoded`);
    the others are not drawn. `patches` are outlined in the last row.
    """
    cells = grid[0] * grid[1]
    attention = np.asarray(attention, dtype=float)
    if attention.shape[2] < cells:
        raise ValueError(f"attention over {attention.shape[2]} image tokens, but the grid is {grid[0]} × {grid[1]}")
    attention = attention[..., :cells]
    moments, tokens, _ = attention.shape
    width, height = image.size
    panel = 2.05
    fig, axes = figure(moments, tokens, (panel * tokens + 0.9, (panel * height / width + 0.3) * moments))
    heat = None
    for m in range(moments):
        for t in range(tokens):
            axis = axes[m, t]
            draw_image(axis, image.convert("L").convert("RGB"))
            heat = axis.imshow(
                attention[m, t].reshape(grid), extent=(0, width, height, 0), cmap="magma", alpha=0.62,
                vmin=0, vmax=float(attention.max()) or 1.0, interpolation="nearest",
            )  # fmt: skip
            if patches is not None and m == moments - 1:
                outline(axis, image, [patches[t] if i == t else [] for i in range(tokens)], grid)
            if m == 0:
                axis.set_title(f"think token {t + 1}", color=token_colour(t))
        axes[m, 0].text(-0.06, 0.5, row_titles[m], rotation=90, va="center", ha="right", transform=axes[m, 0].transAxes)
    fig.colorbar(heat, ax=axes, shrink=0.8, pad=0.01, label="attention")
    return fig


def token_colour(token: int) -> str:
    """A think token's colour in every figure."""
    return TOKEN_COLOURS[token % len(TOKEN_COLOURS)]


def draw_image(axis: Any, image: Image.Image) -> None:
    """The image in its own pixels, without ticks."""
    width, height = image.size
    axis.imshow(image, extent=(0, width, height, 0))
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)


def outline(
    axis: Any, image: Image.Image, patches: Sequence[Sequence[int]], grid: Grid, linestyle: Any = "solid"
) -> None:
    """Cells outlined in their token's colour; a cell kept by several tokens gets nested outlines.

    Image tokens beyond the grid (of a thumbnail, of another image) have no place on this one.
    """
    cell_w, cell_h = image.size[0] / grid[1], image.size[1] / grid[0]
    used: dict[int, int] = {}
    for token, cells in enumerate(patches):
        for cell in (cell for cell in cells if cell < grid[0] * grid[1]):
            inset = 0.05 + 0.1 * used.get(cell, 0)
            used[cell] = used.get(cell, 0) + 1
            left, top = (cell % grid[1] + inset) * cell_w, (cell // grid[1] + inset) * cell_h
            size = ((1 - 2 * inset) * cell_w, (1 - 2 * inset) * cell_h)
            style = {"fill": False, "linewidth": 2.2, "linestyle": linestyle, "edgecolor": token_colour(token)}
            axis.add_patch(Rectangle((left, top), *size, **style))
