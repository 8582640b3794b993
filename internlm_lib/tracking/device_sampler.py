"""Samples of a node's devices, taken beside a training by the process that started its ranks.

They go to a journal of their own, with one writer, `TrainingFolder.devices`:

- `device_sampling`: sampling begins; `device`, `seconds` between samples, `node`, `nodes`.
- `device_sample`: `sample` (its number, counted through the whole journal), `start` (the time of
  the training's `start` event that it belongs to; None before there is one), `node`, `nodes`,
  `devices` (fields of `DeviceUse`, one entry each), `host` (fields of `HostUse`, or None).
- `device_sample_failed`: the first `reason` why something could not be sampled.

Whatever fails, the training goes on.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internlm_lib.devices import npu_smi, nvidia_smi
from internlm_lib.devices.host import HostMeter
from internlm_lib.devices.use import SECONDS_TO_ANSWER, DeviceUse
from internlm_lib.journal import Journal, read_journal

FIRST_SECONDS = 1.0
"""Until the first sample: processors are measured over a stretch of time."""

_TOOLS: dict[str, Callable[[], list[DeviceUse]]] = {
    "npu": npu_smi.sample,
    "cuda": nvidia_smi.sample,
}
"""How devices are asked; a CPU is the host itself."""


@dataclass(frozen=True)
class Sampling:
    """What is sampled, and where to."""

    journal: Path
    seconds: float | None
    """Between two samples; None takes none."""
    device: str | None
    """What the ranks run on: `npu`, `cuda`, `cpu`, or None if that is not known."""
    module: str
    """What the ranks run, as `python -m`."""
    node: int
    nodes: int
    started: Callable[[], float | None]
    """Time of the `start` event that the training has written since; None before."""


@contextmanager
def sampled(sampling: Sampling) -> Iterator[None]:
    """Sample while the body runs, and once more after it."""
    if sampling.seconds is None:
        yield
        return
    sampler = _Sampler(sampling, sampling.seconds)
    thread = threading.Thread(target=sampler.run, name="device-sampler", daemon=True)
    thread.start()
    try:
        yield
    finally:
        sampler.end.set()
        thread.join(SECONDS_TO_ANSWER + 1)
        sampler.given_up.set()  # by a driver that hangs: the journal has only one writer


class _Sampler:
    def __init__(self, sampling: Sampling, seconds: float) -> None:
        self.end = threading.Event()
        self.given_up = threading.Event()
        self._sampling = sampling
        self._seconds = seconds
        self._where = {"node": sampling.node, "nodes": sampling.nodes}
        self._complained = False

    def run(self) -> None:
        try:
            self._sample_to_the_end(Journal(self._sampling.journal))
        except Exception as error:  # the disk is full, the journal damaged …
            self._complain(f"sampling ended: {error}")

    def _sample_to_the_end(self, journal: Journal) -> None:
        sampling = self._sampling
        number, meter = _last_sample(sampling.journal), HostMeter(sampling.module)
        ask = _TOOLS.get(sampling.device or "", list)
        journal.write(
            "device_sampling", device=sampling.device, seconds=self._seconds, **self._where
        )
        wait, ending = min(FIRST_SECONDS, self._seconds), False
        while not ending:
            ending = self.end.wait(wait)
            number, wait = number + 1, self._seconds
            devices, host = self._tried(ask) or [], self._tried(meter.sample)
            if self.given_up.is_set():
                return
            journal.write(
                "device_sample", sample=number, start=sampling.started(), **self._where,
                devices=[asdict(device) for device in devices],
                host=asdict(host) if host else None,
            )  # fmt: skip

    def _tried(self, measure: Callable[[], Any]) -> Any:
        """What it gives, or None."""
        try:
            return measure()
        except Exception as error:  # drivers fail in ways that nobody can list
            self._complain(str(error))
            return None

    def _complain(self, reason: str) -> None:
        """Write down why, once: the same is likely to happen at every sample."""
        if self._complained:
            return
        self._complained = True
        try:
            journal = Journal(self._sampling.journal)
            journal.write("device_sample_failed", reason=reason, **self._where)
        except OSError:
            pass  # there is nowhere left to say it


def _last_sample(path: Path) -> int:
    """Number of the newest sample in a journal; 0 if there is none."""
    return max((event.get("sample", 0) for event, _ in read_journal(path)), default=0)
