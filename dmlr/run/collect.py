"""Runs that lie under a folder, read for a comparison: what was run, under which setting, with which answers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from dmlr.config import Config
from dmlr.run.records import FREE_PARAMETERS, ResultsError, differences, find_runs, read_results, with_defaults

# The parameters that make a setting; not among them: what stands in a column of its own, and what changes no record.
_BESIDE = FREE_PARAMETERS | {"dataset", "model_name_or_path", "device", "seed"}
_SETTING = [name for name in Config.model_fields if name not in _BESIDE]
# What two runs of one folder must have in common to be paired: whatever decides the answers of any method.
_SHARED = (
    *("model_name_or_path", "revision", "dtype", "load_in_bits", "seed", "solver_prompt_idx", "prompts_file"),
    *("max_new_tokens", "banned_strings", "min_pixels", "max_pixels"),
)
_KEPT = (
    *("data_idx", "ground_truth", "is_correct", "verdict", "stop_reason", "best_reward", "seconds", "abstained"),
    *("category", "l2_category", "pair_id", "figure_group", "question_group"),
)


def load_runs(root: str | Path, baseline: str) -> pd.DataFrame:
    """A row per run under a folder: one method on one dataset.

    Columns: run (its folder's name), model, dataset, method, seed; setting: the judge and the parameters that decide
    the answers, the seed not among them; entries: of each what tables need; beside: the entries of the baseline of the
    same run, None without one.

    A results.json that cannot be read costs itself only, and one that cannot be paired with the baseline beside it (of
    another seed, say) that pair, with a warning that says why.
    """
    root, rows, configs = Path(root), {}, {}
    for path in sorted(find_runs(root), key=lambda path: (path.name != baseline, path)):
        try:
            content = read_results(path)
        except ResultsError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
            continue
        config = configs[path] = with_defaults(content.get("config"))
        baseline_path = path.parent / baseline
        both = configs.get(baseline_path, config), config
        if differing := differences(*({name: one[name] for name in _SHARED} for one in both)):
            warnings.warn(f"left unpaired: {path} and its {baseline}: {'; '.join(differing)}", stacklevel=2)
        rows[path] = {
            "run": _label(path, root),
            **{name: str(content.get(name)) for name in ("model", "dataset", "method")},
            "seed": str(config["seed"]),
            "setting": {"judge": _judge(content.get("llm_judge"))} | {name: config[name] for name in _SETTING},
            "entries": [{key: entry[key] for key in _KEPT if key in entry} for entry in content["entries"]],
            "beside": None if differing or baseline_path not in rows else rows[baseline_path]["entries"],
        }
    names = ("run", "model", "dataset", "method", "seed", "setting", "entries", "beside")
    return pd.DataFrame(list(rows.values()), columns=names)


def _label(path: Path, root: Path) -> str:
    """A run's folder, which holds <dataset>/<method>."""
    folder = path.parents[1]
    return folder.relative_to(root).as_posix() if root in folder.parents else root.name


def _judge(asked: Mapping[str, Any] | None) -> str:
    if not asked:
        return "rules"
    return f"{asked['model']}, every answer" if asked.get("every") else f"rules, then {asked['model']}"
