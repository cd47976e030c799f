"""Records of a run -> cards of a gallery: a question with every method's answer, disagreements first. Pure.

What a card looks like is page.gallery's; whether an answer is right is the judge's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmlr.stats.outcomes import is_right, outcome

# What becomes of an answer from the first method to another; in this order they are shown.
_NAMES = {(False, True): "gained", (True, False): "lost", (False, False): "both wrong", (True, True): "both right"}
CHANGES = (*_NAMES.values(), "not judged")


def change(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """One of CHANGES, of two records of one example; "not judged" where either is absent or has no verdict."""
    return _NAMES.get(tuple(record and is_right(record) for record in (before, after)), "not judged")


def cards(results: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A card per example of every dataset: what is gained or lost by any method first, else as in the datasets.

    results: by (dataset, method), as evaluate.run gives them; every method is compared with the first.
    A card: dataset, idx, category, question, truth, images, methods, changes [one per method after the first], kept
    [(patches, grid) or None per method] and answers [name, text, right, note, change].
    """
    methods = list(dict.fromkeys(method for _, method in results))
    examples: dict[tuple, dict[str, Mapping[str, Any]]] = {}
    for (dataset, method), result in results.items():
        for record in result["entries"]:
            # By row as well: a row that never became an example may have no data_idx.
            examples.setdefault((dataset, record.get("row"), record["data_idx"]), {})[method] = record
    made = [_card(dataset, records, methods) for (dataset, *_), records in examples.items()]
    return sorted(made, key=lambda card: min((CHANGES.index(c) for c in card["changes"]), default=0) > 1)


def _card(dataset: str, records: Mapping[str, Mapping[str, Any]], methods: list[str]) -> dict[str, Any]:
    record = next(iter(records.values()))
    paths = record.get("image_path") or []
    changes = {method: change(records.get(methods[0]), records.get(method)) for method in methods[1:]}
    return {
        "dataset": dataset,
        "idx": record["data_idx"],
        "category": record.get("category"),
        "question": record["question"],
        "truth": record.get("ground_truth") or "not given",
        "images": [paths] if isinstance(paths, str) else paths,
        "methods": methods,
        "changes": list(changes.values()),
        "kept": [_kept(records.get(method) or {}) for method in methods],
        "answers": [
            _answer(method, records[method]) | {"change": changes.get(method) if len(methods) > 2 else None}
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
