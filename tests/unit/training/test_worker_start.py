"""What a training's `start` event says of its devices."""

from pathlib import Path
from typing import Any

import pytest

from internlm_lib.devices import select_device
from internlm_lib.experiment.load import load_experiment
from internlm_lib.training.worker import _start


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, (2, 2)),
        ({"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"}, (2, 1)),
        ({"LOCAL_SIZE": "1", "WORLD_SIZE": "2"}, (2, 1)),  # DeepSpeed's launcher
        ({}, (2, 2)),
    ],
)
def test_devices_are_counted_as_the_rates_per_device_count_them(
    environment: dict[str, str],
    devices: tuple[int, int],
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _, experiment = load_experiment(repository / "params" / "tiny.yaml")
    device = select_device("cpu")
    start: dict[str, Any] = _start(
        "candidate", experiment, experiment.layout("candidate"), device, None, {},
        tmp_path / "no tokenizer",
    )  # fmt: skip
    assert (start["device_count"], start["devices_per_node"]) == devices
    assert start["device_count"] == start["world_size"]
    assert start["device_name"] == device.description()
