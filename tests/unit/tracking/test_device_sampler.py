"""Samples beside a training: as many as there should be, from a tool that answers, fails or hangs;
and the training goes on."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from internlm_lib.devices import use
from internlm_lib.journal import Journal, events, read_journal
from internlm_lib.tracking import device_sampler
from internlm_lib.tracking.device_sampler import Sampling, sampled

GPU = "echo '0, NVIDIA A100, 5, 6, 7, 8, 9'"

Tool = Callable[[str, str], None]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Puts a shell script before the system's commands."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(device_sampler, "FIRST_SECONDS", 0.05)

    def put(name: str, script: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return put


def sampling(tmp_path: Path, device: str = "cuda", **fields: Any) -> Sampling:
    values: dict[str, Any] = {
        "journal": tmp_path / "devices.jsonl", "seconds": 0.1, "device": device,
        "module": "some.worker", "node": 0, "nodes": 1, "started": lambda: None,
    }  # fmt: skip
    return Sampling(**values | fields)


@contextmanager
def patience(sampling: Sampling, samples: int) -> Iterator[None]:
    """Sample until there are so many."""
    before = len(events(sampling.journal, "device_sample"))
    deadline = time.monotonic() + 20
    with sampled(sampling):
        yield
        while len(events(sampling.journal, "device_sample")) < before + samples:
            assert time.monotonic() < deadline, "too few samples"
            time.sleep(0.02)


def test_samples_are_taken_at_once_now_and_then_and_at_the_end(tool: Tool, tmp_path: Path) -> None:
    tool("nvidia-smi", GPU)
    begin, started = time.time(), []
    what = sampling(tmp_path, node=1, nodes=2, started=lambda: started[-1] if started else None)
    with patience(what, 3):
        started.append(12.5)
        while len(events(what.journal, "device_sample")) < 3:
            time.sleep(0.02)
        taken = len(events(what.journal, "device_sample"))
    first, *samples = [event for event, _ in read_journal(what.journal)]
    where = {"node": 1, "nodes": 2}
    assert first.items() >= {"event": "device_sampling", "device": "cuda", "seconds": 0.1}.items()
    assert len(samples) > taken  # the last is taken when all is over
    assert [sample["sample"] for sample in samples] == list(range(1, len(samples) + 1))
    for sample in samples:
        assert sample.items() >= {"event": "device_sample", **where}.items()
        (gpu,) = sample["devices"]
        assert (gpu["index"], gpu["name"], gpu["utilization_percent"]) == (0, "NVIDIA A100", 5)
        assert (gpu["memory_used_mib"], gpu["power_watts"], gpu["health"]) == (6, 8, None)
        assert begin <= sample["time"] <= time.time()
    assert samples[-1]["start"] == 12.5
    assert samples[-1]["host"]["memory_total_mib"] > samples[-1]["host"]["memory_used_mib"] > 0


def test_a_later_attempt_goes_on_counting(tool: Tool, tmp_path: Path) -> None:
    tool("nvidia-smi", GPU)
    what = sampling(tmp_path, seconds=60.0)
    for _ in range(2):
        with sampled(what):
            pass
    samples = events(what.journal, "device_sample")
    assert [sample["sample"] for sample in samples] == [1, 2]
    assert len(events(what.journal, "device_sampling")) == 2


def test_a_cpu_needs_no_tool(tool: Tool, tmp_path: Path) -> None:
    what = sampling(tmp_path, "cpu")
    with patience(what, 1):
        pass
    sample = events(what.journal, "device_sample")[0]
    assert sample["devices"] == [] and 0 <= sample["host"]["cpu_percent"] <= 100
    assert events(what.journal, "device_sample_failed") == []


def test_ranks_are_found_by_what_they_run(tool: Tool, tmp_path: Path) -> None:
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen(
        [sys.executable, "-c", launcher, "some.worker"], stdin=subprocess.PIPE
    ) as job:
        while not psutil.Process(job.pid).children():
            time.sleep(0.02)
        what = sampling(tmp_path, "cpu")
        with patience(what, 1):
            pass
        job.communicate(b"\n")
    assert events(what.journal, "device_sample")[0]["host"]["ranks_memory_mib"] > 1


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo unheard of", "it says: unheard of"),
        ("exit 3", "exit code 3"),
        ("exec sleep 60", "no answer within 0.2 s"),
    ],
)
def test_a_failure_is_told_once_and_the_host_is_sampled(
    script: str, reason: str, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(use, "SECONDS_TO_ANSWER", 0.2)
    tool("npu-smi", script)
    what = sampling(tmp_path, "npu")
    with patience(what, 3):
        pass
    (failure,) = events(what.journal, "device_sample_failed")
    assert reason in failure["reason"] and failure["node"] == 0
    for sample in events(what.journal, "device_sample"):
        assert sample["devices"] == [] and sample["host"]["memory_used_mib"] > 0


def test_a_tool_that_recovers_is_heard_again(tool: Tool, tmp_path: Path) -> None:
    what = sampling(tmp_path)
    with patience(what, 1):
        pass
    tool("nvidia-smi", GPU)
    with patience(what, 1):
        pass
    assert len(events(what.journal, "device_sample")[-1]["devices"]) == 1


def test_a_fault_of_the_kit_s_own_is_told_too(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_sampler.HostMeter, "sample", lambda self: 1 / 0)
    tool("nvidia-smi", GPU)
    what = sampling(tmp_path)
    with patience(what, 2):
        pass
    (failure,) = events(what.journal, "device_sample_failed")
    assert failure["reason"] == "division by zero"
    assert all(len(s["devices"]) == 1 for s in events(what.journal, "device_sample"))


def test_a_journal_that_cannot_be_written_or_read_disturbs_nobody(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", complaints.append)
    (tmp_path / "file").write_text("")
    with sampled(sampling(tmp_path, journal=tmp_path / "file" / "devices.jsonl")):
        time.sleep(0.2)
    damaged = tmp_path / "devices.jsonl"
    damaged.write_text("{}\nno json\n")
    with sampled(sampling(tmp_path)):
        time.sleep(0.2)
    assert complaints == []
    assert (
        "not a JSON line" in damaged.read_text() and "device_sample_failed" in damaged.read_text()
    )


def test_who_hangs_for_longer_than_anybody_waits_writes_nothing_later(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_sampler, "SECONDS_TO_ANSWER", -0.9)  # and one more to be joined
    hanging = threading.Event()
    tools = {"cuda": lambda: hanging.wait(10) and []}
    monkeypatch.setattr(device_sampler, "_TOOLS", tools)
    what = sampling(tmp_path)
    with sampled(what):
        time.sleep(0.2)
    (thread,) = [t for t in threading.enumerate() if t.name == "device-sampler"]
    hanging.set()
    thread.join(10)
    assert not thread.is_alive()
    assert events(what.journal, "device_sample") == []


def test_no_seconds_no_samples(tmp_path: Path) -> None:
    with sampled(sampling(tmp_path, seconds=None)):
        Journal(tmp_path / "other.jsonl").write("x")
    assert not (tmp_path / "devices.jsonl").exists()


def test_an_error_of_the_body_is_passed_on_after_the_last_sample(tmp_path: Path) -> None:
    what = sampling(tmp_path, "cpu")
    with pytest.raises(KeyboardInterrupt), sampled(what):
        raise KeyboardInterrupt
    assert len(events(what.journal, "device_sample")) == 1


def test_sampling_loads_neither_torch_nor_mlflow() -> None:
    module = "internlm_lib.tracking.device_sampler"
    code = f"import sys, {module}; print({{'torch', 'mlflow'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
