"""Statistics against closed forms, published values and brute force."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmlr.stats import metrics


def records(outcomes, **more):
    return [
        {"data_idx": i, "row": i, "is_correct": ok, **{k: v[i] for k, v in more.items()}}
        for i, ok in enumerate(outcomes)
    ]


def test_wilson_against_published_values():
    # Newcombe, Statistics in Medicine 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for correct, total, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        interval = metrics.wilson(correct, total)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(0, 500), st.integers(1, 500))
@settings(max_examples=100, deadline=None)
def test_wilson_contains_its_value_and_mirrors(a, b):
    total = max(a, b)
    one, other = metrics.wilson(a, total), metrics.wilson(total - a, total)
    assert 0 <= one.low <= one.value <= one.high <= 1
    assert one.low == pytest.approx(1 - other.high, abs=1e-12)


def test_wilson_without_examples_and_with_nonsense():
    assert math.isnan(metrics.wilson(0, 0).low)
    with pytest.raises(ValueError):
        metrics.wilson(5, 3)


def test_mcnemar_is_the_sign_test():
    def enumerated(n, k):
        return sum(abs(sum(s)) >= abs(n - 2 * k) for s in itertools.product((-1, 1), repeat=n)) / 2**n

    for n in range(1, 9):
        for k in range(n + 1):
            assert metrics.mcnemar_exact(k, n - k) == pytest.approx(enumerated(n, k))
    assert metrics.mcnemar_exact(0, 0) == 1
    assert 0 < metrics.mcnemar_exact(3000, 3300) < 1e-3  # far beyond what a float can count


def test_paired_lists_gains_and_losses():
    a, b = records([True, True, False, False, None, True]), records([True, False, True, True, True, None])
    result = metrics.paired(a, b)
    assert (result.n, result.gained, result.lost, result.only_one) == (4, [2, 3], [1], 2)
    assert (result.accuracy_a, result.accuracy_b, result.difference) == (0.5, 0.75, 0.25)
    assert result.p_value == metrics.mcnemar_exact(2, 1) == 1
    assert metrics.paired(a, b) == result  # the bootstrap is seeded


def test_paired_interval_equals_resampling_the_examples():
    rng = np.random.default_rng(7)
    a, b = rng.random(200) < 0.5, rng.random(200) < 0.6
    result = metrics.paired(records(a.tolist()), records(b.tolist()), samples=20_000)
    d = b.astype(int) - a.astype(int)
    direct = rng.choice(d, (20_000, 200)).mean(axis=1)
    assert (result.low, result.high) == pytest.approx(np.quantile(direct, [0.025, 0.975]), abs=0.011)
    assert result.low < result.difference < result.high


def test_paired_needs_unique_examples_and_bears_none():
    with pytest.raises(ValueError, match="data_idx 0 occurs twice"):
        metrics.paired(records([True]) * 2, records([True]))
    empty = metrics.paired(records([True]), [])
    assert empty.n == 0 and math.isnan(empty.difference) and empty.p_value == 1 and empty.only_one == 1


def test_pairs_count_when_both_are_right():
    run = records([True, True, True, False, True, None, True], pair_id=[0, 0, 1, 1, 2, 2, None])
    value = metrics.pair_accuracy(run)
    assert (value.correct, value.total) == (1, 2)  # the third pair was not judged in full
    half = metrics.pair_accuracy([*run, *records([True], pair_id=[3])])
    assert (half.correct, half.total) == (1, 2)  # a pair cut by a sample says nothing about pairs


def test_categories():
    run = records([True, False, True, None], category=["sum", "sum", "colour", None])
    table = metrics.by_category(run).set_index("category")
    assert table.loc["sum", "value"] == 0.5 and table.loc["colour", "total"] == 1 and table.loc["(none)", "total"] == 0
    assert metrics.category_mean(run) == 0.75
    assert math.isnan(metrics.category_mean([]))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
@settings(max_examples=80, deadline=None)
def test_auroc_counts_ordered_pairs(rows):
    run = [{"best_reward": float(s), "is_correct": ok} for s, ok in rows]
    right, wrong = ([s for s, ok in rows if ok is which] for which in (True, False))
    pairs = [(r > w) + 0.5 * (r == w) for r in right for w in wrong]
    found = metrics.auroc(run)
    assert (found.right, found.wrong) == (len(right), len(wrong))
    if pairs:
        assert found.value == pytest.approx(sum(pairs) / len(pairs))
        assert 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high
    else:
        assert math.isnan(found.value) and math.isnan(found.low)


def test_aurocs_interval_mirrors_narrows_and_covers():
    rng = np.random.default_rng(1)

    def scored(shift, m, n):
        scores = [*rng.normal(shift, 1, m), *rng.normal(0, 1, n)]
        return [{"best_reward": s, "is_correct": i < m} for i, s in enumerate(scores)]

    run = scored(0.8, 40, 25)
    found = metrics.auroc(run)
    mirrored = metrics.auroc([{**record, "best_reward": -record["best_reward"]} for record in run])
    assert (found.low, found.high) == pytest.approx((1 - mirrored.high, 1 - mirrored.low))
    many = metrics.auroc(run * 9)
    assert many.value == pytest.approx(found.value) and many.high - many.low < 0.5 * (found.high - found.low)
    for shift in (0.0, 0.8, 2.0):
        truth = NormalDist().cdf(shift / math.sqrt(2))
        intervals = [metrics.auroc(scored(shift, 30, 20)) for _ in range(100)]
        assert 90 <= sum(i.low <= truth <= i.high for i in intervals) <= 100, shift
    apart = metrics.auroc(scored(100, 10, 10))
    assert (apart.value, apart.high) == (1, pytest.approx(1)) and 0.6 < apart.low < 0.9


def test_auroc_in_words_follows_the_numbers():
    def words(right, wrong):
        run = [{"best_reward": s, "is_correct": ok} for ok, scores in ((True, right), (False, wrong)) for s in scores]
        return metrics.auroc_in_words(metrics.auroc(run))

    low, high = np.arange(50), np.arange(40, 90)
    assert words(high, low).endswith("a higher reward is more often right.")
    assert words(low, high).endswith("a higher reward is more often wrong.")
    assert "cannot tell" in words(low, low) and words(low, low).startswith(
        "AUROC 0.50 [0.39, 0.61] from 50 right and 50"
    )
    assert words(low, []).startswith("50 right and 0 wrong")


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
    run = [{"best_reward": float(s), "is_correct": ok} for s, ok in rows]
    table = metrics.reliability(run, bins=bins)
    assert table["total"].sum() == len(rows) and table["correct"].sum() == sum(ok for _, ok in rows)
    assert len(table) <= bins
    for before, after in itertools.pairwise(table.itertuples()):
        assert before.score_high < after.score_low


def test_summary_has_a_row_per_run():
    entry = {
        "data_idx": 0,
        "verdict": "correct",
        "is_correct": True,
        "best_reward": 0.5,
        "seconds": {"prefill": 1, "decode": 2},
    }
    error = {"data_idx": 1, "stop_reason": "error", "is_correct": None}
    table = metrics.summary([{"model": "m", "dataset": "d", "method": "dmlr", "entries": [entry, error]}])
    row = table.iloc[0]
    assert (row["method"], row["correct"], row["total"], row["errors"], row["seconds"]) == ("dmlr", 1, 1, 1, 3)
    assert list(metrics.summary([]).columns) == list(table.columns)


def test_efficiency_adds_up_phases_and_leaves_errors_out():
    record = {
        "stop_reason": "eos_token",
        "num_new_tokens": 20,
        "seconds": {"prefill": 1.0, "optimise": 2.0, "decode": 1.0},
    }
    records = [{**record, "rewards": [0.1, 0.2]}, {**record, "rewards": [0.3]}, {**record, "stop_reason": "error"}]
    told = metrics.efficiency(records)
    assert (told["prefill_seconds"], told["optimise_seconds"]) == (2.0, 4.0)
    assert told["examples_per_second"] == 2 / 8 and told["tokens_per_second"] == 40 / 2
    assert told["iterations_per_second"] == 3 / 4
    assert metrics.efficiency([])["examples_per_second"] is None
    assert metrics.efficiency([{"seconds": {"prefill": 1.0, "decode": 1.0}}])["iterations_per_second"] is None
