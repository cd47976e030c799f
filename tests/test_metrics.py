"""Statistics against closed forms, published values and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmlr import metrics


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
@settings(max_examples=100)
def test_wilson_contains_its_value_and_mirrors(a, b):
    total = max(a, b)
    one, other = metrics.wilson(a, total), metrics.wilson(total - a, total)
    assert 0 <= one.low <= one.value <= one.high <= 1
    assert one.low == pytest.approx(1 - other.high, abs=1e-12)


def test_wilson_without_examples_and_with_nonsense():
    assert math.isnan(metrics.wilson(0, 0).low)
    with pytest.raises(ValueError, match="5 correct of 3"):
        metrics.wilson(5, 3)


def test_accuracy_leaves_out_what_was_not_judged():
    value = metrics.accuracy(records([True, False, None, True]))
    assert (value.correct, value.total) == (2, 3)


def test_a_failed_judge_call_is_no_wrong_answer():
    run = [*records([True]), {"data_idx": 1, "verdict": "judge_failed", "is_correct": False}]
    assert metrics.accuracy(run).total == 1 and metrics.paired(run, run).n == 1


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


def test_categories():
    run = records([True, False, True, None], category=["sum", "sum", "colour", None])
    table = metrics.by_category(run).set_index("category")
    assert table.loc["sum", "value"] == 0.5 and table.loc["colour", "total"] == 1 and table.loc["(none)", "total"] == 0
    assert metrics.category_mean(run) == 0.75
    assert math.isnan(metrics.category_mean([]))


def test_above_chance():
    assert metrics.above_chance(0.25, 0.25) == 0 and metrics.above_chance(1, 0.5) == 1
    with pytest.raises(ValueError, match="chance"):
        metrics.above_chance(0.5, 1)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
@settings(max_examples=80)
def test_auroc_counts_ordered_pairs(rows):
    run = [{"best_reward": float(s), "is_correct": ok} for s, ok in rows]
    right, wrong = ([s for s, ok in rows if ok is which] for which in (True, False))
    pairs = [(r > w) + 0.5 * (r == w) for r in right for w in wrong]
    if pairs:
        assert metrics.auroc(run) == pytest.approx(sum(pairs) / len(pairs))
    else:
        assert math.isnan(metrics.auroc(run))


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
