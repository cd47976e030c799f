"""Runs that lie under a folder, read for a comparison: what was run, under which setting, with which answers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmlr.config import Config
from dmlr.run.records import FREE_PARAMETERS, ResultsError, find_runs, read_results
from dmlr.stats.comparison import GROUPS, Run, in_order

# The parameters that make a setting; not among them: what stands in a column of its own, and what changes no record.
_BESIDE = FREE_PARAMETERS | {"dataset", "model_name_or_path", "device", "seed"}
_DEFAULTS = {name: field.default for name, field in Config.model_fields.items() if name not in _BESIDE}
_KEPT = ("data_idx", "ground_truth", "is_correct", "verdict", "stop_reason", "best_reward", "seconds", "abstained")


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
        config = content.get("config") or {}
        found[path] = Run(
            _label(path, root),
            *(str(content.get(name)) for name in ("model", "dataset", "method")),
            seed=config.get("seed"),
            # what the run's version did not have is at its default
            setting={"judge": _judge(content.get("llm_judge"))}
            | {name: config.get(name, default) for name, default in _DEFAULTS.items()},
            entries=[{key: entry[key] for key in (*_KEPT, *GROUPS) if key in entry} for entry in content["entries"]],
            beside=found.get(path.parent / baseline),
        )
    return in_order(list(found.values()), baseline)


def _label(path: Path, root: Path) -> str:
    """A run's folder, which holds <dataset>/<method>."""
    folder = path.parents[1]
    return folder.relative_to(root).as_posix() if root in folder.parents else root.name


def _judge(asked: Mapping[str, Any] | None) -> str:
    if not asked:
        return "rules"
    return f"{asked['model']}, every answer" if asked.get("every") else f"rules, then {asked['model']}"
