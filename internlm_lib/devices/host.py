"""What a node's own processors and memory are doing, and which part of it is the ranks'."""

import time
from dataclasses import dataclass

import psutil

_MIB = 2**20


@dataclass(frozen=True)
class HostUse:
    """One node since the sample before."""

    cpu_percent: float
    """Of all its cores together."""
    memory_used_mib: float
    """All but what is available, without swapping, to new processes."""
    memory_total_mib: float
    ranks_cpu_percent: float | None
    """The ranks' part of `cpu_percent`; None while there are no ranks."""
    ranks_memory_mib: float | None
    """Resident memory of all ranks; pages that they share count in each."""


class HostMeter:
    """Measures from call to call."""

    def __init__(self, module: str) -> None:
        """Args:
        module: what the ranks run, as `python -m`, below a child of this process that was
            started with its name.
        """
        self._module = module
        self._since = time.monotonic()
        self._node = _busy_and_all()
        self._ranks: dict[tuple[int, float], float] = {}

    def sample(self) -> HostUse:
        """Of the time since the last call, or since the meter was made. Raises psutil.Error."""
        now, node, ranks = time.monotonic(), _busy_and_all(), self._of_ranks()
        busy, everything = (new - old for new, old in zip(node, self._node, strict=True))
        seconds = {key: cpu for key, (cpu, _) in ranks.items()}
        spent = sum(max(0.0, cpu - self._ranks.get(key, 0.0)) for key, cpu in seconds.items())
        available = max(now - self._since, 1e-3) * (psutil.cpu_count() or 1)
        self._since, self._node, self._ranks = now, node, seconds
        memory = psutil.virtual_memory()
        return HostUse(
            cpu_percent=100 * busy / everything if everything > 0 else 0.0,
            memory_used_mib=(memory.total - memory.available) / _MIB,
            memory_total_mib=memory.total / _MIB,
            ranks_cpu_percent=100 * spent / available if ranks else None,
            ranks_memory_mib=sum(size for _, size in ranks.values()) / _MIB if ranks else None,
        )

    def _of_ranks(self) -> dict[tuple[int, float], tuple[float, int]]:
        """Of every rank, and what it started, seconds of CPU and resident bytes."""
        found = {}
        for process in self._processes():
            try:
                cpu, size = process.cpu_times(), process.memory_info().rss
                found[process.pid, process.create_time()] = (cpu.user + cpu.system, size)
            except psutil.Error:  # has just ended
                continue
        return found

    def _processes(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for child in psutil.Process().children():
            try:
                if self._module in child.cmdline():
                    found += child.children(recursive=True)
            except psutil.Error:
                continue
        return found


def _busy_and_all() -> tuple[float, float]:
    """Seconds that all cores together have worked, and those there were, since the node began."""
    times = psutil.cpu_times()
    everything = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return everything - times.idle - getattr(times, "iowait", 0.0), everything
