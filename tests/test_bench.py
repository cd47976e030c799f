"""The comparison is honest: both sides compute the same thing, from the same inputs, with the same tokens."""

import json
import re
from pathlib import Path

import pytest
import torch

from dmlr import bench
from dmlr.answers import Question
from dmlr.config import Config, ConfigError, locate
from dmlr.methods.latent import question_noise
from dmlr.optimize import initial_latents, optimize
from dmlr.reference import Reference, eager

TINY = dict(zip(bench._SIZES, (64, 2, 4, 2, 128, 2000, 64), strict=True))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)
    return bench.random_vlm("tiny")


def test_both_sides_do_the_same_work(tiny):
    config = Config.make("paper", max_num_steps=3)
    prompt = bench.random_prompt(tiny, 8, 100, 4)
    assert len(prompt.input_ids) == 100 and len(prompt.image_columns) == 64
    prefix = tiny.prefill([prompt])
    start, noise = initial_latents(tiny, prefix, config)[0], question_noise(tiny, Question(0, "", []), config)
    trace = optimize(tiny, prefix, config, noise[None], bench.NO_IDS)
    expected = Reference(eager(tiny), prompt, config).run(start, noise)
    for step, want in zip(trace.steps, expected.steps, strict=True):
        assert step.reward[0].item() == pytest.approx(want.reward, abs=1e-4)
        assert step.tried.patches.tolist()[0] == want.patches
    assert sum(map(len, want.patches)) > 0


def test_released_cost_is_two_full_forwards_an_iteration(tiny):
    config = Config.make("paper", max_num_steps=3)
    prompt = bench.random_prompt(tiny, 8, 100, 4)
    reference = Reference(eager(tiny), prompt, config)
    noise = question_noise(tiny, Question(0, "", []), config)
    reference.run(tiny.embed(torch.full((4,), tiny.think_id)).float(), noise)
    assert reference.forward_count == 1 + 2 * 3


def test_ratios_follow_from_the_measurements():
    told = {
        "released_iteration": 6.0,
        "iteration_batch_1": 0.2,
        "iteration_batch_8": 0.1,
        "released_iteration_16_patches": 8.0,
        "iteration_16_patches": 0.5,
        "released_example": 90.0,
        "example": 3.0,
        "iteration_64_image_tokens": 0.1,
        "iteration_1024_image_tokens": 0.15,
        "released_iteration_64_image_tokens": 1.0,
        "released_iteration_1024_image_tokens": 9.0,
        "peak_bytes": 10,
        "peak_bytes_released": 80,
        "floor": 0.1,
    }
    found = bench.ratios(told)
    assert found == pytest.approx(
        {
            "iteration_batch_1": 30,
            "iteration_batch_8": 60,
            "iteration_16_patches": 16,
            "example": 30,
            "growth": 1.5,
            "released_growth": 9,
            "memory": 8,
            "times_floor": 2,
        }
    )


def test_unknown_shape_and_a_whole_measurement(tiny, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="unknown shape 'C'"):
        bench.main(["C"])
    monkeypatch.setattr(bench, "locate", lambda path: str(tmp_path / path) if path == "reports" else locate(path))
    assert bench.main(["tiny"]) == 0
    (row,) = json.loads((tmp_path / "reports/efficiency/cpu.json").read_text())["shapes"]
    assert row["released_iteration"] > row["iteration_batch_1"] > 0 and row["ratios"]["memory"] > 1


def test_the_readme_says_what_was_measured():
    readme = Path(locate("README.md")).read_text(encoding="utf-8")
    told = re.search(
        r"an iteration takes (\d+) to (\d+) times less .*?, and (\d+) to (\d+) times less per\s+example",
        readme,
        re.DOTALL,
    )
    rows = json.loads(Path(locate("reports/efficiency/cpu.json")).read_text())["shapes"]
    for name, said in (("iteration_batch_1", told.groups()[:2]), ("iteration_batch_8", told.groups()[2:])):
        assert sorted(round(row["ratios"][name]) for row in rows) == [int(number) for number in said]
