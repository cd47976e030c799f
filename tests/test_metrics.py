"""What a record counts as, whoever asks; statistics against closed forms, published values and brute force."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmlr.stats import metrics
from dmlr.stats.bootstrap import Bootstrap
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


def records(outcomes, **more):
    return [
        {"data_idx": i, "row": i, "is_correct": ok, **{k: v[i] for k, v in more.items()}}
        for i, ok in enumerate(outcomes)
    ]


def test_a_record_counts_as_one_thing_and_only_what_was_judged_as_an_answer():
    ran = [{"stop_reason": "eos_token", **record} for record, *_ in CASES]
    assert [(outcome(record), is_right(record)) for record in ran] == [(kind, right) for _, kind, right in CASES]
    counts = {"correct": 2, "total": 5, "wrong": 2, "unparsed": 1, "errors": 1, "skipped": 1, "judge_failed": 1}
    assert tally(ran) == {"accuracy": 0.4, **counts}
    assert tally([])["accuracy"] is None


def scored(pairs):
    return [{"best_reward": float(score), "is_correct": right} for score, right in pairs]


def test_wilson_has_the_published_values_contains_its_own_and_mirrors():
    """Newcombe, Statistics in Medicine 1998, table I, method 3."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (correct, total), interval in published.items():
        found = metrics.wilson(correct, total)
        assert (found.low, found.high) == pytest.approx(interval, abs=6e-5)
    for correct in range(61):
        one, other = metrics.wilson(correct, 60), metrics.wilson(60 - correct, 60)
        assert 0 <= one.low <= one.value <= one.high <= 1
        assert one.low == pytest.approx(1 - other.high, abs=1e-12)
    assert math.isnan(metrics.wilson(0, 0).low)


def test_mcnemar_is_the_sign_test():
    def enumerated(n, k):
        return sum(abs(sum(s)) >= abs(n - 2 * k) for s in itertools.product((-1, 1), repeat=n)) / 2**n

    for k in range(9):
        assert metrics.mcnemar_exact(k, 8 - k) == pytest.approx(enumerated(8, k))
    assert metrics.mcnemar_exact(0, 0) == 1
    assert 0 < metrics.mcnemar_exact(3000, 3300) < 1e-3  # far beyond what a float can count


def test_paired_lists_gains_and_losses():
    a, b = records([True, True, False, False, None, True]), records([True, False, True, True, True, None])
    result = metrics.paired(a, b)
    assert (result.n, result.gained, result.lost, result.difference) == (4, [2, 3], [1], 0.25)
    assert result.p_value == metrics.mcnemar_exact(2, 1) == 1
    assert metrics.paired(a, b) == result  # the bootstrap is seeded
    with pytest.raises(ValueError, match="data_idx 0 occurs twice"):
        metrics.paired(a * 2, b)
    empty = metrics.paired(a, [])
    assert empty.n == 0 and math.isnan(empty.difference) and empty.p_value == 1


def test_paired_interval_equals_resampling_the_examples():
    rng = np.random.default_rng(7)
    a, b = rng.random(200) < 0.5, rng.random(200) < 0.6
    result = metrics.paired(records(a.tolist()), records(b.tolist()))
    direct = rng.choice(b.astype(int) - a.astype(int), (20_000, 200)).mean(axis=1)
    assert (result.low, result.high) == pytest.approx(np.quantile(direct, [0.025, 0.975]), abs=0.011)
    one = metrics.paired(records([False]), records([True]))
    assert (one.low, one.high) == (1, 1), "of one example there is nothing to resample"


def test_pairs_count_when_both_are_right():
    run = records([True, True, True, False, True, None, True], pair_id=[0, 0, 1, 1, 2, 2, None])
    run += records([True], pair_id=[3])
    for size, total in ((2, 2), (None, 3)):  # the third pair was not judged in full, of the last a sample left half
        value = metrics.group_accuracy(run, "pair_id", size)
        assert (value.correct, value.total) == (total - 1, total)


def test_categories():
    run = records([True, False, True, None], category=["sum", "sum", "colour", None])
    table = metrics.by_category(run).set_index("category")
    assert table.loc["sum", "value"] == 0.5 and table.loc["colour", "total"] == 1 and table.loc["(none)", "total"] == 0


def test_means_over_clusters_are_those_of_whole_clusters_resampled():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"question": np.repeat(np.arange(40), 5), "part": np.tile(["a", "b"], 100)})
    table["value"] = np.repeat(rng.normal(size=40), 5) + (table["part"] == "b")
    whole = Bootstrap(table, "question").mean("value")
    by_question = table.groupby("question")["value"].mean().to_numpy()
    direct = rng.choice(by_question, (4000, 40)).mean(axis=1)
    assert (whole.value, whole.n, whole.clusters) == (pytest.approx(by_question.mean()), 200, 40)
    assert (whole.low, whole.high) == pytest.approx(np.quantile(direct, [0.025, 0.975]), abs=0.04)
    gap = Bootstrap(table, "question").difference("value", table["part"] == "b", table["part"] == "a")
    assert gap.sign == 1 and gap.high - gap.low < whole.high - whole.low, "paired: both parts are in every question"


