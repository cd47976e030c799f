"""`python -m dmlr table1 MODEL...`: a grid of model × benchmark × seed, then all of it in one table.

Each cell is one run of 03_benchmark in a folder of its own, with `resume`: what is finished is skipped, what died
goes on, and what fails does not stop the others. Knows nothing about models or methods: parameters come from files.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from dmlr import index as report_index
from dmlr import notebooks
from dmlr.config import ConfigError, check_names, root, shown
from dmlr.data.examples import DatasetError
from dmlr.judge.llm_judge import JudgeError
from dmlr.model.families import ModelError
from dmlr.parameters import check_parameters, read_parameters
from dmlr.planning import Plan, plan_of, time_of
from dmlr.run.records import ResultsError, find_runs
from dmlr.stats.published import BENCHMARKS

FOLDER = root() / "notebooks"
BENCHMARK, COMPARE = FOLDER / "03_benchmark.ipynb", FOLDER / "04_compare.ipynb"
OWN = ("output_dir", "resume", "verify_only")  # what this command decides itself
# What makes one benchmark impossible and says nothing about the others.
FAILURES = (ConfigError, DatasetError, JudgeError, ModelError, ResultsError, notebooks.RunError, OSError)


@dataclass(frozen=True)
class Cell:
    """One run of the grid: its parameters, and where it goes."""

    name: str
    given: Mapping[str, Any]
    everything: Path  # the folder of the whole grid
    file: Path  # the benchmark's parameters

    @property
    def executed(self) -> Path:
        """The executed copy of 03_benchmark; its report lies beside it."""
        return Path(self.given["output_dir"]) / f"{self.file.stem}.ipynb"

    def plan(self) -> Plan:
        """Raises what the run would raise at once (FAILURES); of a benchmark that is not there, with what makes it."""
        try:
            return plan_of(BENCHMARK, check_parameters(BENCHMARK, self.given))
        except DatasetError as error:
            command = re.search("^# Made by: (.+)$", self.file.read_text(encoding="utf-8"), re.MULTILINE)
            raise DatasetError(f"{error} ({command[1]} makes it)" if command else f"{error}") from None


def cells(
    models: Sequence[str],
    benchmarks: str,
    files: Sequence[str],
    given: Mapping[str, Any],
    output: Path | None = None,
    seeds: str = "",
) -> list[Cell]:
    """One cell for each model, benchmark and seed (the last two separated by commas; none: Table 1's, the files').

    Its parameters are those of the model, of `files`, of the benchmark, then `given`; later ones win. Its folder is
    <output>/<model>/<benchmark>/seed<n>, without the parts that the whole grid shares.

    ConfigError for a file that is not there or not readable, and for a parameter that this command decides itself.
    """
    names = [name.strip() for name in (benchmarks or ",".join(BENCHMARKS)).split(",") if name.strip()]
    if not names:
        raise ConfigError("--benchmarks names none")
    chosen = [{"seed": seed.strip()} for seed in seeds.split(",") if seed.strip()] or [{}]
    paths = [parameter_file("models", model) for model in models]
    base = (output or root() / "reports" / "runs" / "table1" / (paths[0].stem if len(paths) == 1 else "")).resolve()
    made = []
    for path, benchmark, seed in product(paths, names, chosen):
        file = parameter_file("benchmarks", benchmark)
        parameters = read_parameters(path, *files, file) | given
        if taken := [name for name in (*OWN, *seed) if name in parameters]:
            raise ConfigError(f"{taken[0]} is what table1 sets itself; --output names the folder of all its runs")
        parts = [path.stem] * (len(paths) > 1) + [file.stem] + [f"seed{number}" for number in seed.values()]
        parameters |= {"output_dir": str(base.joinpath(*parts)), "resume": True, **seed}
        made.append(Cell("/".join(parts), parameters, base, file))
    return made


def parameter_file(kind: str, name: str) -> Path:
    """A file as given, else the one of that name in notebooks/params/<kind>. ConfigError names the nearest."""
    if Path(name).is_file():
        return Path(name)
    known = {path.stem: path for path in sorted((FOLDER / "params" / kind).glob("*.yaml"))}
    stem = name.removesuffix(".yaml")
    check_names([stem], known, f"file of {kind}")
    return known[stem]


def run_all(table: Sequence[Cell], dry: bool = False) -> dict[str, str]:
    """Runs what is not finished, then 04_compare over all (`dry`: prints each cell's plan and the time of all).

    Prints as it goes; however it ends, last what is done, failed and left. Returns why cells failed, by name.
    """
    states = dict.fromkeys((cell.name for cell in table), "left")
    failures: dict[str, str] = {}
    plans: list[Plan] = []

    @contextlib.contextmanager
    def attempt(name: str, heading: str) -> Iterator[None]:
        print(f"\n{heading}", flush=True)
        try:
            yield
        except FAILURES as error:
            failures[name], states[name] = str(error), "failed"
            print(f"error: {error}", file=sys.stderr, flush=True)

    try:
        for number, cell in enumerate(table, 1):
            with attempt(cell.name, f"[{number}/{len(table)}] {cell.name}"):
                plans.append(made := cell.plan())
                if dry:
                    print(made, flush=True)
                if made.errors:
                    raise ConfigError("; ".join(made.errors))
                report = cell.executed.with_suffix(".html")
                if dry:
                    states[cell.name] = "planned"
                elif made.complete and report.is_file():
                    print(f"finished already: {shown(report)}", flush=True)
                    states[cell.name] = "done before"
                else:
                    print(f"report: {shown(notebooks.run(BENCHMARK, cell.given, cell.executed))}", flush=True)
                    states[cell.name] = "done"
        everything = table[0].everything
        if dry:
            print(f"\ntime of all that is still to do: {time_of(plans) if plans else 'unknown'}")
        elif find_runs(everything):
            with attempt("04_compare", "04_compare: all of them in one table"):
                compared = {"runs_folder": str(everything)}
                print(f"report: {shown(notebooks.run(COMPARE, compared, everything / '04_compare.ipynb'))}", flush=True)
            report_index.write_index()
    finally:
        print(f"\n{pd.Series(states).to_string()}", flush=True)
    return failures
