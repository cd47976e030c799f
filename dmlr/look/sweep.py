"""Sweeps: a few settings of one configuration, each a run of its own; runs that exist are reused.

Every setting is asked the same questions, so each is compared in pairs with the baseline's run. Knows nothing about
what the parameters mean, but for `sigma_percent`; figures are in `plots/sweep.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dmlr.config import Config, ConfigError, check_names, locate
from dmlr.model.vlm import VLM
from dmlr.run import evaluate
from dmlr.stats.metrics import paired, summary

SIGMA_PERCENT = "sigma_percent"  # sigma in per cent of the RMS of the think token's embedding


@dataclass(frozen=True)
class Sweep:
    """What a file under notebooks/params/sweeps says: the axis, and parameters to override by label."""

    axis: str
    settings: Mapping[str | float, Mapping[str, Any]]


@dataclass(frozen=True)
class Point:
    """Results by (dataset, method) of one setting."""

    overrides: Mapping[str, Any]
    results: Mapping[tuple[str, str], dict[str, Any]]

    def entries(self) -> list[dict[str, Any]]:
        """Records of all datasets, as if they were one: indices are made different."""
        named = ((dataset, e) for (dataset, _), result in self.results.items() for e in result["entries"])
        return [{**e, "data_idx": f"{dataset}/{e['data_idx']}"} for dataset, e in named]


def read_sweep(path: str | Path) -> Sweep:
    """A sweep's YAML file. ConfigError for another form, and for a name that is no parameter."""
    try:
        told = yaml.safe_load(Path(locate(path)).read_text(encoding="utf-8"))
        sweep = Sweep(str(told["axis"]), {label: dict(overrides) for label, overrides in told["settings"].items()})
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"sweep file {path}: expected an axis and settings by label; {error!r}") from None
    known = [*(field.name for field in dataclasses.fields(Config)), SIGMA_PERCENT]
    for overrides in sweep.settings.values():
        check_names(overrides, known)
    return sweep


def run_point(base: Config, vlm: VLM, overrides: Mapping[str, Any]) -> Point:
    """One setting, in its own folder under `base.output_dir`; what is finished there is not run again."""
    folder = Path(evaluate.output_folder(base)) / (name(overrides) or "base")
    values = dict(overrides)
    if SIGMA_PERCENT in values:
        values["sigma"] = values.pop(SIGMA_PERCENT) / 100 * vlm.embedding_rms
    config = base.replace(**values, output_dir=str(folder), resume=True)
    return Point(overrides, evaluate.run(config, vlm))


def name(overrides: Mapping[str, Any]) -> str:
    """'sigma=0.1,lr=0.01': the folder of a setting."""
    return ",".join(f"{key}={value}" for key, value in overrides.items())


def run_sweep(base: Config, vlm: VLM, sweep: Sweep) -> dict[str | float, Point]:
    """Every setting in order, by label. `base.methods` names one method."""
    return {label: run_point(base, vlm, overrides) for label, overrides in sweep.settings.items()}


def table(points: Mapping[Any, Point], baseline: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per setting, its datasets taken together: label, accuracy with interval, counts, mean reward and seconds,
    and the paired difference to the baseline (records of the same questions, as `Point.entries` gives them).
    """
    rows = []
    for label, point in points.items():
        entries = point.entries()
        row = summary([{"entries": entries}]).iloc[0].drop(["model", "dataset", "method"]).to_dict()
        pair = paired(baseline, entries)
        row |= {"difference": pair.difference, "difference_low": pair.low, "difference_high": pair.high}
        row |= {"gained": len(pair.gained), "lost": len(pair.lost), "p": pair.p_value}
        rows.append({"label": label, **row})
    return pd.DataFrame(rows)


def rewards(points: Iterable[tuple[Any, Point]]) -> pd.DataFrame:
    """Rewards and kept patches over iterations: one row per label, example and iteration (0 is the start).

    tried: reward of the state tried in the iteration; best: the best so far; patches: interleaved when tried.
    """
    rows = []
    for label, point in points:
        for entry in point.entries():
            if entry.get("rewards") is None:
                continue
            best, counts = entry["initial_reward"], [0, *entry["patch_counts"]]
            for iteration, reward in enumerate([best, *entry["rewards"]]):
                best = max(best, reward)
                place = {"label": label, "example": entry["data_idx"], "iteration": iteration}
                rows.append({**place, "tried": reward, "best": best, "patches": counts[iteration]})
    return pd.DataFrame(rows)
