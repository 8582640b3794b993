"""The node's processors, and the ranks' part of them."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from internlm_lib.devices.host import HostMeter

MIB = 2**20
MODULE = "pretended.worker"

# As torchrun: it names the module that its children run, and works little itself.
LAUNCHER = """
import subprocess, sys
work = "data = bytearray(b'x' * (48 << 20)); print('ready', flush=True)\\nwhile True: pass"
subprocess.run([sys.executable, "-c", work])
"""


@contextmanager
def working(module: str) -> Iterator[psutil.Process]:
    """A launcher of `module`, with one rank, which is given."""
    command = [sys.executable, "-c", LAUNCHER, "-m", module]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None and job.stdout.readline() == "ready\n"
    launcher = psutil.Process(job.pid)
    (rank,) = launcher.children()
    try:
        yield rank
    finally:
        for process in (rank, launcher):
            process.kill()
        job.wait()


def test_ranks_are_told_from_the_rest() -> None:
    with working(MODULE) as rank, working("other.worker"):
        meter = HostMeter(MODULE)
        meter.sample()
        begin, before = time.monotonic(), rank.cpu_times().user
        time.sleep(1.0)
        use = meter.sample()
        seconds, spent = time.monotonic() - begin, rank.cpu_times().user - before
        resident = rank.memory_info().rss / MIB
    expected = 100 * spent / seconds / (psutil.cpu_count() or 1)
    assert use.ranks_cpu_percent == pytest.approx(expected, rel=0.1, abs=1)
    assert use.ranks_memory_mib == pytest.approx(resident, rel=0.05)
    assert expected > 5 and resident > 48
    assert use.ranks_cpu_percent is not None
    assert use.ranks_cpu_percent + 5 < use.cpu_percent <= 100.01


def test_without_ranks_their_part_is_not_known() -> None:
    use = HostMeter(MODULE).sample()
    assert (use.ranks_cpu_percent, use.ranks_memory_mib) == (None, None)
    assert 0 < use.memory_used_mib < use.memory_total_mib
    assert 0 <= use.cpu_percent <= 100.01


def test_the_node_s_memory_is_what_the_kernel_says() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    use = HostMeter(MODULE).sample()
    assert use.memory_total_mib == kib["MemTotal"] / 1024
    expected = (kib["MemTotal"] - kib["MemAvailable"]) / 1024
    assert use.memory_used_mib == pytest.approx(expected, rel=0.2)
