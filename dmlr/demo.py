"""The demo: three embedded models on questions to search, one on ordinary ones, then a walkthrough. Calls notebooks and
reads results."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pandas as pd

from dmlr.config import root
from dmlr.index import headlines, write_index
from dmlr.notebooks import run
from dmlr.run.records import find_runs, read_results

SUITES = {
    "dataset": ",".join(f"data/shapes/{suite}.json" for suite in ("mathematics", "visual", "composition")),
    "end_data_idx": None,
    "batch_size": 32,
}
BATTERY = {"controls": "displaced,swapped", "ceiling": "", "iterations": "0", "budgets": ""}


def demo(model: str = "") -> None:
    """Runs three notebooks with that model (none: the embedded ones), and ends with their tables and reports."""
    began, notebooks = time.perf_counter(), root() / "notebooks"
    name = Path(model).name
    one, several = ({"model_name_or_path": model}, {"models": model}) if model else ({}, {})
    place = root() / "reports" / "runs" / (f"demo_{name}" if model else "demo")
    sweeps = place / "latents"
    print("[1/3] 07_do_latents_matter: the start, DMLR and two controls on questions to search", flush=True)
    shutil.rmtree(sweeps, ignore_errors=True)  # the notebook would go on from there
    matter = {**BATTERY, **several, "output_dir": str(sweeps)}
    battery = run(notebooks / "07_do_latents_matter.ipynb", matter, place / "07_do_latents_matter.ipynb")
    print("\n[2/3] 03_benchmark: three suites, vanilla and dmlr; the bar shows the time that is left", flush=True)
    benchmark = run(notebooks / "03_benchmark.ipynb", SUITES | one)
    print("\n[3/3] 01_walkthrough: one question, seen from inside", flush=True)
    walk = run(notebooks / "01_walkthrough.ipynb", one, place / "01_walkthrough.ipynb")
    index = write_index()
    runs = {path: read_results(path) for path in find_runs(benchmark.parent)}
    for table in (latents_table(sweeps), headlines(runs)):
        print(f"\n{table.to_string(index=False)}")
    print(f"\nmade in {(time.perf_counter() - began) / 60:.1f} minutes")
    print(f"do latents matter: {battery}\nbenchmark:         {benchmark}\nwalkthrough:       {walk}\nall runs: {index}")


def latents_table(sweeps: Path) -> pd.DataFrame:
    """Per cent right of each model (rows) with each method of its battery (columns), below `sweeps`/<model>/battery."""
    batteries = sorted({path.parents[1] for path in find_runs(sweeps) if path.parents[1].name == "battery"})
    return pd.DataFrame(
        {"model": folder.parent.name}
        | {made["method"]: f"{made['accuracy']:.1%}" for made in map(read_results, find_runs(folder))}
        for folder in batteries
    )
