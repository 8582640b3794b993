"""What each cluster system says of a job's nodes, in the environment variables of a process.

A reader returns what it found, each fact with the variable that says it, and {} where its system is
not at work. Nothing is compared here: `ranks.cluster` does that.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from internlm_lib.errors import InputError
from internlm_lib.ranks.hostlist import expand_hostlist
from internlm_lib.ranks.rank_table import VARIABLE, read_rank_table

VOLCANO_FOLDER = Path("/etc/volcano")

# Steps above are no tasks of srun: batch scripts, and the shell of an interactive salloc.
# Source: slurm.h, SLURM_MAX_NORMAL_STEP_ID.
_MAX_SLURM_STEP = 0xFFFFFFF0

_IGNORE = "or leave the cluster out with --ignore-cluster"


class Said(NamedTuple):
    value: Any
    source: str
    """The variable, e.g. `SLURM_NODEID`."""


Facts = dict[str, Said]
"""By field of `cluster.Cluster`; `unplaced` says why a node's number is not known."""


def rank_table(environ: Mapping[str, str], me: frozenset[str]) -> Facts:
    """HCCL's rank table, which ModelArts and MindCluster also write. Raises InputError."""
    if not (value := environ.get(VARIABLE, "")):
        return {}
    table = read_rank_table(Path(value))
    source = f"{VARIABLE}={table.path}"
    facts = {
        "nnodes": len(table.servers),
        "nproc_per_node": table.ranks_per_server,
        "hosts": tuple(server.address for server in table.servers),
        "rank_table": table.path,
        "node_rank": table.find(me),
        "unplaced": "none of its servers has a name or an address of this machine",
    }
    return {name: Said(value, source) for name, value in facts.items() if value is not None}


def modelarts(environ: Mapping[str, str], me: frozenset[str]) -> Facts:
    """Huawei Cloud ModelArts; what it shares with Volcano, `volcano` reads.

    Source: ModelArts user guide, "Managing Environment Variables of a Training Container".
    """
    nnodes = _number(environ, "MA_NUM_HOSTS", least=1)
    return _facts(
        nnodes=nnodes,
        devices_per_node=_number(environ, "MA_NUM_GPUS") if nnodes else None,
        # "VC_TASK_INDEX … has no meaning if there is one container."
        node_rank=Said(0, nnodes.source) if nnodes and nnodes.value == 1 else None,
    )


