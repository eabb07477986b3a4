# SPDX-License-Identifier: GPL-2.0-or-later
"""Medians with the interval that resampling gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SEED = 20_261_122
_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median, the bootstrap's 95% confidence interval of it, and how many values it is of."""

    median: float
    low: float
    high: float
    values: int


def estimate(values: Sequence[float], digits: int = 2) -> Estimate:
    """Median of some values and its 95% interval, by percentiles of seeded resamples."""
    data = np.asarray(values, np.float64)
    rows = np.random.default_rng(_SEED).integers(len(data), size=(_RESAMPLES, len(data)))
    low, high = np.percentile(np.median(data[rows], axis=1), [2.5, 97.5])
    median = float(np.median(data))
    return Estimate(
        round(median, digits), round(float(low), digits), round(float(high), digits), len(data)
    )


def ratio(ours: Sequence[float], theirs: Sequence[float], digits: int = 3) -> Estimate:
    """Ratio of two medians and its 95% interval; the n-th values are of one round."""
    data = np.array([ours, theirs], np.float64)
    size = data.shape[1]
    rows = np.random.default_rng(_SEED).integers(size, size=(_RESAMPLES, size))
    medians = np.median(data[:, rows], axis=2)
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    whole = np.median(data, axis=1)
    return Estimate(
        round(float(whole[0] / whole[1]), digits),
        round(float(low), digits),
        round(float(high), digits),
        size,
    )


def percentiles(values_s: Sequence[float]) -> dict[str, float]:
    """Milliseconds that half and 99 in 100 of some times in seconds do not exceed."""
    p50, p99 = np.percentile(np.asarray(values_s) * 1e3, [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}
