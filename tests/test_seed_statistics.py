"""Statistics over seeds equal scipy's, and Holm's correction a naive one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from federated.results.seed_statistics import holm, paired_difference, spread

SHARES = st.lists(st.floats(0.01, 0.99).map(lambda value: round(value, 4)), min_size=3, max_size=9)


@given(SHARES.filter(lambda values: len(set(values)) > 1))
def test_mean_deviation_and_interval_are_those_of_scipy(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert found.mean == pytest.approx(np.mean(values))
    assert found.sd == pytest.approx(stats.tstd(values))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


@given(SHARES, st.integers(0, 2**31))
def test_a_paired_difference_is_the_paired_t_test_of_scipy(values: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    baseline = [value + float(rng.normal(0.01, 0.02)) for value in values]
    found = paired_difference(dict(enumerate(values)), dict(enumerate(baseline)))
    assert found is not None
    expected = stats.ttest_rel(values, baseline)
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(float(expected.pvalue))
    assert (found.spread.low, found.spread.high) == (
        pytest.approx(float(interval.low)),
        pytest.approx(float(interval.high)),
    )
    assert found.wins + found.ties + found.losses == len(values)
    assert found.wins == sum(value > other for value, other in zip(values, baseline, strict=True))


def test_only_seeds_that_both_have_are_paired() -> None:
    found = paired_difference({0: 0.5, 1: 0.6, 2: 0.9}, {1: 0.5, 2: 0.9, 3: 0.0})
    assert found is not None
    assert (found.spread.num, found.wins, found.ties, found.losses) == (2, 1, 1, 0)
    assert found.spread.mean == pytest.approx(0.05)
    assert paired_difference({0: 0.5}, {1: 0.5}) is None


def test_one_seed_has_a_mean_and_no_interval() -> None:
    found = paired_difference({0: 0.75}, {0: 0.5})
    assert found is not None
    assert (found.spread.mean, found.spread.sd, found.spread.low, found.p_value) == (0.25, None, None, None)
    assert spread([]) is None


def test_equal_differences_are_certain_and_no_difference_is_none() -> None:
    same = paired_difference({0: 0.5, 1: 0.25}, {0: 0.5, 1: 0.25})
    shifted = paired_difference({0: 0.75, 1: 0.5}, {0: 0.5, 1: 0.25})
    assert same is not None
    assert shifted is not None
    assert (same.p_value, shifted.p_value) == (1.0, 0.0)


def _holm_as_defined(p_values: list[float]) -> list[float]:
    """The corrected value: the smallest level at which Holm's step-down procedure rejects."""
    m = len(p_values)
    order = sorted(range(m), key=lambda place: p_values[place])
    return [
        max(min(1.0, (m - rank) * p_values[order[rank]]) for rank in range(order.index(place) + 1))
        for place in range(m)
    ]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_step_down_procedure(p_values: list[float]) -> None:
    found = holm(p_values)
    assert found == pytest.approx(_holm_as_defined(p_values))
    assert all(p <= corrected <= 1 for p, corrected in zip(p_values, found, strict=True))


def test_holm_of_a_textbook_case() -> None:
    # Holm (1979) by hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, then no smaller than before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert not math.isnan(holm([1.0, 1.0])[0])
