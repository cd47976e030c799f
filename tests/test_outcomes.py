"""A record counts as one thing, whoever asks."""

import pytest

from dmlr.stats.outcomes import is_right, outcome, tally

CASES = [
    ({"verdict": "correct", "is_correct": True}, "correct", True),
    ({"verdict": "wrong", "is_correct": False}, "wrong", False),
    ({"verdict": "unparsed", "is_correct": False}, "unparsed", False),
    ({"verdict": "judge_failed", "is_correct": None}, "judge_failed", None),
    ({"is_correct": True}, "correct", True),  # a file of the original command line has no verdict
    ({"is_correct": False}, "wrong", False),
    ({"stop_reason": "error", "verdict": None, "is_correct": None}, "error", None),
    ({"stop_reason": "skipped_no_ground_truth", "verdict": None}, "skipped", None),
]


@pytest.mark.parametrize(("record", "counts_as", "right"), CASES)
def test_a_record_is_one_thing(record, counts_as, right):
    record = {"stop_reason": "eos_token", **record}
    assert (outcome(record), is_right(record)) == (counts_as, right)


def test_accuracy_counts_neither_errors_nor_skipped_nor_failed_judge_calls():
    counts = tally({"stop_reason": "eos_token", **record} for record, *_ in CASES)
    assert counts == {
        "accuracy": 0.4,
        "correct": 2,
        "total": 5,
        "wrong": 2,
        "unparsed": 1,
        "errors": 1,
        "skipped": 1,
        "judge_failed": 1,
    }
    assert tally([])["accuracy"] is None
