"""Figures show what they were given."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from PIL import Image

from dmlr.show import plots


@pytest.fixture
def scene():
    return Image.new("RGB", (60, 40), "white")


def outlines(axis):
    return [p for p in axis.patches if isinstance(p, Rectangle) and not p.get_fill()]


def test_kept_patches_are_outlined_in_their_cells_and_colours(scene):
    fig = plots.kept_patches(scene, [[0], [5, 7]], grid=(2, 4))  # cells of 15 × 20 pixels
    found = [(to_hex(p.get_edgecolor()).upper(), *p.get_bbox().bounds) for p in outlines(fig.axes[0])]
    assert [colour for colour, *_ in found] == [plots.TOKEN_COLOURS[0], *[plots.TOKEN_COLOURS[1]] * 2]
    centres = [(x + w / 2, y + h / 2) for _, x, y, w, h in found]
    assert np.allclose(centres, [(7.5, 10), (22.5, 30), (52.5, 30)])
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["think token 1", "think token 2"]


def test_accuracy_bars_have_heights_intervals_and_the_baselines_line():
    table = pd.DataFrame(
        [("a", "vanilla", 0.5, 0.4, 0.6, 100), ("a", "dmlr", 0.75, 0.65, 0.8, 100)],
        columns=["dataset", "method", "accuracy", "low", "high", "total"],
    )
    axis = plots.accuracy_bars(table).axes[0]
    assert [bar.get_height() for bar in axis.patches] == [50, 75]
    dashed = [c for c in axis.collections if c.get_linestyle()[0][1]]
    assert len(dashed) == 1
    assert dashed[0].get_segments()[0][:, 1].tolist() == [50, 50]
    bars = [seg[:, 1].tolist() for c in axis.collections if c not in dashed for seg in c.get_segments()]
    assert np.allclose(bars, [[40, 60], [65, 80]])


def test_figures_leave_the_global_style_alone(scene):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plots.kept_patches(scene, [[0]], (2, 4))
    assert dict(mpl.rcParams) == before


def test_saved_drawing_is_a_picture(tmp_path, scene):
    plots.save_kept_patches(tmp_path / "new" / "0.png", scene, [[1]], (2, 4))
    assert Image.open(tmp_path / "new" / "0.png").size[0] > 300


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
    table = pd.DataFrame(
        {"what": ["a", "b"], "of": ["x", "x"], "value": [0.5, 0.2], "low": [0.4, 0.1], "high": [0.7, 0.3]}
    )
    (axis,) = plots.intervals(table, "what", "of", "share (%)", percent=True).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    points, _, (bars,) = axis.containers[0].lines
    assert np.allclose(points.get_xdata(), [50, 20])
    assert np.allclose([[x for x, _ in bar] for bar in bars.get_segments()], [[40, 70], [10, 30]])
