"""What the devices did while a training ran, as their journals tell it: numbers over time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from internlm_lib.journal import events, read_journal
from internlm_lib.reporting.decimation import BUCKETS
from internlm_lib.reporting.training import Floats
from internlm_lib.run_folder import TrainingFolder

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = (
    "utilization_percent", "memory_used_mib", "memory_total_mib", "power_watts",
    "temperature_celsius",
)  # fmt: skip
"""Fields of a device that are read."""

_HOST = {
    "all cores": ("cpu_percent", "memory_used_mib", "memory_total_mib"),
    "the ranks": ("ranks_cpu_percent", "ranks_memory_mib", "memory_total_mib"),
}
"""Track of a host → its fields for the first of `COLUMNS`."""


@dataclass(frozen=True)
class Track:
    """One device over a training, or a node's processors, or the ranks' part of them."""

    name: str
    """E.g. `3`, on several nodes `node 1: 3`; with the tool's word if it was not well."""
    host: bool
    minutes: Floats
    """Since the training's first `start` event [n], rising; negative while it was loading."""
    columns: Mapping[str, Floats]
    """Each of `COLUMNS` [n]; NaN where it was not told."""


@dataclass(frozen=True)
class TrainingDevices:
    """The tracks of one training: of accelerators where there are any, else of its hosts."""

    name: str
    tracks: Sequence[Track] = ()
    restarts: Sequence[float] = ()
    """Minutes at which it was started again."""
    reason: str = ""
    """Why something could not be sampled."""


def read_devices(files: TrainingFolder, name: str) -> TrainingDevices:
    """The samples of a training since step 1 was last begun, of all nodes; without any, no tracks.

    Of more than 600 samples of a device there are means over equal stretches of time.
    """
    times = _start_times(files)
    nodes = [_of_training(path, times) for path in files.device_journals()]
    tracks = [track for node in nodes for track in _tracks(node, times)]
    failed = [e["reason"] for node in nodes for e in node if e["event"] == "device_sample_failed"]
    return TrainingDevices(
        name,
        [track for track in tracks if not track.host] or tracks,
        [(time - times[0]) / 60 for time in times[1:]],
        "; ".join(dict.fromkeys(failed)),
    )


def device_rows(trainings: Sequence[TrainingDevices]) -> "DataFrame":
    """All tracks, one row per training, device and point in time."""
    from pandas import DataFrame, concat

    frames = [
        DataFrame({"training": training.name, "device": track.name, "minutes": track.minutes})
        .assign(**track.columns)
        for training in trainings
        for track in training.tracks
    ]  # fmt: skip
    empty = DataFrame(columns=["training", "device", "minutes", *COLUMNS])
    return concat(frames, ignore_index=True) if frames else empty


def _start_times(files: TrainingFolder) -> list[float]:
    """When step 1 was last begun, and when it was gone on since."""
    starts = events(files.journal, "start")
    first = max((n for n, event in enumerate(starts) if event["first_step"] == 1), default=0)
    return [event["time"] for event in starts[first:]]


def _of_training(path: Path, times: Sequence[float]) -> list[dict[str, Any]]:
    """A node's events since the attempt that began at the first of `times` was launched."""
    found: list[dict[str, Any]] = []
    begun = False
    for event, _ in read_journal(path):
        begun = begun or event.get("start") in times
        if event["event"] == "device_sampling" and not begun:
            found = []  # of an attempt before, or one that was over before it started
        found.append(event)
    return found if begun else []


def _tracks(node: Sequence[Mapping[str, Any]], times: Sequence[float]) -> Iterator[Track]:
    samples = [event for event in node if event["event"] == "device_sample"]
    if not samples:
        return
    prefix = f"node {samples[0]['node']}: " if samples[0]["nodes"] > 1 else ""
    minutes = np.array([(sample["time"] - times[0]) / 60 for sample in samples])
    for index in sorted({device["index"] for sample in samples for device in sample["devices"]}):
        of_device = [_with_index(sample["devices"], index) for sample in samples]
        words = dict.fromkeys(device.get("health") or "OK" for device in of_device)
        ill = ", ".join(word for word in words if word.upper() != "OK")
        name = f"{prefix}{index}" + (f" ({ill})" if ill else "")
        yield Track(name, False, *_thinned(minutes, [_row(d, COLUMNS) for d in of_device]))
    for name, fields in _HOST.items():
        rows = [_row(sample["host"] or {}, fields) for sample in samples]
        yield Track(prefix + name, True, *_thinned(minutes, rows))


def _with_index(devices: Sequence[Mapping[str, Any]], index: int) -> Mapping[str, Any]:
    return next((device for device in devices if device["index"] == index), {})


def _row(device: Mapping[str, Any], fields: Sequence[str]) -> list[float]:
    """Values for `COLUMNS`; NaN where there is none."""
    values = [device.get(field) for field in fields] + [None] * (len(COLUMNS) - len(fields))
    return [float("nan") if value is None else float(value) for value in values]


def _thinned(minutes: Floats, rows: list[list[float]]) -> tuple[Floats, dict[str, Floats]]:
    """Points in time, and `COLUMNS` at each."""
    from pandas import DataFrame

    frame = DataFrame(rows, columns=list(COLUMNS), dtype=np.float64).assign(minutes=minutes)
    if len(frame) > BUCKETS:
        place = (minutes - minutes[0]) / max(minutes[-1] - minutes[0], 1e-9) * BUCKETS
        frame = frame.groupby(np.minimum(place.astype(np.int64), BUCKETS - 1)).mean()
    return frame["minutes"].to_numpy(), {name: frame[name].to_numpy() for name in COLUMNS}
