"""All runs in the form of the paper's Table 1: model × method × benchmark, with what a reader needs to doubt a number.

Runs -> data frames of text, ready to be shown. Two runs that differ in nothing but the seed (same model, method,
parameters, judge and questions) are the same run repeated, one line with mean and spread; everything else that differs
is a setting of its own, named by a letter. Knows nothing of files.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd

from dmlr.data.benchmarks import BENCHMARKS
from dmlr.stats import metrics, published

GROUPS = ("category", "l2_category", "pair_id", "figure_group", "question_group")
_METHODS = tuple(dict.fromkeys(method for _, method, _ in published.TABLE_1))
_COUNTS = {"judged": "total", "abstained": "abstained", "unparsed": "unparsed", "judge failed": "judge_failed"}
_COUNTS |= {"errors": "errors", "skipped": "skipped"}
_ALWAYS = {"judge": "judge", "L": "num_thought_tokens", "T": "max_num_steps", "η": "lr", "σ": "sigma"}


@dataclass(frozen=True)
class Run:
    """One method on one dataset, from a results.json. `label` names the run's folder; `setting` has the judge and the
    parameters that decide the answers, the seed not among them; `beside` is the baseline of the same run, if any.
    """

    label: str
    model: str
    dataset: str
    method: str
    seed: Any
    setting: Mapping[str, Any]
    entries: Sequence[Mapping[str, Any]]
    beside: Run | None = None

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


def in_order(runs: Sequence[Run], baseline: str) -> list[Run]:
    """Runs by model, dataset and run; of one run the baseline first, then the paper's methods in its order."""

    def key(run: Run) -> tuple:
        rank = _METHODS.index(run.method) if run.method in _METHODS else len(_METHODS)
        return run.model, order(run), run.label, run.method != baseline, rank, run.method

    return sorted(runs, key=key)


def order(run: Run) -> tuple:
    """Sorts datasets in tables: the paper's in its order, then the others by name."""
    benchmark = published.benchmark_of(run.dataset)
    return (published.BENCHMARKS.index(benchmark) if benchmark else len(published.BENCHMARKS)), title(run.dataset)


def title(dataset: str) -> str:
    """Name of a dataset in a table: the paper's for its benchmarks, else that of the file."""
    stem = Path(dataset).name.removesuffix(".json")
    return BENCHMARKS[stem].title if stem in BENCHMARKS else stem


