"""The node's processors, and the ranks' part of them."""

import subprocess
import sys
import time
from collections.abc import Iterator
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


@pytest.fixture
def launcher() -> Iterator["subprocess.Popen[str]"]:
    job = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, "-m", MODULE], stdout=subprocess.PIPE, text=True
    )
    assert job.stdout is not None and job.stdout.readline() == "ready\n"
    yield job
    for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
        process.kill()
    job.wait()


def test_ranks_are_told_from_the_rest(launcher: "subprocess.Popen[str]") -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        meter = HostMeter(MODULE)
        meter.sample()
        time.sleep(1.0)
        use = meter.sample()
    finally:
        bystander.kill()
        bystander.wait()
    (rank,) = psutil.Process(launcher.pid).children()
    share = 100 / (psutil.cpu_count() or 1)  # one core
    assert use.ranks_cpu_percent is not None and use.ranks_memory_mib is not None
    assert 0.05 * share < use.ranks_cpu_percent < 1.1 * share
    assert use.cpu_percent > use.ranks_cpu_percent
    assert use.cpu_percent <= 100
    assert use.ranks_memory_mib == pytest.approx(rank.memory_info().rss / MIB, rel=0.05)
    assert use.ranks_memory_mib > 48


def test_without_ranks_their_part_is_not_known() -> None:
    use = HostMeter(MODULE).sample()
    assert (use.ranks_cpu_percent, use.ranks_memory_mib) == (None, None)
    assert 0 < use.memory_used_mib < use.memory_total_mib
    assert 0 <= use.cpu_percent <= 100


def test_the_node_s_memory_is_what_the_kernel_says() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    use = HostMeter(MODULE).sample()
    assert use.memory_total_mib == kib["MemTotal"] / 1024
    expected = (kib["MemTotal"] - kib["MemAvailable"]) / 1024
    assert use.memory_used_mib == pytest.approx(expected, rel=0.2)
