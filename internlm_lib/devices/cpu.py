"""A plain CPU: gloo between ranks, resident memory, megatron-core adapted by `cpu_megatron`."""

import resource
from pathlib import Path
from typing import TYPE_CHECKING

from internlm_lib.devices.base import Device, Memory

if TYPE_CHECKING:
    import torch

_STATM = Path("/proc/self/statm")
"""In pages: size, resident, … Source: proc(5)."""


class CpuDevice(Device):
    name = "cpu"
    backend = "gloo"

    def available(self) -> bool:
        return True

    def count(self) -> None:
        return None

    def bind(self, local_rank: int) -> None:
        """All ranks share the one CPU."""

    def current(self) -> "torch.device":
        import torch

        return torch.device("cpu")

    def description(self) -> str:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
        return "CPU"

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""

    def memory(self) -> Memory:
        resident = int(_STATM.read_text().split()[1]) * resource.getpagesize()
        # The kernel counts the two apart: the highest may lag behind by some pages.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Memory(resident, None, max(peak, resident))

    def adapt_megatron(self) -> None:
        from internlm_lib.devices.cpu_megatron import adapt

        adapt()
