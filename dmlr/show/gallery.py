"""Records of a run -> cards of a gallery: a question with every method's answer, disagreements first. Pure.

What a card looks like is page.gallery's; whether an answer is right is the judge's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmlr.stats.outcomes import is_right, outcome

# What becomes of an answer from the first method to another; in this order they are shown.
CHANGES = ("gained", "lost", "both wrong", "both right", "not judged")


def change(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """One of CHANGES, of two records of one example; "not judged" where either is absent or has no verdict."""
    pair = (is_right(before) if before else None, is_right(after) if after else None)
    names = {(False, True): "gained", (True, False): "lost", (False, False): "both wrong", (True, True): "both right"}
    return names.get(pair, "not judged")


def cards(results: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A card per example of every dataset: what is gained or lost by any method first, else as in the datasets.

    results: by (dataset, method), as evaluate.run gives them; every method is compared with the first.
    A card: dataset, idx, category, question, truth, images, methods, changes [one per method after the first], kept
    [(patches, grid) or None per method] and answers [name, text, right, note, change].
    """
    methods = list(dict.fromkeys(method for _, method in results))
    made = []
    for dataset in dict.fromkeys(dataset for dataset, _ in results):
        # By row as well: a row that never became an example may have no data_idx.
        by_method = {
            m: {(record.get("row"), record["data_idx"]): record for record in results[dataset, m]["entries"]}
            for m in methods
            if (dataset, m) in results
        }
        for key in dict.fromkeys(key for records in by_method.values() for key in records):
            of_key = {method: records[key] for method, records in by_method.items() if key in records}
            made.append(_card(dataset, of_key, methods))
    return sorted(made, key=lambda card: min((CHANGES.index(c) for c in card["changes"]), default=0) > 1)


def _card(dataset: str, records: Mapping[str, Mapping[str, Any]], methods: list[str]) -> dict[str, Any]:
    record = next(iter(records.values()))
    paths = record.get("image_path")
    changes = [change(records.get(methods[0]), records.get(method)) for method in methods[1:]]
    by_name = dict(zip(methods[1:], changes, strict=True)) if len(methods) > 2 else {}
    return {
        "dataset": dataset,
        "idx": record["data_idx"],
        "category": record.get("category"),
        "question": record["question"],
        "truth": record.get("ground_truth") or "not given",
        "images": [paths] if isinstance(paths, str) else list(paths or []),
        "methods": methods,
        "changes": changes,
        "kept": [_kept(records.get(method) or {}) for method in methods],
        "answers": [
            _answer(method, records[method]) | {"change": by_name.get(method)}
            for method in methods
            if method in records
        ],
    }


def _kept(record: Mapping[str, Any]) -> tuple[list, tuple] | None:
    patches, grid = record.get("patches") or [], record.get("patch_grid")
    return (patches, tuple(grid)) if any(patches) and grid else None


def _answer(method: str, record: Mapping[str, Any]) -> dict[str, Any]:
    counted = outcome(record)
    notes = [] if counted in ("correct", "wrong") else [counted.replace("_", " ")]
    notes += [record["rule"]] if record.get("rule") else []
    if record.get("initial_reward") is not None and record.get("best_reward") is not None:
        notes.append(f"reward {record['initial_reward']:.4f} → {record['best_reward']:.4f}")
    return {
        "name": method,
        "text": record.get("error") or record.get("model_output") or "",
        "right": is_right(record),
        "note": " · ".join(notes),
    }
