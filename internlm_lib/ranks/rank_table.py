"""HCCL's rank table: which NPU of which server is which rank. Read, and held against the plan.

Sources: CANN, HCCL user guide, "Rank Table Configuration" (hcclug_000066 to 000068: template 1 with
version 1.0 for Atlas training and A2, 1.2 for A3; template 2 for Atlas training only); MindCluster,
"hccl.json File Description" (host_ip, container_ip; version 2.0 of the Atlas 350, 850 and 950,
which lists no servers, and is refused here). Template 2 is read as CANN's own tests write it: one
device and one rank_id per instance; its page was not at hand to confirm that.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from internlm_lib.errors import InputError

VARIABLE = "RANK_TABLE_FILE"

# What ModelArts' SDK looks for where the variable names a folder.
_NAME_IN_FOLDER = "jobstart_hccl.json"
_VERSIONS = ("1.0", "1.2")
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Server:
    """One node of a table."""

    server_id: str
    """An address, or any name that is unique in the table."""
    devices: tuple[int, ...]
    """Physical NPU ids in the order of their ranks."""
    host_ip: str = ""
    container_ip: str = ""

    @property
    def address(self) -> str:
        """Where the ranks of this node are reached; a pod has an address of its own."""
        return self.container_ip or self.host_ip or self.server_id


@dataclass(frozen=True)
class RankTable:
    """Servers in rank order, each with as many devices: what `LaunchPlan.ranks_of` expects."""

    path: Path
    servers: tuple[Server, ...]

    @property
    def ranks_per_server(self) -> int:
        return len(self.servers[0].devices)

    def find(self, names: Iterable[str]) -> int | None:
        """Number of the server that is known by one of these names and addresses.

        A pod's own address counts before its host's, which other pods may share. None if no server,
        or more than one, is.
        """
        names = frozenset(names)
        for field in ("container_ip", "server_id", "host_ip"):
            mine = [i for i, server in enumerate(self.servers) if getattr(server, field) in names]
            if len(mine) == 1:
                return mine[0]
        return 0 if len(self.servers) == 1 else None


def read_rank_table(path: Path) -> RankTable:
    """Read and check a table; of a folder, ModelArts' file in it.

    Raises InputError that names file and field unless it is complete and its ranks 0 … n - 1 fill
    the servers one after the other, each with the same number, devices in ascending order.
    """
    try:
        if path.is_dir():
            path /= _NAME_IN_FOLDER
        values = json.loads(path.read_text(encoding="utf-8"))
        return RankTable(path, _servers(values))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{VARIABLE}={path}: {_said(error)}. Write the table anew; or unset {VARIABLE}: HCCL "
            "then finds its devices itself, and the nodes come from other variables or options"
        ) from error


class _Device(BaseModel):
    device_id: int = Field(ge=0)
    rank_id: int = Field(ge=0)


class _Server(BaseModel):
    server_id: str = Field(min_length=1)
    host_ip: str = ""
    container_ip: str = ""
    device: list[_Device] = Field(min_length=1)


class _ServerName(BaseModel):
    server_id: str


class _SuperPod(BaseModel):
    server_list: list[_ServerName]


class _Template1(BaseModel):
    server_count: int
    server_list: list[_Server] = Field(min_length=1)
    super_pod_list: list[_SuperPod] | None = None


class _InstanceDevice(BaseModel):
    device_id: int = Field(ge=0)


class _Instance(BaseModel):
    rank_id: int = Field(ge=0)
    server_id: str = Field(min_length=1)
    devices: list[_InstanceDevice] = Field(min_length=1, max_length=1)


class _Group(BaseModel):
    instance_list: list[_Instance] = Field(min_length=1)


class _Template2(BaseModel):
    group_list: list[_Group] = Field(min_length=1)


@dataclass(frozen=True)
class _Rank:
    rank_id: int
    device_id: int
    server_id: str
    where: str
    """Its place in the file."""


def _servers(values: Any) -> tuple[Server, ...]:
    """Raises ValueError, naming the field."""
    _check_head(values)
    if "group_list" in values:
        ranks, addresses = _ranks_of_template_2(_Template2.model_validate(values)), {}
    else:
        table = _Template1.model_validate(values)
        _check_servers(table)
        ranks = _ranks_of_template_1(table)
        addresses = {server.server_id: server for server in table.server_list}
    return tuple(
        Server(
            name,
            devices,
            addresses[name].host_ip if name in addresses else "",
            addresses[name].container_ip if name in addresses else "",
        )
        for name, devices in _devices_by_server(ranks).items()
    )


def _check_head(values: Any) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"a JSON object is expected, not {type(values).__name__}")
    if "server_group_list" in values:
        raise ValueError("server_group_list: this is the global table of several jobs, not of one")
    if (status := values.get("status")) != "completed":
        raise ValueError(
            f"status = {status!r}: it must be 'completed'; a table that is 'initializing' is still "
            "being written: start again once it is done"
        )
    if "group_list" not in values and (version := values.get("version")) not in _VERSIONS:
        raise ValueError(f"version = {version!r}: {' and '.join(_VERSIONS)} can be read")


def _check_servers(table: _Template1) -> None:
    names = [server.server_id for server in table.server_list]
    if table.server_count != len(names):
        raise ValueError(
            f"server_count = {table.server_count}, but server_list holds {len(names)} servers"
        )
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"server_list[{i}].server_id = {name!r} is there twice")
    if table.super_pod_list is not None:
        pods = [server.server_id for pod in table.super_pod_list for server in pod.server_list]
        if sorted(pods) != sorted(names):
            raise ValueError(
                f"super_pod_list names {', '.join(pods) or 'none'}, server_list "
                f"{', '.join(names)}; every server belongs to one super pod"
            )


def _ranks_of_template_1(table: _Template1) -> list[_Rank]:
    return [
        _Rank(device.rank_id, device.device_id, server.server_id, f"server_list[{i}].device[{j}]")
        for i, server in enumerate(table.server_list)
        for j, device in enumerate(server.device)
    ]


def _ranks_of_template_2(table: _Template2) -> list[_Rank]:
    return [
        _Rank(one.rank_id, one.devices[0].device_id, one.server_id,
              f"group_list[{i}].instance_list[{j}]")
        for i, group in enumerate(table.group_list)
        for j, one in enumerate(group.instance_list)
    ]  # fmt: skip


def _devices_by_server(ranks: list[_Rank]) -> dict[str, tuple[int, ...]]:
    """Server's id → its devices, in rank order; raises ValueError unless the plan can be so."""
    ranks = sorted(ranks, key=lambda rank: rank.rank_id)
    for expected, rank in enumerate(ranks):
        if rank.rank_id != expected:
            wrong = "is there twice" if rank.rank_id < expected else f"follows {expected - 1}"
            raise ValueError(
                f"{rank.where}.rank_id = {rank.rank_id} {wrong}; the {len(ranks)} devices need the "
                f"ranks 0 to {len(ranks) - 1}, each once"
            )
    servers: dict[str, list[_Rank]] = {}
    for rank in ranks:
        servers.setdefault(rank.server_id, []).append(rank)
    sizes = {name: len(held) for name, held in servers.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"servers hold different numbers of devices: {sizes}; all need as many")
    for name, held in servers.items():
        _check_order(name, held)
    return {name: tuple(rank.device_id for rank in held) for name, held in servers.items()}


def _check_order(server: str, held: list[_Rank]) -> None:
    """`held`: in rank order."""
    for before, after in pairwise(held):
        if after.rank_id != before.rank_id + 1:
            raise ValueError(
                f"{after.where}.rank_id = {after.rank_id}: server {server} also holds rank "
                f"{before.rank_id}, and other servers those between; ranks must fill one server "
                "after the other"
            )
        if after.device_id <= before.device_id:
            raise ValueError(
                f"{after.where}.device_id = {after.device_id} of rank {after.rank_id}, but rank "
                f"{before.rank_id} has {before.device_id}; devices of a server must ascend with "
                "the ranks, as a node's local ranks do"
            )


def _said(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problems = error.errors(include_url=False)
        shown = [f"{_place(p['loc'])}: {p['msg']}" for p in problems[:_SHOWN_PROBLEMS]]
        more = len(problems) - len(shown)
        return "; ".join([*shown, *([f"and {more} more"] if more else [])])
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError):
        return f"not JSON: {error}"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _place(location: tuple[int | str, ...]) -> str:
    """`("server_list", 0, "device")` → `server_list[0].device`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).lstrip(".")