def mindcluster(environ: Mapping[str, str], me: frozenset[str]) -> Facts:
    """Ascend Operator, for jobs of PyTorch: RANK is the pod's number, WORLD_SIZE counts NPUs.

    In a rank that torchrun started these names mean something else. Source: MindCluster,
    "Environment Variables Injected by Ascend Operator".
    """
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    if "MINDX_TASK_ID" not in environ or "TORCHELASTIC_RUN_ID" in environ:
        return {}
    world, local = (_number(environ, name, least=1) for name in names)
    if world is None or local is None:
        return {}
    if world.value % local.value:
        raise InputError(
            f"WORLD_SIZE={world.value} is no multiple of LOCAL_WORLD_SIZE={local.value}: pods need "
            f"the same number of NPUs; correct the job, {_IGNORE}"
        )
    return _facts(
        nnodes=Said(world.value // local.value, "WORLD_SIZE / LOCAL_WORLD_SIZE"),
        devices_per_node=local,
        node_rank=_number(environ, "RANK"),
    )


def volcano(environ: Mapping[str, str], me: frozenset[str], folder: Path = VOLCANO_FOLDER) -> Facts:
    """Volcano's plugins env (VC_TASK_INDEX), svc (VC_<TASK>_HOSTS, or files) and pytorch (RANK).

    Sources: volcano-sh/volcano, pkg/controllers/job/plugins/{env,svc,distributed-framework}.
    """
    index = _number(environ, "VC_TASK_INDEX") or _number(environ, "VK_TASK_INDEX")
    tasks = _hosts_in_variables(environ) or (_hosts_in_files(folder) if index else {})
    if not tasks:
        return {}
    chosen = _training_tasks(tasks, environ.get("MA_TASK_NAME", ""))
    source = ", ".join(task.source for task in chosen)
    hosts: tuple[str, ...] = sum((task.value for task in chosen), ())
    node: Said | None
    if len(hosts) == 1:
        node = Said(0, source)
    elif len(chosen) == 1:
        node = index or _by_name(hosts, me)
    else:  # the index counts within a task
        node = _by_name(hosts, me) or _pytorch_rank(environ, len(hosts))
    return _facts(
        nnodes=Said(len(hosts), source),
        hosts=Said(hosts, source),
        node_rank=node,
        unplaced=Said("no VC_TASK_INDEX says which pod this is: give the job the env plugin", ""),
    )


def slurm(environ: Mapping[str, str], me: frozenset[str]) -> Facts:
    """A Slurm allocation; which node this is, only in a task of srun. Raises InputError.

    Source: man srun, "OUTPUT ENVIRONMENT VARIABLES". That SLURM_GPUS_ON_NODE counts the GPUs of the
    job on a node is how published scripts use it; its own text was not at hand.
    """
    step = _number(environ, "SLURM_STEP_ID") or _number(environ, "SLURM_STEPID")
    task = step is not None and step.value < _MAX_SLURM_STEP
    scope = "SLURM_STEP" if task else "SLURM_JOB"
    nnodes = _number(environ, f"{scope}_NUM_NODES", least=1)
    if nnodes is None and not task:
        nnodes = _number(environ, "SLURM_NNODES", least=1)
    if nnodes is None:
        return {}
    if task:
        _check_tasks(environ, nnodes)
        node = _number(environ, "SLURM_NODEID")
    else:
        node = Said(0, nnodes.source) if nnodes.value == 1 else None
    return _facts(
        nnodes=nnodes,
        hosts=_slurm_hosts(environ, f"{scope}_NODELIST", nnodes),
        node_rank=node,
        devices_per_node=_number(environ, "SLURM_GPUS_ON_NODE"),
        unplaced=Said(
            "this is no task of srun: start `internlm launch` once per node, with srun "
            "--ntasks-per-node=1",
            "",
        ),
    )


def torchrun_names(environ: Mapping[str, str], prefix: str) -> Facts:
    """What torchrun's options are called in capitals, as job scripts export them.

    With the prefix `PET_` torchrun reads them itself, and Kubeflow's Trainer sets them. Sources:
    torch/distributed/argparse_util.py; kubeflow/trainer, pkg/constants. Raises InputError.
    """
    address, port = (environ.get(f"{prefix}{name}", "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    per_node = f"{prefix}NPROC_PER_NODE"
    # torchrun also takes words there, which leave it to the devices.
    words = environ.get(per_node) in ("auto", "gpu", "cpu", "npu", "xpu")
    return _facts(
        nnodes=_nnodes(environ, f"{prefix}NNODES"),
        node_rank=_number(environ, f"{prefix}NODE_RANK"),
        nproc_per_node=None if words else _number(environ, per_node, least=1),
        master_addr=Said(address, f"{prefix}MASTER_ADDR") if address else None,
        master_port=_number(environ, f"{prefix}MASTER_PORT") if port else None,
    )


def pet_names(environ: Mapping[str, str], me: frozenset[str]) -> Facts:
    return torchrun_names(environ, "PET_")


def plain_names(environ: Mapping[str, str], me: frozenset[str]) -> Facts:
    return torchrun_names(environ, "")


def _facts(**said: Said | None) -> Facts:
    return {name: value for name, value in said.items() if value is not None}


def _number(environ: Mapping[str, str], name: str, least: int = 0) -> Said | None:
    text = environ.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
        raise InputError(
            f"{name}={text!r}: a whole number from {least} is expected; correct or unset it, "
            f"{_IGNORE}"
        )
    return Said(int(text), name)


def _nnodes(environ: Mapping[str, str], name: str) -> Said | None:
    """torchrun's `2` or `2:2`; raises InputError for `1:4`, nodes that come and go."""
    text = environ.get(name, "")
    least, colon, most = text.partition(":")
    if colon and least != most:
        raise InputError(
            f"{name}={text!r}: a number of nodes that changes; a layout needs a fixed one. Set it, "
            f"{_IGNORE}"
        )
    return _number({name: least}, name, least=1)


def _hosts_in_variables(environ: Mapping[str, str]) -> dict[str, Said]:
    """Task's name, in lower case → its hosts; raises InputError if their number is not VC_…_NUM."""
    tasks = {}
    for name, value in environ.items():
        if (match := re.fullmatch(r"VC_(\w+)_HOSTS", name)) and value:
            hosts = tuple(value.split(","))
            count = _number(environ, f"VC_{match[1]}_NUM")
            if count and count.value != len(hosts):
                raise InputError(
                    f"{name} names {len(hosts)} ({value}), {count.source} says {count.value}; "
                    f"correct them, {_IGNORE}"
                )
            tasks[match[1].lower()] = Said(hosts, name)
    return tasks


def _hosts_in_files(folder: Path) -> dict[str, Said]:
    """The same where the svc plugin runs with --inject-hosts-env=false."""
    return {
        file.stem.lower(): Said(tuple(file.read_text().split()), str(file))
        for file in sorted(folder.glob("*.host"))
    }


def _training_tasks(tasks: Mapping[str, Said], own: str) -> list[Said]:
    """The hosts that train, task by task in rank order.

    Of several tasks this pod's own, if ModelArts says it; else those of the pytorch plugin, master
    first. Raises InputError if it is neither.
    """
    own = own.lower().replace("-", "_")
    if len(tasks) == 1 or own in tasks:
        return [tasks[own]] if own in tasks else list(tasks.values())
    if tasks.keys() == {"master", "worker"}:
        return [tasks["master"], tasks["worker"]]
    names = ", ".join(said.source for said in tasks.values())
    raise InputError(
        f"{names}: of these tasks it is not known which train; master and worker would be. Use "
        "--ignore-cluster, and --nnodes, --master-addr, --node-rank"
    )


def _by_name(hosts: tuple[str, ...], me: frozenset[str]) -> Said | None:
    """The svc plugin makes a pod's name the first label of its host name."""
    mine = [i for i, host in enumerate(hosts) if me & {host, host.partition(".")[0]}]
    return Said(mine[0], "the pod's name") if len(mine) == 1 else None


def _pytorch_rank(environ: Mapping[str, str], nnodes: int) -> Said | None:
    """The pytorch plugin's RANK, a pod's number, where WORLD_SIZE counts pods."""
    world = _number(environ, "WORLD_SIZE")
    return _number(environ, "RANK") if world and world.value == nnodes else None


def _check_tasks(environ: Mapping[str, str], nnodes: Said) -> None:
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS", least=1)
    if tasks and tasks.value != nnodes.value:
        raise InputError(
            f"SLURM_STEP_NUM_TASKS={tasks.value} on {nnodes.value} nodes: one `internlm launch` "
            "starts all ranks of its node; use srun --ntasks-per-node=1"
        )


def _slurm_hosts(environ: Mapping[str, str], name: str, nnodes: Said) -> Said | None:
    if not (text := environ.get(name, "")):
        return None
    hosts = expand_hostlist(text)
    if len(hosts) != nnodes.value:
        raise InputError(
            f"{name}={text!r} is read as {len(hosts)} hosts, {nnodes.source} says {nnodes.value}; "
            "use --ignore-cluster, and --nnodes, --hosts, --node-rank"
        )
    return Said(tuple(hosts), name)
