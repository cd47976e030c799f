"""Records -> numbers with their uncertainty: accuracy, paired comparison, groups. Pure functions, over scipy.

A record counts when it was judged (`outcomes.is_right`); errors, skipped examples and failed judge calls are left
out and counted beside. Nothing here is random except the bootstrap, whose seed is fixed. scipy and scikit-learn are
imported where they are used: a run needs none of them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dmlr.stats.outcomes import is_right, tally

Records = Iterable[Mapping[str, Any]]
LEVEL = 0.95  # of every interval
PHASES = ("prefill", "optimise", "decode")  # of an example's `seconds`


@dataclass(frozen=True)
class Accuracy:
    """A proportion with its Wilson interval; all three NaN when `total` is 0."""

    correct: int
    total: int
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] (n = {self.total})"


@dataclass(frozen=True)
class Paired:
    """Run B against run A on the examples judged in both; `difference` = accuracy B − accuracy A."""

    n: int
    difference: float
    low: float
    high: float
    gained: list  # data_idx wrong in A and right in B
    lost: list  # right in A and wrong in B
    p_value: float


@dataclass(frozen=True)
class Auroc:
    """Chance that of a right and a wrong answer the right one has the higher score; NaN when one kind is absent."""

    value: float
    low: float
    high: float
    right: int
    wrong: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def higher_is(self) -> str:
        """What the interval says about a higher score."""
        return "more often right" if self.low > 0.5 else "more often wrong" if self.high < 0.5 else "cannot tell"


def wilson(correct: int, total: int) -> Accuracy:
    """Score interval of a proportion (Wilson, JASA 1927), inside [0, 1] also near its ends; ValueError as scipy's."""
    if total == 0:
        return Accuracy(0, 0, math.nan, math.nan, math.nan)
    from scipy.stats import binomtest

    low, high = binomtest(correct, total).proportion_ci(LEVEL, "wilson")
    return Accuracy(correct, total, correct / total, float(low), float(high))


def accuracy(records: Records) -> Accuracy:
    """Accuracy over judged records."""
    right = [right for _, right in _judged(records)]
    return wilson(sum(right), len(right))


def _judged(records: Records) -> list[tuple[Mapping[str, Any], bool]]:
    """The judged records, and whether each is right."""
    return [(record, right) for record in records if (right := is_right(record)) is not None]


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided exact McNemar test: binomial with p = 1/2 on the examples on which two runs disagree."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def paired(a: Records, b: Records) -> Paired:
    """Compare two runs example by example (matched by data_idx), with percentile bootstrap interval and exact test.

    ValueError when a run has a data_idx twice. With no common example the numbers are NaN and the p-value 1.
    """
    a, b = _by_idx(a), _by_idx(b)
    common = [idx for idx in a if idx in b]
    gained = [idx for idx in common if b[idx] and not a[idx]]
    lost = [idx for idx in common if a[idx] and not b[idx]]
    differences = np.array([float(b[idx]) - a[idx] for idx in common])
    low = high = mean = float(differences.mean()) if common else math.nan
    if len(common) > 1:
        from scipy.stats import bootstrap

        how = {"confidence_level": LEVEL, "n_resamples": 10_000, "method": "percentile", "batch": 500}
        low, high = bootstrap([differences], np.mean, rng=np.random.default_rng(0), **how).confidence_interval
    return Paired(len(common), mean, float(low), float(high), gained, lost, mcnemar_exact(len(gained), len(lost)))


def _by_idx(records: Records) -> dict[Any, bool]:
    judged = [(record["data_idx"], right) for record, right in _judged(records)]
    if doubled := [idx for idx, count in Counter(idx for idx, _ in judged).items() if count > 1]:
        raise ValueError(f"data_idx {doubled[0]!r} occurs twice in one run")
    return dict(judged)


def efficiency(records: Records) -> dict[str, float | int | None]:
    """Seconds per phase over all answered examples, and what they amount to per second; None where nothing was done."""
    answered = [r for r in records if r.get("seconds") and r.get("stop_reason") != "error"]
    phases = {f"{phase}_seconds": sum(r["seconds"].get(phase, 0.0) for r in answered) for phase in PHASES}
    counts = {
        "examples_per_second": (len(answered), sum(phases.values())),
        "iterations_per_second": (sum(len(r.get("rewards") or ()) for r in answered), phases["optimise_seconds"]),
        "tokens_per_second": (sum(r.get("num_new_tokens") or 0 for r in answered), phases["decode_seconds"]),
    }
    return phases | {name: count / spent if count and spent else None for name, (count, spent) in counts.items()}


def group_accuracy(records: Records, key: str, size: int | None = None) -> Accuracy:
    """Share of groups with every example right (MMVP's pairs by pair_id, HallusionBench's figures and questions).

    Records without the key do not enter. A group with a member that was not judged is left out: it is neither right
    nor wrong; so is one that has not `size` members, as half a pair in a sample.
    """
    groups = defaultdict(list)
    for record in records:
        if record.get(key) is not None:
            groups[record[key]].append(is_right(record))
    whole = [all(group) for group in groups.values() if None not in group and size in (None, len(group))]
    return wilson(sum(whole), len(whole))


