"""Ablations and efficiency, run headless on the embedded model: what they show follows from their runs."""

import json
import re

import pytest
from bs4 import BeautifulSoup
from notebook_files import external_requests

from dmlr import notebooks
from dmlr.config import root
from dmlr.run.records import find_runs, read_results

ROOT = root()
pytestmark = pytest.mark.slow
ABLATIONS, EFFICIENCY = (ROOT / "notebooks" / f"{name}.ipynb" for name in ("02_ablations", "06_efficiency"))


@pytest.fixture(scope="module")
def ablations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablations")
    given = {"dataset": "data/shapes/visual.json", "end_data_idx": 4, "reward_iterations": "0,2"}
    given |= {"output_dir": str(folder / "runs")}
    return folder, given, notebooks.run(ABLATIONS, given, folder / "out.ipynb")


def test_ablations_have_a_row_for_every_setting(ablations):
    folder, _, report = ablations
    page = report.read_text(encoding="utf-8")
    soup = BeautifulSoup(page, "html.parser")
    shown = {table.find("th").get_text(): table for table in soup.find_all("table") if table.find("th")}
    found = [path for path in find_runs(folder / "runs") if path.name != "vanilla"]
    runs = {path.relative_to(folder / "runs").parts[0]: read_results(path) for path in found}
    axes = {"patches interleaved": 5, "iterations T": 6, "patches per think token m": 5, "think tokens L": 5}
    axes |= {"σ in % of the embedding's RMS": 6, "reward, read at": 6, "update and acceptance": 6, "reward": 5}
    assert {axis: len(shown[axis].find_all("tr")) - 1 for axis in axes} == axes
    rows = [[cell.get_text() for cell in row.find_all("td")] for row in shown["iterations T"].find_all("tr")[1:]]
    for label, accuracy, *_ in rows:
        result = runs[f"max_num_steps={label}"]
        assert accuracy == f"{result['accuracy']:.1%}" and result["total"] == 4
        assert len(result["entries"][0]["rewards"] or []) == int(label)
    assert len(soup.find_all("img")) == 9 and all(image["alt"] for image in soup.find_all("img"))
    assert external_requests(page) == []


def test_ablations_run_again_reuse_what_is_there(ablations, tmp_path):
    folder, given, _ = ablations
    before = {path: path.read_bytes() for path in (folder / "runs").rglob("log.jsonl")}
    notebooks.run(ABLATIONS, given, tmp_path / "again.ipynb")
    assert before == {path: path.read_bytes() for path in (folder / "runs").rglob("log.jsonl")}


def test_efficiency_shows_what_was_measured(tmp_path):
    given = {"device": "cpu", "end_data_idx": 4, "max_num_steps": 2, "samples": "1,4"}
    given |= {"runs_folder": str(tmp_path / "none"), "output_dir": str(tmp_path / "samples")}
    report = notebooks.run(EFFICIENCY, given, tmp_path / "out.ipynb")
    page = report.read_text(encoding="utf-8")
    text = BeautifulSoup(page, "html.parser").get_text()
    for shape in json.loads((ROOT / "reports/efficiency/cpu.json").read_text())["shapes"]:
        ratio = shape["released_iteration"] / shape["iteration_batch_1"]
        assert re.search(rf"{1e3 * shape['iteration_batch_1']:.1f} ms\s*{ratio:.1f}\b", text)
    for count in (1, 4):
        result = read_results(tmp_path / f"samples/num_samples={count}/visual/dmlr")
        mean = sum(entry["best_reward"] for entry in result["entries"]) / 4
        assert f"{mean:.4f}" in text and result["config"]["num_samples"] == count
    for method in ("vanilla", "ulr", "dmlr"):
        spent = read_results(tmp_path / f"samples/methods/visual/{method}")["efficiency"]
        whole = sum(spent[f"{phase}_seconds"] for phase in ("prefill", "optimise", "decode")) / 4
        assert f"{1e3 * whole:.1f}" in text
    assert "no run under none yet" in text
    assert external_requests(page) == []
