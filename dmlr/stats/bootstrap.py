"""Means over clusters with bootstrap intervals, and differences of two such means.

Words of one answer, or steps of one chain, are not independent; whole clusters (questions, or images) are resampled,
by scipy. Knows nothing about what is measured.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

SAMPLES = 4000
MIN_CLUSTERS = 5  # of fewer, resamples are too few different ones for an interval


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of two, with its interval, from `n` values in so many clusters; NaN without any."""

    value: float
    low: float
    high: float
    n: int
    clusters: int

    def __str__(self) -> str:
        if math.isnan(self.low):
            return "–" if math.isnan(self.value) else f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)


class Bootstrap:
    """Resamples of the clusters of `table`, the same ones for every mean taken, so that differences are paired."""

    def __init__(self, table: pd.DataFrame, cluster: str, seed: int = 0):
        self.table, self.seed = table, seed
        self.cluster, names = pd.factorize(table[cluster])
        self.count = len(names)

    def mean(self, value: str, rows: Sequence[bool] | None = None) -> Estimate:
        """The mean of a column over the rows chosen (a mask; none: all); rows without a value do not count."""
        return self._estimate(lambda total, count: total / count, self._sums(value, rows))

    def difference(self, value: str, rows: Sequence[bool], minus: Sequence[bool]) -> Estimate:
        """Mean over `rows` minus mean over `minus`; n and clusters are those of the smaller."""
        return self._estimate(lambda a, m, b, n: a / m - b / n, self._sums(value, rows) + self._sums(value, minus))

    def by(self, value: str, keys: Sequence[str]) -> pd.DataFrame:
        """A row per combination of the columns `keys`, in order of appearance: keys, value, low, high, n, clusters."""
        rows = []
        for names, part in self.table.groupby(list(keys), sort=False, observed=True):
            estimate = self.mean(value, self.table.index.isin(part.index))
            rows.append({**dict(zip(keys, names, strict=True)), **vars(estimate)})
        return pd.DataFrame(rows, columns=[*keys, "value", "low", "high", "n", "clusters"])

    def _sums(self, value: str, rows: Sequence[bool] | None) -> list[np.ndarray]:
        """Per cluster [C]: the sum of the values chosen, and their number."""
        values = self.table[value].to_numpy(dtype=float)
        used = ~np.isnan(values) & (True if rows is None else np.asarray(rows, dtype=bool))
        return [np.bincount(self.cluster[used], weights, self.count).astype(float) for weights in (values[used], None)]

    def _estimate(self, ratio, sums: list[np.ndarray]) -> Estimate:
        """`ratio` of the summed `sums`, with its percentile interval; NaN where too few clusters tell."""
        counts = np.array(sums[1::2])  # [1 or 2, C]
        n, clusters = int(counts.sum(axis=1).min()), int((counts > 0).sum(axis=1).min())
        if not n:
            return Estimate(math.nan, math.nan, math.nan, n, clusters)

        def statistic(*parts: np.ndarray, axis: int = -1) -> np.ndarray:
            return ratio(*(part.sum(axis=axis) for part in parts))

        point = float(statistic(*sums))
        if clusters < MIN_CLUSTERS:
            return Estimate(point, math.nan, math.nan, n, clusters)
        from scipy.stats import DegenerateDataWarning, bootstrap  # takes a second that a run need not pay

        how = {"n_resamples": SAMPLES, "method": "percentile", "vectorized": True, "paired": True, "batch": 500}
        with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
            warnings.simplefilter("ignore", DegenerateDataWarning)  # a resample without any value has no mean: left out
            result = bootstrap(tuple(sums), statistic, rng=np.random.default_rng(self.seed), **how)
        low, high = np.nanquantile(result.bootstrap_distribution, [0.025, 0.975])
        return Estimate(point, float(low), float(high), n, clusters)
