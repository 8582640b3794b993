"""Samples of a training's devices to the MLflow run of the attempt that they belong to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from internlm_lib.tracking.mlflow_store import MAX_METRICS, as_metrics
from internlm_lib.tracking.replica_state import Mirror, device_journals

if TYPE_CHECKING:
    from internlm_lib.tracking.replay import Session

_DEVICE_METRICS = (
    "utilization_percent", "memory_used_mib", "power_watts", "temperature_celsius",
)  # fmt: skip
_HOST_METRICS = ("cpu_percent", "memory_used_mib", "ranks_cpu_percent", "ranks_memory_mib")


def sample_metrics(event: Mapping[str, Any]) -> dict[str, float | None]:
    """MLflow metric → value of a `device_sample`; None where that is not known.

    `device/<index>/…` and `node/…`; where several nodes train, `node<R>/device/<index>/…` and
    `node<R>/…`.
    """
    several = event["nodes"] > 1
    node = f"node{event['node']}" if several else "node"
    devices = f"{node}/device" if several else "device"
    host = event["host"] or {}
    values = {f"{node}/{name}": host.get(name) for name in _HOST_METRICS}
    for device in event["devices"]:
        for name in _DEVICE_METRICS:
            values[f"{devices}/{device['index']}/{name}"] = device.get(name)
    return values


@dataclass
class DeviceReplay:
    """The device journals of one role's training, of all nodes."""

    session: "Session"
    role: str

    def replay(self, mirror: Mirror | None) -> int:
        """Send what is new and belongs to the attempt in `mirror`; returns the number of events.

        A sample that was taken before its attempt's `start` event is passed over: it belongs to no
        MLflow run yet. One whose `start` event the replay has not come to waits for it.
        """
        names = device_journals(self.session.folder, self.role)
        return sum(self._replay(name, mirror) for name in names)

    def _replay(self, journal: str, mirror: Mirror | None) -> int:
        metrics: list[Any] = []
        count, last = 0, None
        for event, offset in self.session.state.new_events(self.session.folder, journal):
            start = event.get("start")
            if start is not None:
                if mirror is None or start > mirror.started:
                    break
                metrics += as_metrics(sample_metrics(event), event["sample"], event["time"])[0]
                mirror.last_time = max(mirror.last_time, event["time"])
            count, last = count + 1, offset
            if mirror is not None and len(metrics) >= MAX_METRICS:
                self._send(mirror, metrics)
                self.session.advance(journal, offset)
                metrics = []
        if mirror is not None:
            self._send(mirror, metrics)
        if last is not None:
            self.session.advance(journal, last)
        return count

    def _send(self, mirror: Mirror, metrics: list[Any]) -> None:
        if metrics:
            self.session.store.log(mirror.run_id, metrics)
