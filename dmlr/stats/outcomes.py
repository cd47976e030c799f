"""What a record counts as, everywhere: accuracy, tables and figures ask here. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

JUDGED = {"correct": True, "wrong": False, "unparsed": False}  # verdicts on an answer, and whether it is right


def outcome(record: Mapping[str, Any]) -> str:
    """correct, wrong, unparsed, judge_failed, error or skipped: what a record counts as, everywhere."""
    stop, verdict = str(record.get("stop_reason") or ""), record.get("verdict")
    if stop == "error":
        return "error"
    if stop.startswith("skipped"):
        return "skipped"
    if verdict in (*JUDGED, "judge_failed"):
        return verdict
    return {True: "correct", False: "wrong"}.get(record.get("is_correct"), "judge_failed")


def is_right(record: Mapping[str, Any]) -> bool | None:
    """Whether a judged record is correct; None for an error, a skipped example or a failed judge call."""
    return JUDGED.get(outcome(record))


def tally(records: Iterable[Mapping[str, Any]]) -> dict[str, int | float | None]:
    """Counts by `outcome`, and accuracy = correct / (correct + wrong + unparsed), null when nothing was judged.

    Errors, skipped examples and failed judge calls are no wrong answers: they are counted beside `total`.
    """
    counts = Counter(map(outcome, records))
    total = sum(counts[verdict] for verdict in JUDGED)
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
