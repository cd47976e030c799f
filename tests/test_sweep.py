"""Sweeps run each setting once, in its own folder, and compare every one with the same baseline."""

import json
from pathlib import Path

import pytest
from tiny import noise_image, tiny_vlm

from dmlr import methods
from dmlr.config import Config, ConfigError, locate, root
from dmlr.look import sweep

FILES = sorted((root() / "notebooks" / "params" / "sweeps").glob("*.yaml"))


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.fixture
def base(tmp_path):
    for name in ("one", "two"):
        rows = []
        for i in range(3):
            noise_image(i).save(tmp_path / f"{i}.png")
            rows.append({"prompt": f"{name} {i}?", "solution": "\\boxed{3}", "image_path": f"{i}.png", "idx": i})
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    both = f"{tmp_path}/one.json,{tmp_path}/two.json"
    return Config(
        dataset=both, methods="dmlr", output_dir=str(tmp_path / "sweep"), max_num_steps=2, max_new_tokens=4, verbose=0
    )


def test_each_setting_is_a_run_that_is_reused(vlm, base, monkeypatch):
    wanted = sweep.Sweep("noise", {5: {"sigma_percent": 5}, "much": {"sigma": 0.5, "num_samples": 2}})
    first = sweep.run_sweep(base, vlm, wanted)
    folder = Path(base.output_dir)
    assert sorted(path.name for path in folder.iterdir()) == ["sigma=0.5,num_samples=2", "sigma_percent=5"]
    assert [len(point.entries()) for point in first.values()] == [6, 6]
    told = json.loads((folder / "sigma_percent=5/two/dmlr/results.json").read_text())["config"]
    assert told["sigma"] == pytest.approx(0.05 * vlm.embedding_rms) and told["num_samples"] == 1

    def fails(*_):
        raise AssertionError("a finished setting was run again")

    monkeypatch.setitem(methods.METHODS, "dmlr", fails)
    assert {label: p.entries() for label, p in sweep.run_sweep(base, vlm, wanted).items()} == {
        label: p.entries() for label, p in first.items()
    }


def test_a_baseline_is_compared_in_pairs(vlm, base):
    """Against itself nothing differs; questions of two datasets with the same idx stay apart."""
    points = {"vanilla": sweep.run_point(base.replace(methods="vanilla"), vlm, {})}
    entries = points["vanilla"].entries()
    assert len({entry["data_idx"] for entry in entries}) == 6
    same = sweep.table(points, entries).iloc[0]
    assert (same["difference"], same["p"], same["gained"], same["lost"], same["total"]) == (0, 1, 0, 0, 6)
    other = {"correct": "wrong", "wrong": "correct", "unparsed": "correct"}
    flipped = sweep.table(points, [{**entry, "verdict": other[entry["verdict"]]} for entry in entries]).iloc[0]
    assert abs(flipped["difference"]) == 1 and flipped["gained"] + flipped["lost"] == 6


def test_rewards_of_every_iteration(vlm, base):
    rows = sweep.rewards([("two", sweep.run_point(base, vlm, {"num_samples": 2}))])
    assert len(rows) == 6 * (1 + 2)
    for _, one in rows.groupby("example"):
        assert list(one["iteration"]) == [0, 1, 2] and one["best"].is_monotonic_increasing
        assert one["best"].iloc[-1] == one["tried"].max() and one["patches"].iloc[0] == 0 < one["patches"].iloc[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_sweep_files_hold_valid_settings(path):
    found = sweep.read_sweep(path)
    assert len(found.settings) >= 4
    for overrides in found.settings.values():
        values = {"sigma" if key == sweep.SIGMA_PERCENT else key: value for key, value in overrides.items()}
        method = Config.make("demo", **values).methods
        assert method == Config.make("demo").methods or method in methods.METHODS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axis: x\nsettings: {a: {sigm: 1}}", "sigma"),
        ("settings: {a: {}}", "axis"),
        ("axis: x\nsettings: [1]", "settings by label"),
        ("axis: [", "sweep file"),
        ("", "sweep file"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        sweep.read_sweep(tmp_path / "s.yaml")
    with pytest.raises(ConfigError, match="sweep file"):
        sweep.read_sweep(locate("notebooks/params/sweeps/none.yaml"))
