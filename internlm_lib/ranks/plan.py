"""The launch plan of a parallel job: made once, then started here or written out per launcher."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from internlm_lib.errors import InputError
from internlm_lib.ranks.cluster import Cluster
from internlm_lib.ranks.environment import rank_environment
from internlm_lib.ranks.rank_table import VARIABLE as RANK_TABLE_VARIABLE
from internlm_lib.run_folder import RunFolder

LOGS_VARIABLE = "INTERNLM_RANK_LOGS"

DEFAULT_PORT = 29500
"""torchrun's and DeepSpeed's own default."""
DEFAULT_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class LaunchPlan:
    """Which ranks run where, and what; `plan_ranks` makes one and checks it."""

    module: str
    """Run as a program, `python -m module FOLDER ARGUMENTS…`, it calls `ranks.rank.rank_main`."""
    folder: RunFolder
    arguments: tuple[str, ...]
    ranks_per_node: int
    hosts: tuple[str, ...]
    """One name or address per node; the first is where ranks meet."""
    master_port: int
    """0 on a single node: a free one is taken."""
    logs: Path
    environment: Mapping[str, str]
    grace_seconds: float = DEFAULT_GRACE_SECONDS
    """How long ranks may take to end by themselves after SIGTERM."""
    cluster: Cluster | None = None
    """What the nodes were taken from, if not from a person alone."""
    device: str | None = None
    """`npu`, `cuda` or `cpu`; None if that is not known."""

    @property
    def nnodes(self) -> int:
        return len(self.hosts)

    @property
    def world_size(self) -> int:
        return self.nnodes * self.ranks_per_node

    def ranks_of(self, node_rank: int) -> range:
        """The ranks that run on a node; nodes are filled one after the other."""
        return range(node_rank * self.ranks_per_node, (node_rank + 1) * self.ranks_per_node)

    def launcher_log(self, node_rank: int) -> Path:
        """What torchrun itself says, on one node."""
        return self.logs / (f"launcher{node_rank}.log" if node_rank else "launcher.log")

    def program(self) -> list[str]:
        """The module, and what it is given."""
        return [self.module, str(self.folder.path), *self.arguments]

    def torchrun_options(self) -> list[str]:
        """The start of a node's command, up to where ranks meet.

        torchrun kills ranks some time after it has passed SIGTERM on, by default after 30 s: it
        gets the plan's time instead.
        """
        return [
            sys.executable, "-m", "torch.distributed.run",
            f"--nnodes={self.nnodes}", f"--nproc-per-node={self.ranks_per_node}",
            "--max-restarts=0", f"--shutdown-timeout={math.ceil(self.grace_seconds)}",
        ]  # fmt: skip

    def torchrun(self, node_rank: int) -> list[str]:
        """The command that starts one node's ranks.

        Several nodes meet by torchrun's static rendezvous, which gives node R the ranks
        `ranks_of(R)`; c10d would number nodes in the order in which they come.
        """
        if self.nnodes == 1:
            meeting = [
                "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"
            ]  # fmt: skip
        else:
            meeting = [
                f"--master-addr={self.hosts[0]}", f"--master-port={self.master_port}",
                f"--node-rank={node_rank}",
            ]  # fmt: skip
        return [*self.torchrun_options(), *meeting, "-m", *self.program()]


def plan_ranks(
    module: str,
    folder: RunFolder,
    *arguments: str,
    world_size: int,
    logs: Path,
    nnodes: int = 1,
    nproc_per_node: int | None = None,
    hosts: Sequence[str] = (),
    master_addr: str | None = None,
    master_port: int | None = None,
    interface: str | None = None,
    device: str | None = None,
    environment: Mapping[str, str] | None = None,
    grace_seconds: float = DEFAULT_GRACE_SECONDS,
    cluster: Cluster | None = None,
) -> LaunchPlan:
    """Spread `world_size` ranks evenly over nodes.

    Args:
        nproc_per_node: ranks of each node; by default what the number of nodes leaves.
        hosts: names of the nodes in rank order; by default `HOST_0` …, for a person to fill in.
        master_addr: address of the first node, if it is not to be found under its name.
        interface: network interface between the nodes, e.g. `eth0`.
        device: `npu`, `cuda` or `cpu`, for its environment variables.
        cluster: what the nodes were taken from.
        environment: values for these, in place of the kit's; what the shell has set wins.
    Raises:
        InputError: the nodes do not fit the ranks, each other, the names given, or have too few
            devices; or a variable may not have its value.
    """
    per_node = _ranks_per_node(world_size, nnodes, nproc_per_node)
    if cluster and device in ("npu", "cuda"):
        cluster.check_devices(per_node)
    if hosts and len(hosts) != nnodes:
        raise InputError(
            f"--hosts names {len(hosts)} ({', '.join(hosts)}), --nnodes says {nnodes}; name each "
            "node once, in rank order"
        )
    if repeated := sorted({host for host in hosts if hosts.count(host) > 1}):
        raise InputError(f"--hosts names {', '.join(repeated)} more than once; a node runs once")
    names = list(hosts) or [f"HOST_{node}" for node in range(nnodes)]
    names[0] = master_addr or names[0]
    return LaunchPlan(
        module=module,
        folder=folder,
        arguments=arguments,
        ranks_per_node=per_node,
        hosts=tuple(names),
        master_port=0 if nnodes == 1 else _port(master_port),
        logs=logs,
        environment={
            **rank_environment(device, per_node, interface, environment),
            **_rank_table(cluster, device),
            LOGS_VARIABLE: str(logs),
        },
        grace_seconds=grace_seconds,
        cluster=cluster,
        device=device,
    )


def _rank_table(cluster: Cluster | None, device: str | None) -> dict[str, str]:
    """The table for NPU ranks: the one that the plan follows, or none.

    torch_npu connects ranks by any table it finds in the environment, also by one of other ranks.
    Empty, it connects them by root info. Source: torch_npu, ProcessGroupHCCL::createHCCLCommEx.
    """
    if device == "npu" and cluster and cluster.rank_table:
        return {RANK_TABLE_VARIABLE: str(cluster.rank_table)}
    return {RANK_TABLE_VARIABLE: ""} if os.environ.get(RANK_TABLE_VARIABLE) else {}


def _ranks_per_node(world_size: int, nnodes: int, nproc_per_node: int | None) -> int:
    """Raises InputError, naming the nodes that would do, unless all get the same number."""
    per_node = nproc_per_node or world_size // max(nnodes, 1)
    if nnodes >= 1 and nnodes * per_node == world_size:
        return per_node
    asked = f"{nnodes} nodes" + (f" × {nproc_per_node} ranks" if nproc_per_node else "")
    fitting = ", ".join(f"{n} × {world_size // n}" for n in _divisors(world_size))
    raise InputError(
        f"--nnodes: {asked} cannot hold exactly {world_size} ranks (tensor × pipeline × data "
        f"parallel size), the same number on each; nodes × ranks that fit: {fitting}. Choose one, "
        "or change the layout"
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _port(port: int | None) -> int:
    if port is None:
        return DEFAULT_PORT
    if not 1 <= port <= 65535:
        raise InputError(
            f"--master-port {port}: nodes cannot meet there; give one from 1 to 65535 that is free "
            "on the first node"
        )
    return port
