"""Samples of the devices as tracks, a table and a figure."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internlm_lib.reporting.device_figure import device_figure
from internlm_lib.reporting.device_use import COLUMNS, device_rows, read_devices
from internlm_lib.reporting.figures import save_figure
from internlm_lib.run_folder import RunFolder, TrainingFolder

T0 = 1_700_000_000.0
MIB = 1024


def write(path: Path, *events: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def start(minute: float, first_step: int = 1) -> dict[str, Any]:
    return {"event": "start", "time": T0 + 60 * minute, "first_step": first_step}


def begin(minute: float) -> dict[str, Any]:
    return {"event": "device_sampling", "time": T0 + 60 * minute}


def device(index: int, utilization: float | None, **fields: Any) -> dict[str, Any]:
    return {
        "index": index, "name": "910B3", "utilization_percent": utilization,
        "memory_used_mib": 40 * MIB, "memory_total_mib": 64 * MIB, "power_watts": 300.0 + index,
        "temperature_celsius": None, "health": "OK", **fields,
    }  # fmt: skip


def sample(
    minute: float, start: float | None, *devices: dict[str, Any], node: int = 0, nodes: int = 1
) -> dict[str, Any]:
    host = {
        "cpu_percent": 50.0, "memory_used_mib": 8 * MIB, "memory_total_mib": 16 * MIB,
        "ranks_cpu_percent": None if start is None else 40.0, "ranks_memory_mib": 2 * MIB,
    }  # fmt: skip
    return {
        "event": "device_sample", "time": T0 + 60 * minute, "sample": 1, "node": node,
        "nodes": nodes, "start": None if start is None else T0 + 60 * start, "host": host,
        "devices": list(devices),
    }  # fmt: skip


@pytest.fixture
def files(folder: RunFolder) -> TrainingFolder:
    return folder.training("candidate")


def test_devices_become_tracks_and_what_was_not_told_a_gap(files: TrainingFolder) -> None:
    write(files.journal, start(0))
    write(
        files.devices(), begin(-1), sample(-0.5, None, device(0, 0.0), device(3, 0.0)),
        sample(0.5, 0, device(0, 80.0), device(3, None, health="Alarm")),
        sample(1.0, 0), sample(1.5, 0, device(0, 90.0), device(3, 70.0, health="Warning")),
    )  # fmt: skip
    found = read_devices(files, "candidate: TP2, npu")
    assert [track.name for track in found.tracks] == ["0", "3 (Alarm, Warning)"]
    for track, utilization in zip(
        found.tracks, ([0, 80, np.nan, 90], [0, np.nan, np.nan, 70]), strict=True
    ):
        assert track.minutes.tolist() == [-0.5, 0.5, 1.0, 1.5] and not track.host
        np.testing.assert_array_equal(track.columns["utilization_percent"], utilization)
        assert np.isnan(track.columns["temperature_celsius"]).all()
    assert (found.restarts, found.reason) == ([], "")
    rows = device_rows([found])
    assert list(rows.columns) == ["training", "device", "minutes", *COLUMNS]
    assert rows["device"].tolist() == ["0"] * 4 + ["3 (Alarm, Warning)"] * 4
    assert rows["power_watts"].dropna().tolist() == [300.0] * 3 + [303.0] * 3


def test_without_accelerators_it_is_the_host(files: TrainingFolder) -> None:
    write(files.journal, start(0))
    write(files.devices(), begin(-1), sample(-0.5, None), sample(0.5, 0))
    node, ranks = read_devices(files, "candidate").tracks
    assert (node.name, ranks.name, node.host) == ("all cores", "the ranks", True)
    np.testing.assert_array_equal(node.columns["utilization_percent"], [50, 50])
    np.testing.assert_array_equal(ranks.columns["utilization_percent"], [np.nan, 40])
    np.testing.assert_array_equal(node.columns["memory_used_mib"], [8 * MIB] * 2)
    np.testing.assert_array_equal(ranks.columns["memory_used_mib"], [2 * MIB] * 2)
    np.testing.assert_array_equal(ranks.columns["memory_total_mib"], [16 * MIB] * 2)


def test_only_the_newest_training_counts_with_all_its_attempts(files: TrainingFolder) -> None:
    write(files.journal, start(-60), start(0), start(10, first_step=7))
    failed = {"event": "device_sample_failed", "time": T0, "reason": "no answer"}
    older = {"event": "device_sample_failed", "time": T0, "reason": "another time"}
    write(
        files.devices(),
        begin(-61), sample(-59, -60), older,  # an older training
        begin(-30), sample(-29, None),  # an attempt that broke before it began
        begin(-1), sample(-0.5, None), failed, sample(1, 0),
        begin(5), sample(6, None),  # another one, between two that began
        begin(9), failed, sample(11, 10),
    )  # fmt: skip
    found = read_devices(files, "candidate")
    assert found.tracks[0].minutes.tolist() == [-0.5, 1, 6, 11]
    assert found.restarts == [10]
    assert found.reason == "no answer"


def test_nodes_are_told_apart(files: TrainingFolder) -> None:
    write(files.journal, start(0))
    for node in (0, 1):
        where = {"node": node, "nodes": 2}
        write(files.devices(node), begin(-1), sample(1, 0, device(5, 50.0), **where))
    names = [track.name for track in read_devices(files, "candidate").tracks]
    assert sorted(names) == ["node 0: 5", "node 1: 5"]


def test_a_long_training_is_shown_as_means(files: TrainingFolder) -> None:
    write(files.journal, start(0))
    taken = [sample(n / 10, 0, device(0, 100.0 * (n % 2))) for n in range(6001)]
    write(files.devices(), begin(-1), *taken)
    (track,) = read_devices(files, "candidate").tracks
    assert len(track.minutes) == 600
    assert track.columns["utilization_percent"] == pytest.approx(50, abs=6)
    assert np.all(np.diff(track.minutes) > 0) and 0 <= track.minutes[0] < track.minutes[-1] <= 600
    assert track.columns["memory_used_mib"].tolist() == [40 * MIB] * 600


def test_no_samples_no_tracks(files: TrainingFolder) -> None:
    assert read_devices(files, "candidate").tracks == []
    write(files.journal, start(0))
    write(files.devices(), begin(-5), sample(-4, None))
    found = read_devices(files, "candidate")
    assert found.tracks == [] and device_rows([found]).empty
    assert list(device_rows([found]).columns) == ["training", "device", "minutes", *COLUMNS]


def texts(figure: Any) -> list[str]:
    return [row._suptitle.get_text() for row in figure.subfigs]


def lines(axes: Any) -> dict[str, list[float]]:
    """Label → values of the lines over time."""
    return {
        line.get_label(): list(line.get_ydata())
        for line in axes.lines
        if not line.get_label().startswith(("_", "start", "capacity"))
    }


def test_each_training_has_a_panel_for_utilisation_and_one_for_memory(
    files: TrainingFolder, folder: RunFolder, tmp_path: Path
) -> None:
    write(files.journal, start(0), start(3, first_step=5))
    write(
        files.devices(), begin(-1), sample(1, 0, device(0, 80.0), device(1, 90.0)),
        sample(2, 0, device(0, 85.0), device(1, 95.0)),
    )  # fmt: skip
    other = folder.training("reference")
    figure = device_figure([read_devices(files, "candidate: a"), read_devices(other, "reference")])
    assert texts(figure) == ["candidate: a", "reference"]
    left, right = figure.subfigs[0].axes
    assert lines(left) == {"0": [80, 85], "1": [90, 95]}
    assert lines(right) == {"0": [40, 40], "1": [40, 40]}  # GiB
    assert (left.get_ylabel(), right.get_ylabel()) == ("utilisation (%)", "memory in use (GiB)")
    assert right.get_legend().get_title().get_text() == "device"
    labels = [text.get_text() for text in right.get_legend().get_texts()]
    assert labels == ["0", "1", "start of training", "capacity: 64 GiB"]
    starts = [line.get_xdata()[0] for line in left.lines if line.get_color() == "#6B6B6B"]
    assert starts == [0, 3]
    colors = {line.get_color() for line in left.lines if line.get_label() in ("0", "1")}
    assert len(colors) == 2
    (note,) = [text.get_text() for text in figure.subfigs[1].axes[0].texts]
    assert "no sample was taken" in note
    png, _ = save_figure(figure, tmp_path / "devices")
    assert png.stat().st_size > 10_000


def test_many_devices_are_a_range(files: TrainingFolder) -> None:
    write(files.journal, start(0))
    for node in (0, 1):
        devices = [device(n, 10.0 * n + node) for n in range(8)]
        where = {"node": node, "nodes": 2}
        taken = [sample(m + node / 10, 0, *devices, **where) for m in range(3)]
        write(files.devices(node), begin(-1), *taken)
    figure = device_figure([read_devices(files, "candidate")])
    left, _ = figure.subfigs[0].axes
    assert lines(left) == {"median": [35.5, 35.5, 35.5]}
    (band,) = left.collections
    assert band.get_label() == "lowest to highest of 16"
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0, 71)


def test_why_something_is_missing_is_below_the_panels(files: TrainingFolder) -> None:
    write(files.journal, start(0))
    failed = {"event": "device_sample_failed", "time": T0, "reason": "npu-smi: not there " * 30}
    write(files.devices(), begin(-1), failed, sample(1, 0))
    (row,) = device_figure([read_devices(files, "candidate")]).subfigs
    said = row._supxlabel.get_text()
    assert said.startswith("npu-smi: not there") and said.endswith("[...]") and len(said) < 320
