"""The comparison is honest: both sides compute the same thing, from the same inputs, with the same tokens."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from pretend_gpu import GPU, PretendGPU, to_gpu
from recomputed import equals_full_recomputation, noise_of
from test_cuda_graphs import as_on_a_gpu  # noqa: F401  # a fixture

from dmlr import bench, machine, random_weights
from dmlr.config import Config, locate
from dmlr.loop.reference import eager
from dmlr.random_weights import random_prompt, random_vlm

TINY = dict(zip(random_weights._SIZES, (64, 2, 4, 2, 128, 2000, 64), strict=True))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(random_weights.SHAPES, "tiny", TINY)
    return random_vlm("tiny")


def test_both_sides_do_the_same_work(tiny):
    config = Config.make("paper", max_num_steps=3, max_new_tokens=3)
    prompt = random_prompt(tiny, 8, 100, 4)
    assert len(prompt.input_ids) == 100 and len(prompt.image_columns) == 64
    trace = equals_full_recomputation(tiny, config, [prompt])
    assert trace.steps[-1].tried.patches.count.any()


def test_released_cost_is_two_full_forwards_and_one_look_at_the_image_an_iteration(tiny):
    config = Config.make("paper", max_num_steps=3)
    prompt = random_prompt(tiny, 8, 100, 4)
    reference, seen = bench.Released(eager(tiny), prompt, config), []
    tower = reference.model.model.visual
    tower.register_forward_hook(lambda *_: seen.append(reference.forward_count))
    (noise,) = noise_of(tiny, config, [0])
    reference.run(tiny.embed(torch.full((4,), tiny.think_id)).float(), noise)
    assert reference.forward_count == 1 + 2 * 3
    assert seen == [1, 3, 5, 7], "the vision tower is paid for once an iteration"


def test_the_peer_computes_what_a_forward_of_ours_does(tiny):
    config, prompt = Config.make("paper"), random_prompt(tiny, 8, 100, 4)
    peer = bench.peer_forward(tiny, config, prompt)
    for _ in range(2):  # the cache is as it was
        torch.testing.assert_close(peer(), bench.forward(tiny, config, prompt, 2)()[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_whole_measurement_runs_where_a_gpu_has_the_model(tiny, brief, monkeypatch):
    """Refused where a tensor of the CPU meets one of the GPU."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    config = Config.make("paper", max_num_steps=2, max_new_tokens=2)
    to_gpu(tiny.model)
    with PretendGPU():
        assert tiny.device == GPU
        prompt = bench.prompts(tiny, config)[256]
        figures = bench.ours(tiny, config, (2,)) | bench.released(tiny, config)
        assert bench.peer_forward(tiny, config, prompt)().device == GPU
    assert {"example_6_tokens_batch_1", "released_example_6_tokens", "released_peak_bytes"} < figures.keys()


def test_ratios_follow_from_the_measurements():
    released = {"iteration": 6.0, "iteration_same_dtype": 3.0, "iteration_16_patches": 8.0, "example": 90.0}
    released |= {"iteration_64_image_tokens": 1.0, "iteration_1024_image_tokens": 9.0, "peak_bytes": 80}
    figures = {f"released_{name}": value for name, value in released.items()} | {"peer_forward": 0.3, "floor": 0.1}
    figures |= {"iteration_batch_1": 0.2, "iteration_batch_8": 0.1, "iteration_16_patches": 0.5, "example": 3.0}
    figures |= {"iteration_64_image_tokens": 0.1, "iteration_1024_image_tokens": 0.15, "peak_bytes": 10}
    figures |= {"peak_bytes_batch_8": 20, "replayed_iteration_batch_1": 0.15, "forward_batch_8": 0.05}
    found = {"iteration_batch_1": 30, "iteration_batch_8": 60, "replayed_iteration_batch_1": 40}
    found |= {f"{name}_same_dtype": times / 2 for name, times in found.items()}
    found |= {"iteration_16_patches": 16, "example": 30, "peak_bytes": 8, "forward_batch_8": 6}
    assert bench.ratios(figures) == pytest.approx(found | {"growth": 1.5, "released_growth": 9, "times_floor": 1.5})


@pytest.fixture
def brief(monkeypatch):
    """Small enough for a test; too small for its memory to be seen among that of a process."""

    def peak_bytes(device, work):
        work()
        return 1000

    clock = itertools.count(1000, -1)  # of two measured times the first is the longer one
    for module in (bench, machine):
        monkeypatch.setattr(module, "median_seconds", lambda work, *_: (work(), float(next(clock)))[1])
    monkeypatch.setattr(bench, "peak_bytes", peak_bytes)
    monkeypatch.setattr(bench, "SIDES", {64: 2, 256: 3, 1024: 4})
    monkeypatch.setattr(bench, "TEXT", 40)
    monkeypatch.setattr(bench, "BATCHES", {"cpu": (1, 2), "cuda": (1, 2)})
    monkeypatch.setattr(bench, "NEW_TOKENS", {"cpu": (4,), "cuda": (4, 6)})


@pytest.mark.slow
@pytest.mark.usefixtures("as_on_a_gpu", "brief")
def test_a_gpu_is_measured_in_every_way_and_against_both_dtypes(tiny, monkeypatch):
    monkeypatch.setattr(bench, "random_vlm", lambda shape, dtype, device: random_vlm(shape, dtype))
    figures = bench.measure("tiny", "cuda")
    assert figures["dtype"] == "bfloat16"
    assert figures["weight_bytes"] == pytest.approx(2 * figures["parameters"], rel=0.1)
    assert figures["released_iteration"] > 0 and figures["released_example_same_dtype"] > 0
    found = bench.ratios(figures)
    for way in bench.GPU_WAYS:
        for name in ("iteration_batch_2", "example", "iteration_16_patches", "peak_bytes"):
            assert found[f"{way}{name}"] > 0 and found[f"{way}{name}_same_dtype"] > 0
        assert figures[f"{way}peak_bytes_batch_2"] == 1000
    assert found["times_floor"] > 0


def test_a_whole_measurement_is_written(tiny, brief, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "locate", lambda path: str(tmp_path / path) if path == "reports" else locate(path))
    assert bench.main(["tiny"]) == 0
    (row,) = json.loads((tmp_path / "reports/efficiency/cpu.json").read_text())["shapes"]
    assert row["ratios"]["iteration_batch_1"] == row["released_iteration"] / row["iteration_batch_1"] > 0


def test_the_readme_says_what_was_measured():
    rows = json.loads(Path(locate("reports/efficiency/cpu.json")).read_text())["shapes"]
    names = ("iteration_batch_1", "iteration_batch_8", "iteration_16_patches", "example", "peak_bytes")
    readme = Path(locate("README.md")).read_text(encoding="utf-8")
    for row in rows:
        cells = [f"shape {row['shape']}, {row['parameters'] / 1e6:.0f} million parameters"]
        cells += [f"{row['ratios'][name]:.0f}×" for name in names]
        assert f"| {' | '.join(cells)} |" in readme
    one, eight = ([f"{row['ratios'][f'forward_batch_{batch}']:.1f}×" for row in rows] for batch in (1, 8))
    peer = f"forward of equal slots: {' and '.join(one)} at batch 1, {' and '.join(eight)} per example in a batch of 8"
    assert peer in " ".join(readme.split())
