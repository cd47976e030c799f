"""Figures of speed: how many times less than the released behaviour, growth with the image, accuracy for its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dmlr.show.plots import METHOD_COLOURS, colour, figure, styled

RATIOS = {
    "iteration_batch_1": "an iteration, batch 1",
    "iteration_batch_8": "an iteration, batch 8",
    "iteration_batch_32": "an iteration, batch 32",
    "replayed_iteration_batch_1": "CUDA graphs, batch 1",
    "replayed_iteration_batch_32": "CUDA graphs, batch 32",
    "compiled_iteration_batch_1": "CUDA graphs of compiled layers, batch 1",
    "compiled_iteration_batch_32": "CUDA graphs of compiled layers, batch 32",
    "iteration_16_patches": "an iteration, 16 patches per think token",
    "example": "a whole example in a batch",
    "compiled_example": "the same, CUDA graphs of compiled layers",
    "peak_bytes": "memory over the weights, 1024 image tokens",
}


@styled
def speedups(shapes: Sequence[Mapping[str, Any]]) -> Figure:
    """How many times less of each quantity than the released behaviour; `shapes` as bench.measure gives them."""
    names = [name for name in RATIOS if all(name in shape["ratios"] for shape in shapes)]
    fig, axes = figure(1, 1, (8.6, 0.9 + 0.3 * len(names) * len(shapes)))
    axis, height, shades = axes[0, 0], 0.8 / len(shapes), sns.color_palette("Blues", 2 + len(shapes))
    for s, shape in enumerate(shapes):
        places = [n + (s - (len(shapes) - 1) / 2) * height for n in range(len(names))]
        values = [shape["ratios"][name] for name in names]
        label = f"{shape['shape']}: width {shape['hidden']}, {shape['layers']} layers"
        bars = axis.barh(places, values, 0.9 * height, color=shades[s + 1], label=label)
        axis.bar_label(bars, [f"{value:.3g}×" for value in values], padding=3)
    axis.set_yticks(range(len(names)), [RATIOS[name] for name in names])
    axis.set(xscale="log", xlabel="times less than the released behaviour", ylim=(len(names) - 0.5, -0.5))
    axis.set_xlim(1, 2 * max(shape["ratios"][name] for shape in shapes for name in names))
    axis.grid(axis="y", visible=False)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(shapes), borderaxespad=0.2)
    return fig


@styled
def growth(shapes: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds of an iteration against image tokens, ours and the released behaviour's."""
    fig, axes = figure(1, len(shapes), (4.3 * len(shapes), 3.2), sharey=True)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for prefix, label, shade in (
            ("released_", "released behaviour", "#8a8f98"),
            ("", "here", METHOD_COLOURS["dmlr"]),
        ):
            seconds = {n: shape[f"{prefix}iteration_{n}_image_tokens"] for n in (64, 1024)}
            axis.plot(seconds.keys(), seconds.values(), marker="o", color=shade, label=label)
            ratio = seconds[1024] / seconds[64]
            axis.annotate(f"{ratio:.2g}×", (1024, seconds[1024]), (-6, 6), textcoords="offset points", ha="right")
        axis.set(xscale="log", yscale="log", xlabel="image tokens", title=f"Shape {shape['shape']}")
        axis.set_xticks([64, 256, 1024], ["64", "256", "1024"])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("seconds per iteration, batch 1")
    axes[0, 0].legend()
    return fig


@styled
def accuracy_for_time(table: pd.DataFrame) -> Figure:
    """Accuracy against accuracy per second of an example: the form of the paper's figure 11.

    table: columns dataset, method, accuracy (0 to 1), seconds (an example's mean).
    """
    datasets, methods = list(dict.fromkeys(table["dataset"])), list(dict.fromkeys(table["method"]))
    fig, axes = figure(1, len(datasets), (1.2 + 3.2 * len(datasets), 3.4), sharex=True)
    for axis, dataset in zip(axes[0], datasets, strict=True):
        for m, method in enumerate(methods):
            rows = table[(table["dataset"] == dataset) & (table["method"] == method)]
            x, y = 100 * rows["accuracy"] / rows["seconds"], 100 * rows["accuracy"]
            axis.scatter(x, y, s=60, color=colour(method, m), label=method, zorder=3)
        axis.set(title=dataset, xscale="log", xlabel="accuracy (%) per second")
        axis.margins(0.25)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig
