"""Figures from data; computes nothing that a result rests on.

Every function takes plain data and returns the Figure; `page.show` puts one on a page with its caption. One style, one
colour per method, all colour-blind safe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
SERIES = ("#0b6fa4", "#d98c1f", "#5f8f4e", "#8d6ab8")  # of what has no colour of its own
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
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#ececea",
    "xtick.color": "#5b636d",
    "ytick.color": "#5b636d",
    "legend.frameon": False,
}
styled = mpl.rc_context(STYLE)  # decorates what draws; matplotlib's settings stay as they were


def figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure, known to no window manager, with a grid of axes [rows, columns]."""
    fig = Figure(figsize=size, layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **options)


def colour(method: str, position: int = 0) -> str:
    """A method's colour in every figure."""
    return METHOD_COLOURS.get(method) or OTHER_COLOURS[(position + 1) % len(OTHER_COLOURS)]


def reward_table(entries_by_label: Mapping[Any, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """Rewards of records: a row per label, example and iteration (0: the start), columns label, example, iteration,
    tried (reward of the state tried), best (best so far) and patches (interleaved when it was tried).
    """
    rows = []
    for label, entries in entries_by_label.items():
        for example, entry in enumerate(entry for entry in entries if entry.get("rewards")):
            tried, counts = [entry["initial_reward"], *entry["rewards"]], [0, *entry["patch_counts"]]
            for iteration, best in enumerate(np.maximum.accumulate(tried)):
                rows.append((label, example, iteration, tried[iteration], best, counts[iteration]))
    return pd.DataFrame(rows, columns=["label", "example", "iteration", "tried", "best", "patches"])


@styled
def rewards_over_iterations(table: pd.DataFrame, title: str = "") -> Figure:
    """Best reward so far and patches of the state tried (see `reward_table`), means with 95 % bands, a line per label:
    the form of the paper's figure 8.
    """
    fig, axes = figure(1, 2, (8.8, 3.3))
    labels = list(dict.fromkeys(table["label"]))
    shown = table.assign(label=table["label"].astype(str))
    palette = sns.color_palette("crest", len(labels)) if len(labels) > 1 else [METHOD_COLOURS["dmlr"]]
    style = {"x": "iteration", "hue": "label", "hue_order": list(map(str, labels)), "palette": palette}
    style |= {"errorbar": ("ci", 95), "seed": 0, "n_boot": 200}
    names = {"best": "best reward so far", "patches": "patches tried"}
    for axis, (column, name) in zip(axes[0], names.items(), strict=True):
        sns.lineplot(shown, y=column, ax=axis, legend=axis is axes[0, 1] and len(labels) > 1, **style)
        axis.set(xlabel="iteration", ylabel=name)
        axis.xaxis.get_major_locator().set_params(integer=True)
    if len(labels) > 1:
        axes[0, 1].legend(title=title, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


@styled
def intervals(
    table: pd.DataFrame, row: str, series: str, label: str, percent: bool = False, reference: float | None = 0.0
) -> Figure:
    """A point with its interval for each row and series, rows downwards in the table's order.

    table: columns `row`, `series`, value, low, high. reference: where a dotted line stands.
    """
    rows, names = list(dict.fromkeys(table[row])), list(dict.fromkeys(table[series]))
    fig, axes = figure(1, 1, (7.2, 1.1 + (0.24 + 0.16 * len(names)) * len(rows)))
    axis, scale = axes[0, 0], 100 if percent else 1
    for s, name in enumerate(names):
        part = table[table[series] == name]
        y = np.array([rows.index(one) for one in part[row]]) + (s - (len(names) - 1) / 2) * 0.62 / max(len(names), 1)
        value = scale * part["value"].to_numpy()
        error = [value - scale * part["low"].to_numpy(), scale * part["high"].to_numpy() - value]
        style = {"fmt": "o", "markersize": 5, "capsize": 3, "elinewidth": 1.3}
        axis.errorbar(value, y, xerr=np.clip(np.nan_to_num(error), 0, None), color=SERIES[s % 4], label=name, **style)
    if reference is not None:
        axis.axvline(reference, color="#5b636d", linewidth=0.9, linestyle=":")
    axis.set_yticks(range(len(rows)), rows)
    axis.set(ylim=(len(rows) - 0.5, -0.5), xlabel=label)
    axis.grid(axis="y", visible=False)
    if len(names) > 1:
        columns = len(names) if sum(map(len, names)) < 60 else 2
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)
    return fig


@styled
def kept_patches(image: Image.Image, patches: Sequence[Sequence[int]], grid: Grid) -> Figure:
    """The image with its token grid; the cells that each think token kept are outlined in its colour."""
    width, height = image.size
    fig, axes = figure(1, 1, (4.4, 4.4 * height / width + 0.25 * (1 + len(patches) // 4)))
    axis, thin = axes[0, 0], {"color": "#9aa0a6", "linewidth": 0.4, "alpha": 0.6}
    draw_image(axis, image)
    axis.vlines(np.arange(1, grid[1]) * width / grid[1], 0, height, **thin)
    axis.hlines(np.arange(1, grid[0]) * height / grid[0], 0, width, **thin)
    outline(axis, image, patches, grid)
    for token in range(len(patches)):
        axis.plot([], [], "s", fillstyle="none", color=token_colour(token), label=f"think token {token + 1}")
    fig.legend(loc="outside lower center", ncols=4, fontsize=8, handlelength=1.1, columnspacing=1)
    return fig


def save_kept_patches(path: str | Path, image: Image.Image, patches: Sequence[Sequence[int]], grid: Grid) -> None:
    """`kept_patches` as a PNG file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    kept_patches(image, patches, grid).savefig(path, dpi=130)


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
    """Cells outlined in their token's colour, see `nested_cells`."""
    for token, left, top, wide, high in nested_cells(patches, grid, image.size):
        style = {"fill": False, "linewidth": 2.2, "linestyle": linestyle, "edgecolor": token_colour(token)}
        axis.add_patch(Rectangle((left, top), wide, high, **style))


def nested_cells(
    groups: Sequence[Sequence[int]], grid: Grid, size: tuple[int, int]
) -> Iterator[tuple[int, float, float, float, float]]:
    """Cells of a grid over a picture of `size` (width, height): group, left, top, width, height each.

    A cell in several groups is smaller in each. Indices beyond the grid (a thumbnail's, another image's) are left out.
    """
    wide, high, used = size[0] / grid[1], size[1] / grid[0], Counter()
    for group, cells in enumerate(groups):
        for cell in (c for c in cells if 0 <= c < grid[0] * grid[1]):
            inset = min(0.05 + 0.1 * used[cell], 0.45)
            used[cell] += 1
            place = (cell % grid[1] + inset) * wide, (cell // grid[1] + inset) * high
            yield group, *place, (1 - 2 * inset) * wide, (1 - 2 * inset) * high