def test_a_mean_over_few_clusters_of_many_has_an_interval_and_warns_of_nothing(recwarn):
    table = pd.DataFrame({"question": range(200), "value": [0.0, 1.0, 2.0, 3.0, 4.0, *[math.nan] * 195]})
    boot = Bootstrap(table, "question")
    estimate = boot.mean("value")  # one resample in 150 has none of the five
    assert (estimate.value, estimate.n) == (2, 5) and 0 <= estimate.low < 2 < estimate.high <= 4
    assert str(boot.mean("value", table["question"] < 3)) == "1", "too few for an interval"
    assert str(boot.mean("value", table["question"] > 9)) == "–"
    assert list(recwarn) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
@settings(max_examples=80, deadline=None)
def test_auroc_counts_ordered_pairs(rows):
    right, wrong = ([s for s, ok in rows if ok is which] for which in (True, False))
    pairs = [(r > w) + 0.5 * (r == w) for r in right for w in wrong]
    found = metrics.auroc(scored(rows))
    assert (found.right, found.wrong) == (len(right), len(wrong))
    if pairs:
        assert found.value == pytest.approx(sum(pairs) / len(pairs))
        assert 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high
    else:
        assert math.isnan(found.value) and math.isnan(found.low)


def test_aurocs_interval_mirrors_narrows_and_covers():
    rng = np.random.default_rng(1)

    def drawn(shift, m, n):
        return scored([*((s, True) for s in rng.normal(shift, 1, m)), *((s, False) for s in rng.normal(0, 1, n))])

    run = drawn(0.8, 40, 25)
    found = metrics.auroc(run)
    mirrored = metrics.auroc([{**record, "best_reward": -record["best_reward"]} for record in run])
    assert (found.low, found.high) == pytest.approx((1 - mirrored.high, 1 - mirrored.low))
    many = metrics.auroc(run * 9)
    assert many.value == pytest.approx(found.value) and many.high - many.low < 0.5 * (found.high - found.low)
    truth = NormalDist().cdf(0.8 / math.sqrt(2))
    intervals = [metrics.auroc(drawn(0.8, 30, 20)) for _ in range(100)]
    assert 90 <= sum(i.low <= truth <= i.high for i in intervals) <= 100
    apart = metrics.auroc(drawn(100, 10, 10))
    assert (apart.value, apart.high) == (1, pytest.approx(1)) and 0.6 < apart.low < 0.9


@pytest.mark.parametrize(
    ("right", "wrong", "start", "end"),
    [
        (range(40, 90), range(50), "AUROC 0.98", "a higher reward is more often right."),
        (range(50), range(40, 90), "AUROC 0.02", "a higher reward is more often wrong."),
        (range(50), range(50), "AUROC 0.50 [0.39, 0.61] from 50 right and 50", "cannot tell whether a higher reward"),
        (range(50), [], "50 right and 0 wrong answers", "there is nothing to compare."),
    ],
)
def test_auroc_in_words_follows_the_numbers(right, wrong, start, end):
    run = scored([*((score, True) for score in right), *((score, False) for score in wrong)])
    words = metrics.auroc_in_words(metrics.auroc(run))
    assert words.startswith(start) and end in words


def test_reliability_bins_by_quantile_and_counts_every_answer_once():
    scores = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    run = records([False, False, False, True, None, True, True, True], best_reward=scores)
    table = metrics.reliability([*run, {"is_correct": True}], bins=2)
    assert list(table["total"]) == [3, 4] and list(table["correct"]) == [0, 4]  # one is not judged, one has no reward
    assert list(table["score_low"]) == [0.1, 0.4] and table["score"][0] == pytest.approx(0.2)
    expected = metrics.wilson(4, 4)
    assert tuple(table.loc[1, ["value", "low", "high"]]) == (expected.value, expected.low, expected.high)


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=60), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_reliability_keeps_ties_together(rows, bins):
    table = metrics.reliability(scored(rows), bins=bins)
    assert table["total"].sum() == len(rows) and table["correct"].sum() == sum(ok for _, ok in rows)
    assert len(table) <= bins
    for before, after in itertools.pairwise(table.itertuples()):
        assert before.score_high < after.score_low


def test_summary_has_a_row_per_run():
    seconds = {"prefill": 1, "decode": 2}
    entry = {"data_idx": 0, "verdict": "correct", "is_correct": True, "best_reward": 0.5, "seconds": seconds}
    error = {"data_idx": 1, "stop_reason": "error", "is_correct": None}
    table = metrics.summary([{"model": "m", "dataset": "d", "method": "dmlr", "entries": [entry, error]}])
    row = table.iloc[0]
    assert (row["method"], row["correct"], row["total"], row["errors"], row["seconds"]) == ("dmlr", 1, 1, 1, 3)
    assert list(metrics.summary([]).columns) == list(table.columns)


def test_efficiency_adds_up_phases_and_leaves_errors_out():
    seconds = {"prefill": 1.0, "optimise": 2.0, "decode": 1.0}
    record = {"stop_reason": "eos_token", "num_new_tokens": 20, "seconds": seconds}
    records = [{**record, "rewards": [0.1, 0.2]}, {**record, "rewards": [0.3]}, {**record, "stop_reason": "error"}]
    told = metrics.efficiency(records)
    assert (told["prefill_seconds"], told["optimise_seconds"]) == (2.0, 4.0)
    assert told["examples_per_second"] == 2 / 8 and told["tokens_per_second"] == 40 / 2
    assert told["iterations_per_second"] == 3 / 4
    assert metrics.efficiency([])["examples_per_second"] is None
    assert metrics.efficiency([{"seconds": {"prefill": 1.0, "decode": 1.0}}])["iterations_per_second"] is None
