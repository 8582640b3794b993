"""Batch-size ramp-up: how many samples each optimizer step takes, as Megatron-LM counts them.

Source: RampupBatchsizeNumMicroBatchesCalculator of megatron/core/num_microbatches_calculator.py.
"""

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class BatchRamp:
    """From `start` to `full` samples per step, by `increment`, over the first `samples` samples."""

    start: int
    increment: int
    samples: int
    full: int

    def batch_size(self, consumed_samples: int) -> int:
        """Samples of the step that begins when so many have been consumed."""
        if consumed_samples > self.samples:
            return self.full
        # Divided as Megatron divides, so that rounding falls on the same step.
        per_increment = self.samples / ((self.full - self.start) // self.increment)
        return self.start + int(consumed_samples / per_increment) * self.increment


@lru_cache(maxsize=8)
def consumed_before_steps(ramp: BatchRamp, limit: int) -> tuple[int, ...]:
    """Samples consumed before step 1, 2 … up to the first step of the full size, at most `limit`.

    From the last of these on, every step takes `ramp.full`, unless `limit` cut the ramp off.
    """
    consumed = [0]
    while len(consumed) < limit and (size := ramp.batch_size(consumed[-1])) < ramp.full:
        consumed.append(consumed[-1] + size)
    return tuple(consumed)
