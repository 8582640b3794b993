import numpy as np
import pytest

from internlm_lib.reporting.decimation import decimate, isolated, rolling_mean

BUCKETS = 50


def curves():
    """Noise, with and without gaps, evenly and unevenly placed, rounded so that values repeat."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        n = int(random.integers(4 * BUCKETS + 1, 20_000))
        x = np.cumsum(random.integers(1, 5 if seed % 2 else 300, n)).astype(float)
        y = random.normal(size=n).round(1)
        y[random.random(n) < (0.0, 0.01, 0.9)[seed % 3]] = (np.nan, np.inf)[seed % 2]
        hole = int(random.integers(n))
        y[hole : hole + n // 4] = np.nan
        yield x, y


@pytest.mark.parametrize(("x", "y"), list(curves()))
def test_every_bucket_keeps_its_ends_and_extremes_in_order(x, y):
    kept = decimate(x, y, BUCKETS)
    assert (np.diff(kept) > 0).all()
    assert len(kept) <= 4 * BUCKETS
    bucket = np.minimum((x - x[0]) / (x[-1] - x[0]) * BUCKETS, BUCKETS - 1).astype(int)
    for number in np.unique(bucket):
        rows = np.flatnonzero(bucket == number)
        ours = kept[bucket[kept] == number]
        sound = rows[np.isfinite(y[rows])]
        if not len(sound):
            assert len(ours) == 1  # the gap
            continue
        assert np.isfinite(y[ours]).all()
        assert (ours[0], ours[-1]) == (sound[0], sound[-1])
        assert (y[ours].min(), y[ours].max()) == (y[sound].min(), y[sound].max())


def test_a_single_spike_up_and_one_down_are_kept_of_half_a_million_steps():
    y = np.random.default_rng(0).normal(size=500_000)
    y[123_456], y[123_460] = 1e3, -1e3
    kept = decimate(np.arange(500_000.0), y)
    assert {123_456, 123_460} <= set(kept.tolist())
    assert len(kept) <= 2_400


def test_a_gap_parts_the_curve_and_a_short_curve_is_kept_whole():
    y = np.ones(10_000)
    y[3_000:5_000] = np.nan
    kept = decimate(np.arange(10_000.0), y, BUCKETS)
    inside = kept[(kept >= 3_000) & (kept < 5_000)]
    assert len(inside) and np.isnan(y[inside]).all()
    assert {2_999, 5_000} <= set(kept.tolist())
    short = np.array([1.0, np.nan, 3.0])
    assert decimate(np.arange(3.0), short, BUCKETS).tolist() == [0, 1, 2]
    assert decimate(np.array([7.0]), np.array([1.0])).tolist() == [0]


def test_nothing_but_gaps_is_kept_as_gaps():
    kept = decimate(np.arange(1_000.0), np.full(1_000, np.nan), BUCKETS)
    assert len(kept) == BUCKETS


def test_isolated_values_are_those_a_line_does_not_show():
    nan = np.nan
    assert isolated(np.array([1.0, nan, 2.0, 3.0, nan, 4.0])).tolist() == [0, 5]
    assert isolated(np.array([1.0])).tolist() == [0]
    assert isolated(np.array([nan, np.inf])).tolist() == []


@pytest.mark.parametrize("n", [1, 2, 5, 100])
@pytest.mark.parametrize("width", [1, 3, 11, 101])
def test_rolling_mean_is_that_of_the_finite_neighbours(n, width):
    y = np.random.default_rng(n).normal(size=n)
    y[1::7] = np.nan
    means = rolling_mean(y, width)
    assert (np.isnan(means) == np.isnan(y)).all()
    for row in np.flatnonzero(np.isfinite(y)):
        neighbours = y[max(0, row - width // 2) : row + width // 2 + 1]
        assert means[row] == pytest.approx(np.nanmean(neighbours))


def test_a_huge_value_spoils_only_the_means_it_is_part_of():
    y = np.full(1_000, 3.0)
    y[100] = 1e30
    means = rolling_mean(y, 11)
    assert means[106:].tolist() == [3.0] * 894
    assert means[105] > 1e28
