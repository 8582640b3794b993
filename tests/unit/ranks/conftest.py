"""Rank tables as clusters write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TableWriter = Callable[..., Path]


def template_1(servers: int = 4, devices: int = 8, **changes: Any) -> dict[str, Any]:
    """A2: as Ascend Operator writes it, server i at 10.0.0.i + 1, its pod at 192.168.0.i + 1."""
    return {
        "status": "completed",
        "version": "1.0",
        "server_count": str(servers),
        "server_list": [
            {
                "server_id": f"node-{i}",
                "host_ip": f"10.0.0.{i + 1}",
                "container_ip": f"192.168.0.{i + 1}",
                "hardware_type": "800I-A2-32G",
                "device": [
                    {"device_id": str(d), "device_ip": f"29.{i}.0.{d + 1}",
                     "rank_id": str(i * devices + d)}
                    for d in range(devices)
                ],
            }
            for i in range(servers)
        ],
        **changes,
    }  # fmt: skip


def template_2(servers: int = 2, devices: int = 2) -> dict[str, Any]:
    """The older one: an instance per rank."""
    instances = [
        {"rank_id": str(i * devices + d), "server_id": f"10.0.0.{i + 1}",
         "devices": [{"device_id": str(d), "device_ip": f"29.{i}.0.{d + 1}"}]}
        for i in range(servers)
        for d in range(devices)
    ]  # fmt: skip
    return {
        "status": "completed", "deploy_mode": "lab", "group_count": "1",
        "group_list": [{"group_name": "", "device_num": str(devices), "server_num": str(servers),
                        "instance_count": str(len(instances)), "instance_list": instances}],
    }  # fmt: skip


@pytest.fixture
def write_table(tmp_path: Path) -> TableWriter:
    """Writes a table, by default 4 servers of 8 NPUs; returns its path."""

    def write(table: Any = None, **changes: Any) -> Path:
        path = tmp_path / "hccl.json"
        path.write_text(json.dumps(table if table is not None else template_1(**changes)))
        return path

    return write