def settings(runs: Sequence[Run]) -> dict[str, str]:
    """A letter for each distinct setting, by its repr, in order of appearance; after Z comes A1."""
    distinct = dict.fromkeys(repr(run.setting) for run in runs)
    return {text: chr(65 + i % 26) + (str(i // 26) if i > 25 else "") for i, text in enumerate(distinct)}


def same_but_for_the_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs in groups that differ in nothing but the seed; a seed that comes again begins another group."""
    groups: dict[tuple, list[Run]] = defaultdict(list)
    repeats: Counter = Counter()
    for run in runs:
        same = run.all_but_the_seed
        groups[same, repeats[same, run.seed]].append(run)
        repeats[same, run.seed] += 1
    return list(groups.values())


def cites_the_paper(runs: Sequence[Run]) -> bool:
    """Whether the paper has a number for one of these runs."""
    return any(published.accuracy(run.model, run.method, run.dataset) is not None for run in runs)


# Tables


def table_1(runs: Sequence[Run]) -> pd.DataFrame:
    """Rows model × setting × method, a column per dataset: accuracy in per cent with its Wilson interval.

    Several seeds: mean ± standard deviation. The paper's number follows where it has one. What stands twice in a cell
    differs in the questions, or was run twice; the table of runs says which.
    """
    letters = settings(runs)
    cells: dict[tuple, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for group in same_but_for_the_seed(runs):
        run = group[0]
        row = (Path(run.model).name, letters[repr(run.setting)], run.method)
        cells[row][title(run.dataset)].append(_cell(group))
    columns = list(dict.fromkeys(title(run.dataset) for run in sorted(runs, key=order)))
    rows = [
        [*row, *(" / ".join(by.get(column, [])) for column in columns)]
        for row, by in sorted(cells.items(), key=lambda item: item[0][:2])
    ]
    table = pd.DataFrame(rows, columns=["model", "setting", "method", *columns])
    return table if len(letters) > 1 else table.drop(columns="setting")


def _cell(group: Sequence[Run]) -> str:
    run, values = group[0], [100 * member.summary["accuracy"] for member in group]
    if len(group) > 1:
        text = f"{mean(values):.1f} ± {stdev(values):.1f} ({len(group)} seeds)"
    elif math.isnan(values[0]):
        text = "–"
    else:
        text = f"{values[0]:.1f} [{100 * run.summary['low']:.1f}, {100 * run.summary['high']:.1f}]"
    paper = published.accuracy(run.model, run.method, run.dataset)
    return text if paper is None else f"{text}, paper {paper:.1f}"


def settings_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per setting: the parameters that everybody asks for, and all in which the settings differ."""
    letters = settings(runs)
    table = pd.DataFrame({letters[repr(run.setting)]: {n: _plain(v) for n, v in run.setting.items()} for run in runs}).T
    differing = [name for name in table if table[name].nunique() > 1 and name not in _ALWAYS.values()]
    shown = table.reindex(columns=[*_ALWAYS.values(), *differing])
    return shown.set_axis([*_ALWAYS, *differing], axis=1).rename_axis("setting").reset_index()


def runs_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per run: its accuracy with the interval; model and setting are columns where there are several."""
    letters = settings(runs)
    rows = [
        {
            **run.names,
            "model": Path(run.model).name,
            "setting": letters[repr(run.setting)],
            "seed": _plain(run.seed),
            **_accuracy(*run.summary[["accuracy", "low", "high", "total"]]),
        }
        for run in runs
    ]
    alike = [name for name, values in (("model", {run.model for run in runs}), ("setting", letters)) if len(values) < 2]
    return pd.DataFrame(rows).drop(columns=alike, errors="ignore")


def outcomes_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per run: what is no plain right or wrong, and seconds per example (the mean over its examples)."""
    rows = [
        {
            **run.names,
            "seed": _plain(run.seed),
            **{shown: run.summary[name] for shown, name in _COUNTS.items()},
            "s / example": _shown(run.summary["seconds"], ".2f"),
        }
        for run in runs
    ]
    return pd.DataFrame(rows)


def paired_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per run that has a baseline beside it: the difference in points, its bootstrap interval, McNemar's p."""
    rows = [
        {
            **run.names,
            "seed": _plain(run.seed),
            "difference": f"{100 * pair.difference:+.1f} points",
            "95 % interval": f"{100 * pair.low:+.1f} to {100 * pair.high:+.1f}",
            "gained": len(pair.gained),
            "lost": len(pair.lost),
            "n": pair.n,
            "p": f"{pair.p_value:.2g}",
        }
        for run in runs
        if (pair := run.paired) is not None
    ]
    return pd.DataFrame(rows)


def seeds_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per group of several seeds: mean and standard deviation of accuracy and of the paired difference."""
    letters = settings(runs)
    rows = []
    for group in same_but_for_the_seed(runs):
        if len(group) < 2:
            continue
        run, values = group[0], [100 * member.summary["accuracy"] for member in group]
        gains = [100 * member.paired.difference for member in group if member.paired]
        rows.append(
            {
                "model": Path(run.model).name,
                "dataset": title(run.dataset),
                "setting": letters[repr(run.setting)],
                "method": run.method,
                "seeds": ", ".join(str(member.seed) for member in group),
                "accuracy, mean ± s.d.": f"{mean(values):.1f} ± {stdev(values):.1f}",
                "lowest – highest": f"{min(values):.1f} – {max(values):.1f}",
                "difference, mean ± s.d.": f"{mean(gains):+.1f} ± {stdev(gains):.1f}" if len(gains) > 1 else "",
            }
        )
    return pd.DataFrame(rows)


def groups_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per run and metric of its benchmark's own, where the records have the groups that it is defined on."""
    return pd.DataFrame(
        {**run.names, "metric": metric, **values} for run in runs for metric, values in group_metrics(run.entries)
    )


def group_metrics(entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """HallusionBench: aAcc, fAcc, qAcc; MMVP: pairs; MMStar: the mean over l2 categories, and each category."""

    def of(one: metrics.Accuracy) -> dict[str, Any]:
        return _accuracy(one.value, one.low, one.high, one.total)

    has = {key for key in GROUPS if any(entry.get(key) is not None for entry in entries)}
    if {"figure_group", "question_group"} <= has:
        yield "aAcc (questions)", of(metrics.accuracy(entries))
        yield "fAcc (figures)", of(metrics.group_accuracy(entries, "figure_group"))
        yield "qAcc (question groups)", of(metrics.group_accuracy(entries, "question_group"))
    if "pair_id" in has:
        yield "pairs", of(metrics.pair_accuracy(entries))
    if "l2_category" in has:
        over = metrics.category_mean(entries, "l2_category")
        yield "mean over l2 categories", {"accuracy": _shown(over, ".1%"), "95 % interval": "", "n": ""}
        for row in metrics.by_category(entries).itertuples():
            yield f"category {row.category}", _accuracy(row.value, row.low, row.high, row.total)


def calibration_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per run with rewards: the AUROC of the best reward, and what its interval says."""
    return pd.DataFrame(
        {
            **run.names,
            "AUROC": f"{auroc.value:.2f}",
            "95 % interval": f"{auroc.low:.2f} – {auroc.high:.2f}",
            "n": auroc.right + auroc.wrong,
            "a higher reward is": auroc.higher_is,
        }
        for run in runs
        if not math.isnan((auroc := metrics.auroc(run.entries)).value)
    )


def _accuracy(value: float, low: float, high: float, total: int) -> dict[str, Any]:
    interval = f"{_shown(low, '.1%')} – {_shown(high, '.1%')}"
    return {"accuracy": _shown(value, ".1%"), "95 % interval": interval, "n": total}


def _shown(value: float, how: str) -> str:
    return "–" if math.isnan(value) else format(value, how)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value) or "–"
