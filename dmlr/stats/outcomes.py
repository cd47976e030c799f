"""What a record counts as, everywhere: accuracy, tables and figures ask here. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def outcome(record: Mapping[str, Any]) -> str:
    """correct, wrong, unparsed, judge_failed, error or skipped: what a record counts as, everywhere."""
    stop = str(record.get("stop_reason") or "")
    if stop == "error":
        return "error"
    if stop.startswith("skipped"):
        return "skipped"
    verdict = record.get("verdict")
    if verdict in ("correct", "wrong", "unparsed", "judge_failed"):
        return verdict
    known = {True: "correct", False: "wrong"}
    return known.get(record.get("is_correct"), "judge_failed")


def is_right(record: Mapping[str, Any]) -> bool | None:
    """Whether a judged record is correct; None for an error, a skipped example or a failed judge call."""
    return {"correct": True, "wrong": False, "unparsed": False}.get(outcome(record))


def tally(records: Iterable[Mapping[str, Any]]) -> dict[str, int | float | None]:
    """Counts by `outcome`, and accuracy = correct / (correct + wrong + unparsed), null when nothing was judged.

    Errors, skipped examples and failed judge calls are no wrong answers: they are counted beside `total`.
    """
    counts = Counter(outcome(record) for record in records)
    total = counts["correct"] + counts["wrong"] + counts["unparsed"]
    return {
        "accuracy": counts["correct"] / total if total else None,
        "correct": counts["correct"],
        "total": total,
        "wrong": counts["wrong"],
        "unparsed": counts["unparsed"],
        "errors": counts["error"],
        "skipped": counts["skipped"],
        "judge_failed": counts["judge_failed"],
    }
