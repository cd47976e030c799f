"""Sweeps run each setting once, in its own folder, and compare every one with the same baseline."""

import json
from pathlib import Path

import pytest
from tiny import noise_image, tiny_vlm

from dmlr import methods, sweep
from dmlr.config import Config


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
    settings = [{"sigma": 0.05}, {"sigma": 0.5, "num_samples": 2}]
    first = sweep.sweep(base, vlm, settings)
    folder = Path(base.output_dir)
    folders = sorted(path.name for path in folder.iterdir())
    assert folders == ["sigma=0.05", "sigma=0.5,num_samples=2"]
    assert list(first["total"]) == [6, 6] and list(first["sigma"]) == [0.05, 0.5]
    assert json.loads((folder / folders[1] / "two/dmlr/results.json").read_text())["config"]["num_samples"] == 2

    def fails(*_):
        raise AssertionError("a finished point was run again")

    monkeypatch.setitem(methods.METHODS, "dmlr", fails)
    again = sweep.sweep(base, vlm, settings)
    assert again.equals(first)


def test_a_baseline_is_compared_in_pairs(vlm, base):
    """Against itself nothing differs; questions of two datasets with the same idx stay apart."""
    vanilla = sweep.run_point(base.replace(methods="vanilla"), vlm, {})
    entries = vanilla.entries()
    assert len({entry["data_idx"] for entry in entries}) == 6
    table = sweep.sweep(base.replace(methods="vanilla"), vlm, [{}], baseline=entries)
    assert table.loc[0, "difference"] == 0 and table.loc[0, "p"] == 1 and table.loc[0, "gained"] == 0
    other = {"correct": "wrong", "wrong": "correct", "unparsed": "correct"}
    wrong = [{**entry, "verdict": other[entry["verdict"]]} for entry in entries]
    flipped = sweep.sweep(base.replace(methods="vanilla"), vlm, [{}], baseline=wrong)
    assert abs(flipped.loc[0, "difference"]) == 1 and flipped.loc[0, "gained"] + flipped.loc[0, "lost"] == 6


def test_rewards_never_fall(vlm, base):
    table = sweep.rewards(sweep.run_point(base, vlm, {"num_samples": 2}))
    assert len(table) == 6 * (1 + 2)
    for _, one in table.groupby("example"):
        assert list(one["iteration"]) == [0, 1, 2] and one["best"].is_monotonic_increasing
        assert one["best"].iloc[-1] == one["tried"].max()
