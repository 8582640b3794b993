"""Steps that must not change the weights: a loss that is not finite, or far above those before."""

import math
from collections import deque
from collections.abc import Iterable

from internlm_lib.errors import KitError

WINDOW = 32
"""Losses that a spike is measured against."""
MAX_IN_A_ROW = 8
"""Batches left out one after the other; more means that the training itself is broken."""


class StepGuard:
    """Judges each step's loss before the update. Equal on all ranks, as the losses are."""

    def __init__(self, spike_factor: float | None, recent: Iterable[float] = ()) -> None:
        """Args:
        spike_factor: a loss above this times the median of the last `WINDOW` is a spike; None:
            only what is not finite is refused.
        recent: losses of the steps before, of a training that is resumed.
        """
        self._factor = spike_factor
        self.recent: deque[float] = deque(recent, WINDOW)
        self._refused = 0

    def fault(self, loss: float) -> str:
        """What is wrong with a loss; "" if nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self._factor is None or len(self.recent) < WINDOW:
            return ""
        median = sorted(self.recent)[WINDOW // 2]
        if loss > self._factor * median:
            return f"the loss is {loss:.4g}, {loss / median:.3g} times the median of {WINDOW} steps"
        return ""

    def accepted(self, loss: float) -> None:
        self.recent.append(loss)
        self._refused = 0

    def refused(self) -> None:
        """Raises KitError when too many batches in a row were."""
        self._refused += 1
        if self._refused > MAX_IN_A_ROW:
            raise KitError(
                f"{self._refused} batches in a row were left out (training.bad_step_policy): the "
                "weights are broken, or the data is; go back to an earlier checkpoint, lower "
                "training.lr, and look at the batches in 01_prepare"
            )