def by_category(records: Records, key: str = "category") -> pd.DataFrame:
    """Accuracy per value of `key`, a row each, sorted; records without it under "(none)"."""
    groups = defaultdict(list)
    for record in records:
        groups["(none)" if record.get(key) is None else str(record[key])].append(record)
    rows = [{key: name, **vars(accuracy(groups[name]))} for name in sorted(groups)]
    return pd.DataFrame(rows, columns=[key, "correct", "total", "value", "low", "high"])


def auroc(records: Records, score: str = "best_reward") -> Auroc:
    """How well `score` tells right answers from wrong ones: 0.5 not at all, 1 perfectly; ties count half.

    The interval is Newcombe's for the Mann-Whitney statistic (Statistics in Medicine 2006, method 5): like Wilson's it
    stays inside [0, 1] and has a width also when every pair is in order.
    """
    scores, right = _scored(records, score)
    m, n = int(right.sum()), int((~right).sum())
    if not m or not n:
        return Auroc(math.nan, math.nan, math.nan, m, n)
    from scipy.optimize import brentq
    from scipy.stats import norm
    from sklearn.metrics import roc_auc_score

    value, z = float(roc_auc_score(right, scores)), norm.ppf((1 + LEVEL) / 2)

    def outside(bound: float) -> float:
        """How far beyond z standard deviations (of a true value `bound`) the observed value lies."""
        spread = 1 + ((m + n) / 2 - 1) * ((1 - bound) / (2 - bound) + bound / (1 + bound))
        return abs(value - bound) - z * math.sqrt(bound * (1 - bound) * spread / (m * n))

    tiny = 1e-12  # at 0 and 1 themselves the spread is zero
    inside = min(max(value, tiny), 1 - tiny)
    low = brentq(outside, tiny, inside) if outside(tiny) > 0 else 0.0
    high = brentq(outside, inside, 1 - tiny) if outside(1 - tiny) > 0 else 1.0
    return Auroc(value, low, high, m, n)


def auroc_in_words(auroc: Auroc) -> str:
    """What an AUROC of the reward says, in a sentence."""
    if math.isnan(auroc.value):
        return f"{auroc.right} right and {auroc.wrong} wrong answers with a reward: there is nothing to compare."
    says = f"a higher reward is {auroc.higher_is}."
    if auroc.higher_is == "cannot tell":
        says = "the interval includes 0.5, so this run cannot tell whether a higher reward is more often right."
    return f"AUROC {auroc} from {auroc.right} right and {auroc.wrong} wrong answers: {says}"


def reliability(records: Records, score: str = "best_reward", bins: int = 5) -> pd.DataFrame:
    """Accuracy with Wilson interval per bin of `score`; the bins are quantiles, so they hold about as many answers.

    A row per bin: score (mean), score_low, score_high, correct, total, value, low, high. Equal scores share a bin, so
    there may be fewer bins; none without judged answers that have a score.
    """
    scores, right = _scored(records, score)
    edges = np.unique(np.quantile(scores, np.linspace(0, 1, bins + 1)[1:-1])) if len(scores) else []
    rows = []
    for _, part in pd.DataFrame({"score": scores, "right": right}).groupby(np.searchsorted(edges, scores, "right")):
        ends = {"score": part["score"].mean(), "score_low": part["score"].min(), "score_high": part["score"].max()}
        rows.append(ends | vars(wilson(int(part["right"].sum()), len(part))))
    return pd.DataFrame(rows, columns=["score", "score_low", "score_high", "correct", "total", "value", "low", "high"])


def _scored(records: Records, score: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores and outcomes of the judged records that have a score."""
    scored = [(record[score], right) for record, right in _judged(records) if record.get(score) is not None]
    return np.array([value for value, _ in scored], dtype=float), np.array([right for _, right in scored], dtype=bool)


def summary(runs: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per run (content of results.json): accuracy with interval, counts by outcome, mean reward and time.

    `seconds` is the mean over examples of the summed stages of a record's `seconds`; `abstained` counts the records
    whose answer was that it is unknown, which are among the wrong ones or the unparsed.
    """
    rows = []
    for run in runs:
        entries, value = run["entries"], accuracy(run["entries"])
        means = {
            "best_reward": [entry.get("best_reward") for entry in entries],
            "seconds": [sum(entry["seconds"].values()) if entry.get("seconds") else None for entry in entries],
        }
        rows.append(
            {name: run.get(name) for name in ("model", "dataset", "method")}
            | tally(entries)
            | {"accuracy": value.value, "low": value.low, "high": value.high}
            | {"abstained": sum(bool(entry.get("abstained")) for entry in entries)}
            | {name: pd.Series(values, dtype=float).mean() for name, values in means.items()}
        )
    counts = "correct total wrong unparsed errors skipped judge_failed abstained".split()
    columns = ["model", "dataset", "method", "accuracy", "low", "high", *counts, "best_reward", "seconds"]
    return pd.DataFrame(rows, columns=columns)
