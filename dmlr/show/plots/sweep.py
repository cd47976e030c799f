"""Figures of a sweep: accuracy of every setting with the baseline's line, reward and kept patches over iterations."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dmlr.show.plots import METHOD_COLOURS, figure, styled
from dmlr.stats.metrics import Accuracy


def readable(table: pd.DataFrame, axis_label: str) -> pd.DataFrame:
    """The table of a sweep (sweep.table) as a reader wants it: per cent, points, milliseconds."""
    rows = [
        {
            axis_label: row.label,
            "accuracy": f"{row.accuracy:.1%}",
            "Δ to the baseline": f"{100 * row.difference:+.1f}",
            "95 % of Δ": f"{100 * row.difference_low:+.1f} to {100 * row.difference_high:+.1f}",
            "gained / lost": f"{row.gained} / {row.lost}",
            "p": f"{row.p:.2g}",
            "best reward": "" if pd.isna(row.best_reward) else f"{row.best_reward:.4f}",
            "ms per example": f"{1000 * row.seconds:.0f}",
        }
        for row in table.itertuples()
    ]
    return pd.DataFrame(rows)


@styled
def accuracy_over(table: pd.DataFrame, axis_label: str, baseline: Accuracy, baseline_name: str = "vanilla") -> Figure:
    """Accuracy of each setting with its Wilson interval over the setting; the baseline and its interval as a band.

    table: columns label (numbers make a line, words make points), accuracy, low, high (0 to 1).
    """
    numbers = all(isinstance(label, int | float) for label in table["label"])
    fig, axes = figure(1, 1, (5.6 if numbers else max(4.6, 1.5 * len(table)), 3.3))
    axis, shade = axes[0, 0], METHOD_COLOURS["dmlr"]
    axis.axhspan(100 * baseline.low, 100 * baseline.high, color="#8a8f98", alpha=0.15, linewidth=0)
    axis.axhline(100 * baseline.value, color="#5b636d", linestyle="--", linewidth=1.1, label=baseline_name)
    value, places = 100 * table["accuracy"], table["label"] if numbers else range(len(table))
    error = [value - 100 * table["low"], 100 * table["high"] - value]
    style = {"marker": "o", "linestyle": "-" if numbers else "none", "linewidth": 1.6, "capsize": 3}
    axis.errorbar(places, value, error, color=shade, elinewidth=1.1, label="setting", **style)
    if not numbers:
        axis.set_xticks(places, [textwrap.fill(str(label), 14) for label in table["label"]])
        axis.margins(x=0.12)
    axis.set(xlabel=axis_label, ylabel="accuracy (%)")
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    return fig


@styled
def rewards_and_patches(table: pd.DataFrame, title: str = "") -> Figure:
    """Best reward so far and patches of the state tried, over iterations: the form of the paper's figure 8.

    table: columns label, example, iteration, best, patches; a line with its 95 % band for each label.
    """
    fig, axes = figure(1, 2, (8.8, 3.3))
    labels = list(dict.fromkeys(table["label"]))
    names = {label: str(label) for label in labels}
    shown = table.assign(setting=table["label"].map(names))
    palette = sns.color_palette("crest", len(labels)) if len(labels) > 1 else [METHOD_COLOURS["dmlr"]]
    style: Mapping[str, Any] = {
        "x": "iteration", "hue": "setting", "hue_order": list(names.values()), "palette": palette,
        "errorbar": ("ci", 95), "seed": 0, "n_boot": 200,
    }  # fmt: skip
    for axis, (column, label) in zip(
        axes[0], {"best": "best reward so far", "patches": "patches tried"}.items(), strict=True
    ):
        sns.lineplot(shown, y=column, ax=axis, legend=axis is axes[0, 1] and len(labels) > 1, **style)
        axis.set(xlabel="iteration", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    if len(labels) > 1:
        axes[0, 1].legend(title=title, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig
