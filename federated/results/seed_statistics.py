"""Means over seeds with their intervals, and paired differences of two variants with corrected p-values.

Intervals are Student's t, two-sided; tests are paired t-tests; Holm (1979) corrects for their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Values of several seeds.

    Attributes:
        num: How many.
        mean: Of them.
        sd: Standard deviation of the sample (n - 1); None for one value.
        low: Lower end of the 95 % confidence interval of the mean; None for one value.
        high: Upper end.
    """

    num: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """A variant against another, seed by seed.

    Attributes:
        spread: Of the differences, variant minus baseline.
        p_value: Of the paired t-test; None for fewer than two seeds. 1 where all differences are 0.
        wins: Seeds in which the variant is better.
        ties: Seeds in which both are equal.
        losses: Seeds in which the baseline is better.
    """

    spread: Spread
    p_value: float | None
    wins: int
    ties: int
    losses: int


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean, standard deviation and interval; None without values."""
    if not values:
        return None
    numbers = np.asarray(values, dtype=float)
    mean, num = float(numbers.mean()), len(numbers)
    if num < 2:
        return Spread(num, mean)
    sd = float(numbers.std(ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, num - 1)) * sd / math.sqrt(num)
    return Spread(num, mean, sd, mean - half, mean + half)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Compare two variants by the seeds that both have; None where there is none.

    Args:
        values: Seed -> the variant's value, larger being better.
        baseline: Seed -> the other's.
    """
    differences = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    found = spread(differences)
    if found is None:
        return None
    return Difference(
        found,
        _p_value(found),
        wins=sum(value > 0 for value in differences),
        ties=sum(value == 0 for value in differences),
        losses=sum(value < 0 for value in differences),
    )


def _p_value(differences: Spread) -> float | None:
    if differences.sd is None:
        return None
    if differences.sd == 0:
        return 0.0 if differences.mean else 1.0
    statistic = differences.mean / (differences.sd / math.sqrt(differences.num))
    return float(2 * stats.t.sf(abs(statistic), differences.num - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number: the family-wise error rate stays below any level.

    The k-th smallest of m (k from 0) is multiplied by m - k, and none is smaller than one before it.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
