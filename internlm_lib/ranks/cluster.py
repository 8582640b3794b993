"""The nodes of the job that this process is part of, as the cluster's own variables say it.

Precedence: the rank table, then what the platform sets (ModelArts, MindCluster, Volcano, Slurm),
then torchrun's names with and without `PET_`. It decides between names of the same host only:
numbers that differ are refused.
"""

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil

from internlm_lib.errors import InputError
from internlm_lib.ranks import schedulers
from internlm_lib.ranks.rank_table import VARIABLE
from internlm_lib.ranks.schedulers import Facts, Said

Reader = Callable[[Mapping[str, str], frozenset[str]], Facts]

READERS: tuple[Reader, ...] = (
    schedulers.rank_table,
    schedulers.modelarts,
    schedulers.mindcluster,
    schedulers.volcano,
    schedulers.slurm,
    schedulers.pet_names,
    schedulers.plain_names,
)

# Under which a rank table may list this machine. Sources: MindCluster, environment variables
# (POD_IP, POD_UID, XDL_IP, HOST_IP); ModelArts, environment variables of a training container
# (MA_CURRENT_IP) and its SDK (MA_CURRENT_HOST_IP).
_NAMES_OF_ME = ("POD_IP", "POD_UID", "XDL_IP", "HOST_IP", "MA_CURRENT_IP", "MA_CURRENT_HOST_IP")

_COMPARED = ("nnodes", "node_rank", "nproc_per_node")
_WAY_OUT = "leave it out, unset the variable, or use --ignore-cluster, so that only options count"


