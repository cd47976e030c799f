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


def test_a_cell_kept_twice_shows_both_outlines(scene):
    first, second = outlines(plots.kept_patches(scene, [[3], [3]], grid=(2, 4)).axes[0])
    assert second.get_width() < first.get_width()


def test_attention_maps_share_one_scale_and_keep_row_major_order(scene):
    attention = np.zeros((2, 3, 8))
    attention[1, 2, 6] = 0.5
    fig = plots.attention_maps(scene, attention, (2, 4), [[0], [], [6]], ["start", "end"])
    panels = fig.axes[:6]
    heats = [panel.get_images()[-1] for panel in panels]
    assert {heat.get_clim() for heat in heats} == {(0.0, 0.5)}
    assert heats[5].get_array()[1, 2] == 0.5
    assert [len(outlines(panel)) for panel in panels] == [0, 0, 0, 1, 0, 1]


def test_image_tokens_beyond_the_grid_are_not_drawn(scene):
    """Of a thumbnail, or of another image."""
    attention = np.zeros((1, 1, 11))
    attention[0, 0, [6, 9]] = 0.5, 0.9
    panel = plots.attention_maps(scene, attention, (2, 4), [[6, 9]]).axes[0]
    assert panel.get_images()[-1].get_array().max() == 0.5 and len(outlines(panel)) == 1
    assert len(outlines(plots.kept_patches(scene, [[3, 8]], grid=(2, 4)).axes[0])) == 1


def test_attention_of_another_grid_is_refused(scene):
    with pytest.raises(ValueError, match="8 image tokens, but the grid is 3 × 3"):
        plots.attention_maps(scene, np.zeros((1, 1, 8)), (3, 3))


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


def test_reward_curves_draw_each_example_and_the_mean():
    rows = [(e, t, 0.1 * e + 0.1 * t, 0.1 * e + 0.1 * t) for e in range(3) for t in range(4)]
    table = pd.DataFrame(rows, columns=["example", "iteration", "tried", "best"])
    axis = plots.rewards_over_iterations(table).axes[0]
    lines = [line.get_ydata() for line in axis.get_lines()]
    assert len(lines) == 4
    assert np.allclose(lines[-1], [0.1, 0.2, 0.3, 0.4])


def test_reward_by_outcome_keeps_the_given_order():
    table = pd.DataFrame({"best_reward": [0.1, 0.2, 0.3], "outcome": ["lost", "gained", "lost"]})
    axis = plots.reward_by_outcome(table).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["lost", "gained"]


def test_figures_leave_the_global_style_alone(scene):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plots.kept_patches(scene, [[0]], (2, 4))
    assert dict(mpl.rcParams) == before


def test_saved_drawing_is_a_picture(tmp_path, scene):
    plots.save_kept_patches(tmp_path / "new" / "0.png", scene, [[1]], (2, 4))
    assert Image.open(tmp_path / "new" / "0.png").size[0] > 300


def test_reliability_has_a_point_and_an_interval_per_bin():
    table = pd.DataFrame(
        {"score": [0.2, 0.6], "value": [0.25, 0.75], "low": [0.1, 0.5], "high": [0.5, 0.9]}
        | {"correct": [1, 3], "total": [4, 4]}
    )
    axes = plots.reliability_curve({"visual dmlr": table, **{str(i): table for i in range(3)}}).axes
    axis = axes[0]
    assert [panel.get_title(loc="left") for panel in axes] == ["visual dmlr", "0", "1", "2", "", ""]
    (container,) = axis.containers
    points, _, (bars,) = container.lines
    assert points.get_xydata().tolist() == [[0.2, 25], [0.6, 75]]
    assert np.allclose([[y for _, y in bar] for bar in bars.get_segments()], [[10, 50], [50, 90]])
    assert [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == ":"] == [50]
    assert to_hex(points.get_color()) == plots.METHOD_COLOURS["dmlr"]
