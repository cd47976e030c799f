"""Figures show what they were given."""

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from dmlr.config import root
from dmlr.show import plots

BENCHMARK = root() / "notebooks" / "03_benchmark.ipynb"


def test_kept_patches_are_outlined_in_their_cells_and_colours(tmp_path):
    drawing = Image.new("RGB", (60, 40)), [[0], [5, 7]], (2, 4)  # cells of 15 × 20 pixels
    plots.save_kept_patches(tmp_path / "new" / "0.png", *drawing)
    assert Image.open(tmp_path / "new" / "0.png").width > 300
    fig = plots.kept_patches(*drawing)
    found = [(to_hex(p.get_edgecolor()).upper(), *p.get_bbox().bounds) for p in fig.axes[0].patches]
    assert [colour for colour, *_ in found] == [plots.TOKEN_COLOURS[0], *[plots.TOKEN_COLOURS[1]] * 2]
    centres = [(x + w / 2, y + h / 2) for _, x, y, w, h in found]
    assert np.allclose(centres, [(7.5, 10), (22.5, 30), (52.5, 30)])
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["think token 1", "think token 2"]


def accuracy_bars(table):
    """The figure of notebook 03 for one dataset; the first method is the baseline."""
    methods = table["method"].tolist()
    own = {"np": np, "plots": plots, "datasets": ["a"], "methods": methods, "baseline": methods[0]}
    (cell,) = (c.source for c in nbformat.read(BENCHMARK, as_version=4).cells if "def accuracy_bars" in c.source)
    exec(cell.partition("\n\n\n")[0], own)
    return own["accuracy_bars"](table)


def test_accuracy_bars_have_heights_intervals_and_the_baselines_line():
    rows = [("a", "vanilla", 0.5, 0.4, 0.6), ("a", "dmlr", 0.75, 0.65, 0.8)]
    axis = accuracy_bars(pd.DataFrame(rows, columns=["dataset", "method", "accuracy", "low", "high"])).axes[0]
    assert [bar.get_height() for bar in axis.patches] == [50, 75] and axis.get_axisbelow() is True
    (dashed,) = [c for c in axis.collections if c.get_linestyle()[0][1]]
    assert dashed.get_segments()[0][:, 1].tolist() == [50, 50]
    bars = [seg[:, 1].tolist() for c in axis.collections if c is not dashed for seg in c.get_segments()]
    assert np.allclose(bars, [[40, 60], [65, 80]])


@pytest.mark.parametrize("count", [1, 3, 4, 10])
def test_accuracy_bars_of_any_number_of_methods_fit_their_figure(count, recwarn):
    names = ("vanilla", "multimodal-cot", "self-consistency", "unoptimised", "latents-only", "patches-only")
    methods = [*names, "ltpo", "random", "displaced", "dmlr"][:count]
    table = pd.DataFrame({"method": methods, "dataset": "a", "accuracy": 0.5, "low": 0.4, "high": 0.6})
    fig = accuracy_bars(table)
    fig.canvas.draw()
    assert fig.axes[0].get_legend().get_window_extent().width < fig.bbox.width
    assert fig.axes[0].get_window_extent().width > 0.7 * fig.bbox.width and not list(recwarn)


def test_rewards_of_records_are_a_row_per_iteration_and_their_means_are_drawn():
    records = [{"initial_reward": 0.1 * i, "rewards": [0.4, 0.2], "patch_counts": [1, 2]} for i in (1, 5)]
    table = plots.reward_table({"dmlr": [*records, {"rewards": None}]})
    assert table["iteration"].tolist() == [0, 1, 2] * 2
    assert table["best"].tolist() == [0.1, 0.4, 0.4, 0.5, 0.5, 0.5]
    assert table["patches"].tolist() == [0, 1, 2] * 2
    best, patches = plots.rewards_over_iterations(table).axes
    assert np.allclose(best.get_lines()[0].get_ydata(), [0.3, 0.45, 0.45])
    assert np.allclose(patches.get_lines()[0].get_ydata(), [0, 1, 2])


def test_intervals_are_a_point_with_its_bar_per_row_and_series():
    rows = [("a", "x", 0.5, 0.4, 0.7), ("b", "x", 0.2, 0.1, 0.3)]
    table = pd.DataFrame(rows, columns=["what", "of", "value", "low", "high"])
    (axis,) = plots.intervals(table, "what", "of", "share (%)", percent=True).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    points, _, (bars,) = axis.containers[0].lines
    assert np.allclose(points.get_xdata(), [50, 20])
    assert np.allclose([[x for x, _ in bar] for bar in bars.get_segments()], [[40, 70], [10, 30]])