@dataclass(frozen=True)
class Cluster:
    """What is known of a job's nodes."""

    nnodes: int
    sources: Mapping[str, str]
    """Field → the variable it was taken from."""
    node_rank: int | None = None
    """This machine's number; None if nothing says it, and `unplaced` why."""
    unplaced: str = ""
    nproc_per_node: int | None = None
    """Ranks of each node, exactly."""
    devices_per_node: int | None = None
    """NPUs or GPUs of each node: no more ranks than that."""
    hosts: tuple[str, ...] = ()
    """In rank order; empty if they are only counted."""
    master_addr: str | None = None
    master_port: int | None = None
    rank_table: Path | None = None

    def __post_init__(self) -> None:
        """Raises InputError if what is known of the nodes does not fit together."""
        if self.node_rank is not None and self.node_rank >= self.nnodes:
            raise InputError(
                f"{self.sources['node_rank']} says that this is node {self.node_rank}, counted "
                f"from 0, but {self.sources['nnodes']} says {self.nnodes} nodes: {_WAY_OUT}"
            )
        self._check_master(self.master_addr, f"{self.sources.get('master_addr')}=")

    def summary(self) -> str:
        """One line: how many nodes, from where, and which one this is."""
        size = f"{self.nnodes} node{'s' if self.nnodes > 1 else ''}"
        if self.nproc_per_node:
            size += f" × {self.nproc_per_node}"
        elif self.devices_per_node:
            size += f", {self.devices_per_node} devices each,"
        names = [self.sources[key] for key in (*_COMPARED, "devices_per_node", "master_addr")
                 if key in self.sources]  # fmt: skip
        if self.node_rank is None:
            here = self.unplaced or "it is not said which one this is"
        else:
            host = f" ({self.hosts[self.node_rank]})" if self.hosts else ""
            here = f"this is node {self.node_rank}{host}"
        return f"{size} from {', '.join(dict.fromkeys(names))}; {here}"

    def notes(self, device: str, first_host: str) -> list[str]:
        """What a person has to know before ranks start on `device` and meet at `first_host`."""
        if self.rank_table is None:
            return []
        notes = [
            f"{VARIABLE} says where ranks are placed; {_connected_by(self.rank_table, device)}"
        ]
        if self.nnodes > 1 and not _is_address(first_host):
            notes.append(
                f"ranks meet at {first_host}: every node must be able to resolve that name of the "
                "rank table; otherwise give --master-addr"
            )
        return notes

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def settle(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the command line, with what they leave open filled in.

        Args:
            options: named as the fields, or unknown here; None or empty where nothing is given.
        Raises:
            InputError: an option contradicts the cluster. Names of hosts may differ, if they are as
                many, and none is another node's.
        """
        for key in _COMPARED:
            given, found = options[key], getattr(self, key)
            if None not in (given, found) and given != found:
                raise InputError(
                    f"{_option(key)} {given}, but {self.sources[key]} says {found}: {_WAY_OUT}"
                )
        self._check_hosts(options["hosts"])
        self._check_master(options["master_addr"], "--master-addr ")
        return {
            name: getattr(self, name, None) if given in (None, ()) else given
            for name, given in options.items()
        }

    def check_devices(self, ranks_per_node: int) -> None:
        """Raises InputError if a node has fewer devices than a plan has ranks for it."""
        if self.devices_per_node is not None and ranks_per_node > self.devices_per_node:
            raise InputError(
                f"{self.sources['devices_per_node']} says that a node has {self.devices_per_node} "
                f"devices, the layout needs {ranks_per_node} ranks on each of its nodes; change "
                "the layout, or ask the cluster for more"
            )

    def _check_hosts(self, hosts: Sequence[str]) -> None:
        if hosts and len(hosts) != self.nnodes:
            raise InputError(
                f"--hosts names {len(hosts)} ({', '.join(hosts)}), but {self.sources['nnodes']} "
                f"says {self.nnodes} nodes: {_WAY_OUT}"
            )
        for node, host in enumerate(hosts):
            if host in self.hosts and self.hosts[node] != host:
                raise InputError(
                    f"--hosts has {host} as node {node}, but {self.sources['hosts']} as node "
                    f"{self.hosts.index(host)} ({', '.join(self.hosts)}): {_WAY_OUT}"
                )

    def _check_master(self, address: str | None, source: str) -> None:
        """Ranks meet at the first node, and several nodes at no loopback address."""
        if address in self.hosts[1:]:
            raise InputError(
                f"{source}{address}, but {self.sources['hosts']} has it as node "
                f"{self.hosts.index(str(address))}; ranks meet at node 0, {self.hosts[0]}: "
                f"{_WAY_OUT}"
            )
        if address and self.nnodes > 1 and _is_loopback(address):
            raise InputError(
                f"{source}{address}, but {self.sources['nnodes']} says {self.nnodes} nodes, which "
                f"do not meet there; give the first one's address: {_WAY_OUT}"
            )


def cluster_from_environment(
    environ: Mapping[str, str] = os.environ, me: frozenset[str] | None = None
) -> Cluster | None:
    """The cluster that `environ` tells of; None if it does not say how many nodes there are.

    Args:
        me: names and addresses of this machine; by default `names_of_this_machine`.
    Raises:
        InputError: a variable or the rank table is damaged, or two of them contradict each other.
    """
    me = names_of_this_machine(environ) if me is None else me
    facts = _merged([read(environ, me) for read in READERS])
    if "nnodes" not in facts:
        return None
    return Cluster(
        sources={name: said.source for name, said in facts.items() if said.source},
        **{name: said.value for name, said in facts.items()},
    )


def names_of_this_machine(environ: Mapping[str, str]) -> frozenset[str]:
    """Its host name, with and without domain, its addresses, and what the cluster calls it."""
    host = socket.gethostname()
    addresses = [
        address.address.partition("%")[0]  # fe80::1%eth0
        for interface in psutil.net_if_addrs().values()
        for address in interface
        if address.family in (socket.AF_INET, socket.AF_INET6)
    ]
    said = [environ[name] for name in _NAMES_OF_ME if environ.get(name)]
    return frozenset([host, host.partition(".")[0], *addresses, *said])


def _merged(found: Sequence[Facts]) -> Facts:
    """Of each field the first; raises InputError if numbers differ."""
    merged: Facts = {}
    for facts in found:
        for name, said in facts.items():
            first = merged.setdefault(name, said)
            if name in _COMPARED and first.value != said.value:
                raise InputError(_contradiction(name, first, said))
    return merged


def _contradiction(name: str, one: Said, other: Said) -> str:
    what = {"nnodes": "nodes", "node_rank": "as this node's number",
            "nproc_per_node": "ranks per node"}[name]  # fmt: skip
    table = f" (without {VARIABLE} HCCL finds its devices itself)" if VARIABLE in one.source else ""
    return (
        f"{one.source} says {one.value} {what}, {other.source} says {other.value}; unset the one "
        f"that is wrong{table}, or use --ignore-cluster and give --nnodes, --hosts, --node-rank"
    )


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _connected_by(table: Path, device: str) -> str:
    """Source: torch_npu, `checkFilePathReadable`, which takes no symbolic link."""
    if device != "npu":
        return f"nothing else reads it, as ranks run on {device}"
    if table.is_symlink():
        return "they connect by root info, as torch_npu follows no symbolic link"
    return "they also connect by it, and by root info once it is unset"


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return ip_address(host).is_loopback if _is_address(host) else host == "localhost"
