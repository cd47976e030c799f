"""Figures of 05_perception_and_confidence: dependency, gains, shares inside boxes, heat maps, geometry. Draws only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from dmlr.show.plots import METHOD_COLOURS, Grid, draw_image, figure, outline, styled

RIGHT, WRONG, PLAIN = "#0b6fa4", "#b4532a", "#5b636d"
SERIES = (RIGHT, "#d98c1f", "#5f8f4e", "#8d6ab8")  # of perturbations, in order
KIND_COLOURS = {"text": "#8a8f98", "image": "#5f8f4e", "think, start": "#1f2328", "think, optimised": "#b4532a"}


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
        axis.axvline(reference, color=PLAIN, linewidth=0.9, linestyle=":")
    axis.set_yticks(range(len(rows)), rows)
    axis.set(ylim=(len(rows) - 0.5, -0.5), xlabel=label)
    axis.grid(axis="y", visible=False)
    if len(names) > 1:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(names), borderaxespad=0.2)
    return fig


@styled
def pictures(images: Mapping[str, Image.Image]) -> Figure:
    """Images side by side, each under its title."""
    fig, axes = figure(1, len(images), (2.0 * len(images), 2.3))
    for axis, (title, image) in zip(axes[0], images.items(), strict=True):
        draw_image(axis, image)
        axis.set_title(title)
    return fig


@styled
def token_distribution(values: Mapping[str, np.ndarray]) -> Figure:
    """Share of the tokens whose dependency is at least x, a line per perturbation: how few tokens carry it."""
    fig, axes = figure(1, 1, (7.2, 3.1))
    axis = axes[0, 0]
    for s, (name, some) in enumerate(values.items()):
        x = np.sort(some)[::-1]
        axis.step(
            x, 100 * np.arange(1, len(x) + 1) / len(x), where="post", color=SERIES[s % 4], label=name, linewidth=1.6
        )
    axis.axvline(0, color=PLAIN, linewidth=0.9, linestyle=":")
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set(xlabel="visual dependency of a token (nats)", ylabel="tokens with at least this (%)", ylim=(0, 101))
    axis.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.legend()
    return fig


@styled
def by_outcome(panels: Mapping[str, tuple[pd.DataFrame, bool]], names: Mapping[Any, str]) -> Figure:
    """Two groups side by side in every panel: mean with interval.

    panels: by title (a table with columns group, value, low, high, clusters; whether it is a share, drawn in per cent);
    names: what a group is called, in order.
    """
    fig, axes = figure(1, len(panels), (max(4.4, 2.7 * len(panels)), 3.1))
    shades = dict(zip(names, (RIGHT, WRONG), strict=False))
    for axis, (title, (table, percent)) in zip(axes[0], panels.items(), strict=True):
        scale = 100 if percent else 1
        for x, group in enumerate(names):
            for _, row in table[table["group"] == group].iterrows():
                value = scale * row["value"]
                error = np.nan_to_num([[value - scale * row["low"]], [scale * row["high"] - value]])
                style = {"fmt": "o", "markersize": 7, "capsize": 5, "elinewidth": 1.6}
                axis.errorbar(x, value, np.clip(error, 0, None), color=shades[group], **style)
        axis.set(title=title, xlim=(-0.6, len(names) - 0.4))
        axis.set_xticks(range(len(names)), names.values())
        if percent:
            axis.set(ylim=(-2, 102), ylabel="%")
        elif table["low"].min() <= 0 <= table["high"].max():
            axis.axhline(0, color=PLAIN, linewidth=0.9, linestyle=":")
        axis.grid(axis="x", visible=False)
    return fig


@styled
def maps(image_rows: Sequence[Mapping[str, Any]], titles: Sequence[str]) -> Figure:
    """Heat maps over images, a row of panels per question: boxes in white, kept patches in the last column.

    A row: image, label, grid, boxes (pixels), maps [columns, N] (each scaled to its own
    largest value), notes (what stands below each) and kept (patches per think token, outlined in its colour).
    """
    columns = len(titles)
    shape = image_rows[0]["image"].size
    size = 2.15
    fig, axes = figure(len(image_rows), columns, (size * columns, (size * shape[1] / shape[0] + 0.5) * len(image_rows)))
    for r, row in enumerate(image_rows):
        for c, weights in enumerate(row["maps"]):
            axis = axes[r, c]
            _heat(axis, row["image"], weights, row["grid"])
            _boxes(axis, row["boxes"])
            axis.set_xlabel(row["notes"][c], fontsize=8)
            if r == 0:
                axis.set_title(titles[c], fontsize=9)
        outline(axes[r, columns - 1], row["image"], row["kept"], row["grid"])
        axes[r, 0].set_ylabel(row["label"], fontsize=8)
    return fig


@styled
def share_curve(table: pd.DataFrame, vanilla: float, chance: float) -> Figure:
    """Share of the think tokens' attention inside the boxes over iterations, with band; two lines to compare with.

    table: columns iteration, value, low, high (0 to 1).
    """
    fig, axes = figure(1, 1, (6.4, 3.1))
    axis = axes[0, 0]
    axis.fill_between(
        table["iteration"], 100 * table["low"], 100 * table["high"], color=METHOD_COLOURS["dmlr"], alpha=0.18
    )
    axis.plot(table["iteration"], 100 * table["value"], color=METHOD_COLOURS["dmlr"], linewidth=2, label="think tokens")
    axis.axhline(100 * vanilla, color=METHOD_COLOURS["vanilla"], linestyle="--", linewidth=1.4, label="vanilla answer")
    axis.axhline(100 * chance, color=PLAIN, linestyle=":", linewidth=1.2, label="chance")
    axis.set(xlabel="iteration (0: the start)", ylabel="inside the boxes (%)", ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
    return fig


@styled
def clouds(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Points of every kind in two dimensions, a panel per projection; think tokens on top. Tables: x, y, kind."""
    fig, axes = figure(1, len(panels), (4.3 * len(panels), 4.0))
    for axis, (title, table) in zip(axes[0], panels.items(), strict=True):
        for kind, shade in KIND_COLOURS.items():
            some, think, start = table[table["kind"] == kind], kind.startswith("think"), kind.endswith("start")
            style = {"alpha": 0.9, "edgecolor": "white", "linewidth": 0.5} if think else {"alpha": 0.5, "linewidth": 0}
            style |= {"s": 90 if start else 34 if think else 11, "marker": "X" if start else "o"}
            axis.scatter(some["x"], some["y"], color=shade, label=kind, zorder=2 + think + start, **style)
        axis.set(title=title, xticks=[], yticks=[])
        axis.grid(visible=False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    return fig


def _heat(axis: Any, image: Image.Image, weights: np.ndarray, grid: Grid) -> None:
    """Attention over the image in grey, its largest value brightest."""
    draw_image(axis, image.convert("L").convert("RGB"))
    top = float(np.nanmax(weights)) or 1.0
    axis.imshow(
        np.asarray(weights, dtype=float).reshape(grid), extent=(0, image.size[0], image.size[1], 0), cmap="magma",
        alpha=0.62, vmin=0, vmax=top, interpolation="nearest",
    )  # fmt: skip


def _boxes(axis: Any, boxes: Sequence[Sequence[float]]) -> None:
    for left, top, right, bottom in boxes:
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, linewidth=1.6, edgecolor="white"))
