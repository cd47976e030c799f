"""The demo: three embedded models on questions to search, one on ordinary ones, then a walkthrough. Calls notebooks and
reads results."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pandas as pd

from dmlr.config import root
from dmlr.notebooks import run
from dmlr.run.collect import load_runs
from dmlr.show.index import write_index
from dmlr.stats.comparison import paired_table, runs_table, table_1

SUITES = {
    "dataset": ",".join(f"data/shapes/{suite}.json" for suite in ("mathematics", "visual", "composition")),
    "end_data_idx": None,
    "batch_size": 32,
}
BATTERY = {"controls": "displaced,swapped", "ceiling": "", "iterations": "0", "budgets": ""}


def demo(model: str = "") -> None:
    """Runs three notebooks with that model (none: the embedded ones), and ends with their tables and reports."""
    began = time.perf_counter()
    one, several = ({"model_name_or_path": model}, {"models": model}) if model else ({}, {})
    place = root() / "reports" / "runs" / (f"demo_{Path(model).name}" if model else "demo")
    sweeps = place / "latents"
    shutil.rmtree(sweeps, ignore_errors=True)  # the notebook would go on from there
    battery = BATTERY | several | {"output_dir": str(sweeps)}
    steps = {
        "07_do_latents_matter": ("the start, DMLR and two controls on questions to search", battery),
        "03_benchmark": ("three suites, vanilla and dmlr; the bar shows the time that is left", SUITES | one),
        "01_walkthrough": ("one question, seen from inside", one),
    }
    reports = []
    for number, (name, (what, given)) in enumerate(steps.items(), 1):
        print(f"\n[{number}/{len(steps)}] {name}: {what}", flush=True)
        output = None if name == "03_benchmark" else place / f"{name}.ipynb"  # it has a folder of its own
        reports.append(run(root() / "notebooks" / f"{name}.ipynb", given, output))
    index = write_index()
    for table in tables(sweeps, reports[1].parent):
        print(f"\n{table.to_string(index=False)}")
    print(f"\nmade in {(time.perf_counter() - began) / 60:.1f} minutes")
    print("\n".join(f"{name}: {report}" for name, report in zip([*steps, "all runs"], [*reports, index], strict=True)))


def tables(sweeps: Path, benchmark: Path) -> list[pd.DataFrame]:
    """Accuracy of each model with each method of its battery (below `sweeps`/<model>/battery); a row for each suite and
    method of the benchmark's run, and their differences to vanilla, paired."""
    batteries = [run for run in load_runs(sweeps, "unoptimised") if Path(run.label).name == "battery"]
    suites = load_runs(benchmark, "vanilla")
    return [table_1(batteries), *(table(suites).drop(columns=["run", "seed"]) for table in (runs_table, paired_table))]
