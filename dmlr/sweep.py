"""Sweeps: one parameter takes several values, each value is a run of its own, and runs that exist are reused.

Every point is asked the same questions, so each is compared in pairs with the baseline's run. Knows nothing about
what the parameters mean; figures are in `plots.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dmlr import evaluate
from dmlr.config import Config
from dmlr.metrics import paired, summary
from dmlr.vlm import VLM


@dataclass(frozen=True)
class Point:
    """Results by (dataset, method) of one setting."""

    overrides: Mapping[str, Any]
    results: Mapping[tuple[str, str], dict[str, Any]]

    def entries(self) -> list[dict[str, Any]]:
        """Records of all datasets, as if they were one: indices are made different."""
        named = ((dataset, e) for (dataset, _), result in self.results.items() for e in result["entries"])
        return [{**e, "data_idx": f"{dataset}/{e['data_idx']}"} for dataset, e in named]


def run_point(base: Config, vlm: VLM, overrides: Mapping[str, Any]) -> Point:
    """One setting, in its own folder under `base.output_dir`; what is finished there is not run again."""
    folder = Path(evaluate.output_folder(base)) / (label(overrides) or "base")
    config = base.replace(**overrides, output_dir=str(folder), resume=True)
    return Point(overrides, evaluate.run(config, vlm))


def label(overrides: Mapping[str, Any]) -> str:
    """'sigma=0.1,lr=0.01': the name of a point and of its folder."""
    return ",".join(f"{key}={value}" for key, value in overrides.items())


def sweep(
    base: Config, vlm: VLM, settings: Iterable[Mapping[str, Any]], baseline: Sequence[dict[str, Any]] | None = None
) -> pd.DataFrame:
    """One row per setting, its datasets taken together: the setting's values, accuracy with its interval, counts.

    `base.methods` names one method. With `baseline` (records of the same questions, as `Point.entries` gives them)
    also the paired difference in accuracy with its bootstrap interval and McNemar's p. Rewards and seconds are means
    over examples. The runs write to folders under `base.output_dir`.
    """
    rows = []
    for overrides in settings:
        point = run_point(base, vlm, overrides)
        entries = point.entries()
        row = {**overrides, **summary([{"entries": entries}]).iloc[0].drop(["model", "dataset", "method"]).to_dict()}
        if baseline is not None:
            pair = paired(baseline, entries)
            row |= {"difference": pair.difference, "difference_low": pair.low, "difference_high": pair.high}
            row |= {"gained": len(pair.gained), "lost": len(pair.lost), "p": pair.p_value}
        rows.append(row)
    return pd.DataFrame(rows)


def rewards(point: Point) -> pd.DataFrame:
    """Best reward so far over iterations: one row per example and iteration (0 is the start)."""
    rows = []
    for entry in point.entries():
        if entry.get("rewards") is None:
            continue
        best = entry["initial_reward"]
        for iteration, reward in enumerate([best, *entry["rewards"]]):
            best = max(best, reward)
            rows.append({"example": entry["data_idx"], "iteration": iteration, "tried": reward, "best": best})
    return pd.DataFrame(rows)
