"""Intervals keep what they claim on series whose neighbours resemble each other."""

import math

import numpy as np
import pytest

from internlm_lib.reporting import interval

REPEATS = 400


def autoregressive(rho: float, length: int, seed: int = 7) -> np.ndarray:
    """[REPEATS, length] of mean 0 and variance 1, each value ρ times the one before, plus noise."""
    draws = np.random.default_rng(seed).standard_normal((REPEATS, length))
    series = np.empty_like(draws)
    series[:, 0] = draws[:, 0]
    for step in range(1, length):
        series[:, step] = rho * series[:, step - 1] + math.sqrt(1 - rho**2) * draws[:, step]
    return series


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8, 0.95])
def test_the_mean_is_missed_as_rarely_as_claimed(rho):
    found = [interval.mean(series) for series in autoregressive(rho, 1000)]
    assert np.mean([estimate.excludes_zero() for estimate in found]) <= 0.08
    assert np.mean([estimate.excludes_zero(0.5) for estimate in found]) == pytest.approx(
        0.5, abs=0.09
    )


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8, 0.95])
def test_the_slope_is_missed_as_rarely_as_claimed(rho):
    found = [interval.slope(series) for series in autoregressive(rho, 1000, seed=8)]
    assert np.mean([estimate.excludes_zero() for estimate in found]) <= 0.08


def test_what_is_called_detectable_is_detected_as_often_as_claimed():
    series = autoregressive(0.8, 1000)
    shift = float(np.mean([interval.mean(row).detectable() for row in series]))
    seen = np.mean([interval.mean(row + shift).excludes_zero() for row in series])
    assert seen == pytest.approx(0.8, abs=0.08)


def test_neighbours_that_resemble_each_other_widen_the_interval():
    alone, alike = (interval.mean(autoregressive(rho, 1000)[0]) for rho in (0.0, 0.95))
    assert alike.error > 2 * alone.error and alike.freedom < alone.freedom


def test_a_line_is_found_under_noise():
    noise = autoregressive(0.5, 400)[0]
    low, high = interval.slope(0.03 * np.arange(400) + noise).interval()
    assert low < 0.03 < high and low > 0.01


def test_few_points_have_a_value_and_no_interval():
    estimate = interval.mean(np.array([1.0, 2.0, 3.0]))
    assert estimate.value == 2.0 and estimate.freedom == 0
    assert all(math.isnan(end) for end in (*estimate.interval(), estimate.detectable()))
    assert interval.slope(np.arange(7.0)).freedom == 0


def test_a_series_that_never_moves_is_known_exactly():
    low, high = interval.mean(np.full(100, 0.25)).interval()
    assert low == pytest.approx(0.25) and high == pytest.approx(0.25)
