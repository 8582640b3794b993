"""What the device says of its memory is what was allocated, and what is freed comes back."""

from collections.abc import Iterator
from functools import partial

import torch

from internlm_lib.devices import Device
from internlm_lib.selftest.checks import Check, Outcome
from internlm_lib.selftest.sizes import MIB, Sizes

_TOLERANCE = 0.02
"""Of what is allocated: an allocator rounds to pages, and on a CPU other threads allocate too."""


def memory_checks(device: Device, sizes: Sizes) -> Iterator[Check]:
    for name, find in (("allocated and freed", _allocated), ("peak", _peak)):
        found = partial(find, device, sizes.copied_bytes)
        yield Check("memory", name, "of what was allocated", _TOLERANCE, found)


def _allocated(device: Device, size: int) -> Outcome:
    before = device.memory().allocated_bytes
    filled = _filled(device, size)
    during = device.memory().allocated_bytes
    del filled
    device.synchronize()
    after = device.memory().allocated_bytes
    error = max(abs(during - before - size), abs(after - before)) / size
    return Outcome(
        error, {"allocated MiB": (during - before) / MIB, "left MiB": (after - before) / MIB}
    )


def _peak(device: Device, size: int) -> Outcome:
    """The peak is not below what is held now. (It may be far above: it is of the whole process.)"""
    filled = _filled(device, size)
    memory = device.memory()
    del filled
    missing = max(0, memory.allocated_bytes - memory.peak_bytes)
    return Outcome(missing / size, {"peak MiB": memory.peak_bytes / MIB})


def _filled(device: Device, size: int) -> torch.Tensor:
    """Written to, since a CPU's pages exist only then."""
    filled = torch.full((size // 4,), 1, dtype=torch.int32, device=device.current())
    device.synchronize()
    return filled
