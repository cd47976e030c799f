"""Runs that lie under a folder: what was run, under which setting, and which runs are the same but for the seed.

A run is one results.json. Two runs that differ in nothing but the seed (same model, method, parameters, judge and
questions) are the same run repeated; everything else that differs is a setting of its own, named by a letter.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from dmlr.config import Config
from dmlr.data.benchmarks.rows import BENCHMARKS
from dmlr.run.records import FREE_PARAMETERS, ResultsError, find_runs, read_results
from dmlr.stats import metrics
from dmlr.stats.comparison import published

# The parameters that make a setting; not among them: what stands in a column of its own, and what changes no record.
_BESIDE = FREE_PARAMETERS | {"dataset", "model_name_or_path", "device", "seed"}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config) if field.name not in _BESIDE}
_METHODS = tuple(dict.fromkeys(method for _, method, _ in published.TABLE_1))
_KEPT = ("data_idx", "ground_truth", "is_correct", "verdict", "stop_reason", "best_reward", "seconds")
GROUPS = ("category", "l2_category", "pair_id", "figure_group", "question_group")


@dataclass(frozen=True)
class Run:
    """One method on one dataset. `label` names the run's folder; `beside` is the baseline of the same run, if any."""

    label: str
    model: str
    dataset: str
    method: str
    config: Mapping[str, Any]
    entries: Sequence[Mapping[str, Any]]
    judge: str = "rules"
    beside: Run | None = None

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @cached_property
    def setting(self) -> dict[str, Any]:
        """Judge, and parameters that decide the answers; what the run's version did not have is at its default."""
        return {"judge": self.judge} | {name: self.config.get(name, default) for name, default in DEFAULTS.items()}

    @cached_property
    def summary(self) -> pd.Series:
        return metrics.summary([{"entries": self.entries}]).iloc[0]

    @cached_property
    def paired(self) -> metrics.Paired | None:
        return metrics.paired(self.beside.entries, self.entries) if self.beside else None

    @property
    def names(self) -> dict[str, str]:
        return {"run": self.label, "dataset": title(self.dataset), "method": self.method}

    @cached_property
    def all_but_the_seed(self) -> tuple:
        questions = tuple((entry["data_idx"], entry.get("ground_truth")) for entry in self.entries)
        return self.model, self.dataset, self.method, repr(self.setting), questions


def load_runs(root: str | Path, baseline: str) -> list[Run]:
    """Every run under a folder, by model, dataset and run, the baseline first; of the entries what tables need.

    A results.json that cannot be read costs itself only, with a warning that says why.
    """
    root, found = Path(root), {}
    for path in sorted(find_runs(root), key=lambda path: (path.name != baseline, path)):
        try:
            content = read_results(path)
        except ResultsError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
            continue
        entries = [{key: entry[key] for key in (*_KEPT, *GROUPS) if key in entry} for entry in content["entries"]]
        told = [str(content.get(name)) for name in ("model", "dataset", "method")]
        judge, beside = _judge(content.get("llm_judge")), found.get(path.parent / baseline)
        found[path] = Run(_label(path, root), *told, content.get("config") or {}, entries, judge, beside)
    return sorted(
        found.values(),
        key=lambda run: (run.model, order(run), run.label, run.method != baseline, _rank(run.method), run.method),
    )


def _label(path: Path, root: Path) -> str:
    """A run's folder, which holds <dataset>/<method>."""
    folder = path.parents[1]
    return folder.relative_to(root).as_posix() if root in folder.parents else root.name


def _judge(asked: Mapping[str, Any] | None) -> str:
    if not asked:
        return "rules"
    return f"{asked['model']}, every answer" if asked.get("every") else f"rules, then {asked['model']}"


def _rank(method: str) -> int:
    """The paper's order of methods, then all others."""
    return _METHODS.index(method) if method in _METHODS else len(_METHODS)


def settings(runs: Sequence[Run]) -> dict[str, str]:
    """A letter for each distinct setting, by its repr, in order of appearance."""
    return {text: _letter(i) for i, text in enumerate(dict.fromkeys(repr(run.setting) for run in runs))}


def same_but_for_the_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs in groups that differ in nothing but the seed; a seed that comes again begins another group."""
    groups: dict[tuple, list[list[Run]]] = defaultdict(list)
    for run in runs:
        same = groups[run.all_but_the_seed]
        place = next((group for group in same if run.seed not in [member.seed for member in group]), None)
        if place is None:
            same.append([run])
        else:
            place.append(run)
    return [group for same in groups.values() for group in same]


def order(run: Run) -> tuple:
    """Sorts datasets in tables: the paper's in its order, then the others by name."""
    benchmark = published.benchmark_of(run.dataset)
    return (published.BENCHMARKS.index(benchmark) if benchmark else len(published.BENCHMARKS)), title(run.dataset)


def title(dataset: str) -> str:
    """Name of a dataset in a table: the paper's for its benchmarks, else that of the file."""
    stem = Path(dataset).name.removesuffix(".json")
    return BENCHMARKS[stem].title if stem in BENCHMARKS else stem


def _letter(position: int) -> str:
    return chr(65 + position) if position < 26 else f"{_letter(position // 26 - 1)}{_letter(position % 26)}"
