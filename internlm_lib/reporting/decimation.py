"""Which points of a long curve have to be drawn for it to look the same."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BUCKETS = 600
"""About one per pixel of a panel, so that what is left out lies within the line that is drawn."""

SMOOTHING = 100
"""Smoothed curves are means over 1/100 of the steps."""


def decimate(x: NDArray[Any], y: NDArray[Any], buckets: int = BUCKETS) -> NDArray[np.int64]:
    """Rows of a curve to draw, rising; at most 4 per bucket.

    The range of x is cut into buckets of equal width. Each keeps its first, smallest, largest and
    last finite value: no spike is lost, however narrow, and lines enter and leave a bucket where
    the whole curve does. A bucket without a finite value keeps one row: the gap stays. A curve of
    up to 4 · `buckets` points is kept as it is.

    Args:
        x: rising, finite [n].
        y: values [n], not finite where there is a gap.
    """
    if len(x) <= 4 * buckets:
        return np.arange(len(x))
    bucket = _bucket(x, buckets)
    sound = np.isfinite(y)
    rows = np.flatnonzero(sound)
    gaps = np.flatnonzero(~sound)
    filled, first = np.unique(bucket[rows], return_index=True)
    last = np.append(first, len(rows))[1:] - 1
    # Sorted by bucket, then by value: a bucket's extremes are at its ends. `lexsort` is stable.
    order = np.lexsort((y[rows], bucket[rows]))
    empty, gap = np.unique(bucket[gaps], return_index=True)
    keep = [rows[first], rows[order[first]], rows[order[last]], rows[last]]
    keep.append(gaps[gap[~np.isin(empty, filled)]])
    return np.unique(np.concatenate(keep))


def isolated(y: NDArray[Any]) -> NDArray[np.int64]:
    """Rows of finite values [n] between two gaps or ends: a line does not show them."""
    sound = np.concatenate([[False], np.isfinite(y), [False]])
    return np.flatnonzero(sound[1:-1] & ~sound[:-2] & ~sound[2:])


def smoothing_width(steps: int) -> int:
    """Over how many neighbours a curve of so many steps is smoothed: odd; 1 is not at all."""
    return max(1, steps // SMOOTHING) | 1


def rolling_mean(values: NDArray[Any], width: int) -> NDArray[np.float64]:
    """Mean of the finite values among `width` (odd) neighbours [n]; NaN where the value itself is
    not finite. At the ends the window is cut."""
    sound = np.isfinite(values)
    total = _window_sums(np.where(sound, values, 0.0), width)
    count = _window_sums(sound.astype(np.float64), width)
    return np.where(sound, total / np.maximum(count, 1), np.nan)


def _bucket(x: NDArray[Any], buckets: int) -> NDArray[np.int64]:
    share = (x - x[0]) / (x[-1] - x[0])
    return np.minimum((share * buckets).astype(np.int64), buckets - 1)


def _window_sums(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Sums over `width` (odd) neighbours [n], nothing lying beyond the ends.

    Each is put together from blocks of 1, 2, 4, … values. The difference of two running totals
    would lose all digits behind one huge value.
    """
    n = len(values)
    block = np.pad(values, width // 2)
    sums, done, length = np.zeros(n), 0, 1
    while True:
        if width & length:
            sums += block[done : done + n]
            done += length
        if done == width:
            return sums
        block = block[:-length] + block[length:]
        length *= 2
