"""How many devices a process is shown, before anything asks a driver."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

VARIABLES: Mapping[str, tuple[str, ...]] = {
    # The first chooses among the devices that a container has, which the second says, as numbers,
    # ranges, or names (Ascend910-0). Sources: CANN, environment variables; MindCluster, Ascend
    # Docker Runtime.
    "npu": ("ASCEND_RT_VISIBLE_DEVICES", "ASCEND_VISIBLE_DEVICES"),
    "cuda": ("CUDA_VISIBLE_DEVICES",),
}
_RANGE = re.compile(r"(\d{1,9})-(\d{1,9})")
_DEVICE = re.compile(r"[\w./-]*\d[\w./-]*")


@dataclass(frozen=True, order=True)
class VisibleDevices:
    count: int
    said: str
    """The variable and its value."""


def visible_devices(device: str, environ: Mapping[str, str] = os.environ) -> VisibleDevices | None:
    """What the variable says that shows the fewest; None if none is set to a list of devices.

    Args:
        device: `npu`, `cuda` or `cpu`.
    """
    found = [
        VisibleDevices(count, f"{name}={environ[name]}")
        for name in VARIABLES.get(device, ())
        if (count := _count(environ.get(name, ""))) is not None
    ]
    return min(found, default=None)


def _count(text: str) -> int | None:
    """Devices in `0,1`, `0-3,6`, `GPU-8932f937`; None of an empty list, or one with other words."""
    if not text.strip():
        return None
    count = 0
    for item in text.split(","):
        item = item.strip()
        if bounds := _RANGE.fullmatch(item):
            count += max(0, int(bounds[2]) - int(bounds[1]) + 1)
        elif item == "-1":  # CUDA sees nothing from here on
            break
        elif _DEVICE.fullmatch(item):
            count += 1
        else:
            return None
    return count
