"""What others have published: throughput, losses and device peaks, each with its source."""

from internlm_lib.published.peaks import Peak, mfu, peak_candidates, peak_of
from internlm_lib.published.tables import (
    LossClaim,
    PublishedRow,
    Shape,
    loss_claims,
    throughput_row,
    throughput_rows,
)

__all__ = [
    "LossClaim",
    "Peak",
    "PublishedRow",
    "Shape",
    "loss_claims",
    "mfu",
    "peak_candidates",
    "peak_of",
    "throughput_row",
    "throughput_rows",
]
