"""Means over clusters with bootstrap intervals, and differences of two such means.

Words of one answer, or steps of one chain, are not independent; whole clusters (questions, or images) are resampled.
Knows nothing about what is measured.
"""

from __future__ import annotations

import math
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

    def __init__(self, table: pd.DataFrame, cluster: str, seed: int = 0, samples: int = SAMPLES, level: float = 0.95):
        self.table, self.ends = table, ((1 - level) / 2, (1 + level) / 2)
        self.cluster, names = pd.factorize(table[cluster])
        self.count = len(names)
        share = np.full(self.count, 1 / max(self.count, 1))
        self.weights = np.random.default_rng(seed).multinomial(self.count, share, size=samples) if self.count else None

    def mean(self, value: str, rows: Sequence[bool] | None = None) -> Estimate:
        """The mean of a column over the rows chosen (a mask; none: all); rows without a value do not count."""
        draws, point, n, clusters = self._draws(value, rows)
        return self._estimate(draws, point, n, clusters)

    def difference(self, value: str, rows: Sequence[bool], minus: Sequence[bool]) -> Estimate:
        """Mean over `rows` minus mean over `minus`."""
        one, a, n, clusters = self._draws(value, rows)
        two, b, m, others = self._draws(value, minus)
        return self._estimate(one - two, a - b, min(n, m), min(clusters, others))

    def by(self, value: str, keys: Sequence[str]) -> pd.DataFrame:
        """A row per combination of the columns `keys`, in order of appearance: keys, value, low, high, n, clusters."""
        keys = list(keys)
        found = []
        for names, part in self.table.groupby(keys, sort=False, observed=True):
            estimate = self.mean(value, self.table.index.isin(part.index))
            found.append({**dict(zip(keys, names, strict=True)), **vars(estimate)})
        return pd.DataFrame(found, columns=[*keys, "value", "low", "high", "n", "clusters"])

    def _draws(self, value: str, rows: Sequence[bool] | None) -> tuple[np.ndarray, float, int, int]:
        """Resampled means [S], the mean itself, and the values and clusters behind it."""
        values = self.table[value].to_numpy(dtype=float)
        used = ~np.isnan(values) & (True if rows is None else np.asarray(rows, dtype=bool))
        if not used.any():
            return np.array([math.nan]), math.nan, 0, 0
        totals = np.bincount(self.cluster[used], weights=values[used], minlength=self.count)
        counts = np.bincount(self.cluster[used], minlength=self.count)
        drawn = self.weights @ counts
        draws = np.divide(self.weights @ totals, drawn, out=np.full(len(drawn), np.nan), where=drawn > 0)
        return draws, float(values[used].mean()), int(used.sum()), int((counts > 0).sum())

    def _estimate(self, draws: np.ndarray, point: float, n: int, clusters: int) -> Estimate:
        """With its percentile interval, nan where too few clusters tell."""
        draws = draws[~np.isnan(draws)]
        if math.isnan(point) or not len(draws) or clusters < MIN_CLUSTERS:
            return Estimate(point, math.nan, math.nan, n, clusters)
        low, high = np.quantile(draws, self.ends)
        return Estimate(point, float(low), float(high), n, clusters)
