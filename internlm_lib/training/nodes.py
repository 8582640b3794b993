"""One training on one machine or many: its launch plan, its commands, its ranks on this node."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from internlm_lib.data.corpora import recorded_corpora
from internlm_lib.devices import select_device
from internlm_lib.devices.base import check_world_size
from internlm_lib.errors import InputError, MissingStageError
from internlm_lib.experiment.load import load_experiment, save_experiment
from internlm_lib.experiment.schema import Experiment
from internlm_lib.files import write_text
from internlm_lib.ranks import render
from internlm_lib.ranks.cluster import Cluster
from internlm_lib.ranks.plan import LaunchPlan, plan_ranks
from internlm_lib.run_folder import RunFolder
from internlm_lib.training.supervise import follow_ranks
from internlm_lib.weights.start import starting_folder

WORKER = "internlm_lib.training.worker"

GRACE_SECONDS = 60.0
"""How long ranks that are asked to stop may take to finish their step and save."""

_SECONDS_TO_SHARE = 60.0
"""How long a node waits for what the first one writes, before it says that nothing is shared."""
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Nodes:
    """What the command line says of the machines; meanings as in `ranks.plan.plan_ranks`."""

    nnodes: int | None = None
    """None: one, or as many as the cluster has."""
    nproc_per_node: int | None = None
    hosts: tuple[str, ...] = ()
    master_addr: str | None = None
    master_port: int | None = None
    interface: str | None = None

    def within(self, cluster: Cluster | None, node_rank: int | None) -> tuple["Nodes", int | None]:
        """With what is left open taken from the cluster; also this node's number.

        Raises InputError if they contradict each other.
        """
        if cluster is None:
            return self, node_rank
        settled = cluster.settle({**asdict(self), "node_rank": node_rank})
        node_rank = settled.pop("node_rank")
        return replace(self, **settled), node_rank


def device_name(experiment: Experiment) -> str:
    """What the experiment names, or what this machine has: the plan may be made elsewhere."""
    name = experiment.parallel.device
    return select_device().name if name == "auto" else name


def plan_training(
    folder: RunFolder,
    experiment: Experiment,
    role: str,
    nodes: Nodes,
    *options: str,
    cluster: Cluster | None = None,
) -> LaunchPlan:
    """The plan of one training of an experiment.

    Args:
        nodes: settled with the cluster (`Nodes.within`).
        options: of the worker, e.g. `--profile`.
        cluster: what the nodes were taken from.
    Raises:
        InputError: the experiment has no such training, or the nodes do not fit its layout.
    """
    if role not in experiment.roles:
        raise InputError(
            f"--role {role}: this experiment has {', '.join(experiment.roles)}; give one of these, "
            f"or set parallel.{role}"
        )
    try:
        return plan_ranks(
            WORKER,
            folder,
            role,
            *options,
            world_size=experiment.layout(role).world_size,
            logs=folder.training(role).logs,
            device=device_name(experiment),
            environment=experiment.parallel.environment,
            grace_seconds=GRACE_SECONDS,
            cluster=cluster,
            **{**asdict(nodes), "nnodes": 1 if nodes.nnodes is None else nodes.nnodes},
        )
    except InputError as error:
        if cluster is None:
            raise
        raise InputError(
            f"{error} (the cluster: {cluster.summary()}; --ignore-cluster leaves it out)"
        ) from error


def write_commands(
    plan: LaunchPlan, experiment: Experiment, role: str, format: str | None = None
) -> dict[str, Any]:
    """Write out the plan for every launcher, or one, and the experiment that the ranks will read.

    Returns:
        `plan`, `notes`, one entry per format, and `text`: all of it for a person.
    Raises:
        InputError: no such format, or one that cannot carry the run's path.
    """
    if format not in (None, *render.FORMATS):
        raise InputError(f"--format {format}: give one of {', '.join(render.FORMATS)}, or none")
    formats = [format] if format else list(render.FORMATS)
    files = plan.folder.training(role).path / "launch"
    notes, made = _notes(plan, experiment, role), {}
    for name in formats:
        try:
            made[name] = _RENDERERS[name](plan, experiment, files)
        except InputError as error:
            if format:
                raise
            notes.append(f"left out, {name}: {error}")
    save_experiment(plan.folder.experiment, plan.folder.name, experiment)
    text = "\n".join([*(f"# {note}" for note in notes), *(m.pop("text") for m in made.values())])
    return {"run": plan.folder.name, "plan": _facts(plan), "notes": notes, **made, "text": text}


def launch_here(
    plan: LaunchPlan,
    experiment: Experiment,
    role: str,
    node_rank: int | None,
    show: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run this node's ranks to their end.

    The first node writes the experiment, the others wait until they see it.

    Args:
        node_rank: which node this is; may be left out if there is one only.
        show: told the latest step, loss, tokens/s and time left, in a line of text.
    Raises:
        InputError: this node's number, its devices or its run folder do not fit the plan.
        MissingStageError: token files or weights are not there.
        WorkerError, StoppedError: as `ranks.launch.launch_node`.
    """
    node = _checked_node(plan, node_rank)
    device = select_device(experiment.parallel.device)
    check_world_size(device, plan.ranks_per_node, "--nproc-per-node")
    if missing := _missing(plan.folder, experiment):
        raise MissingStageError(missing)
    if node == 0:
        save_experiment(plan.folder.experiment, plan.folder.name, experiment)
    else:
        _wait_for_experiment(plan.folder, experiment)
    begin = time.monotonic()
    follow_ranks(plan, experiment, role, show, node)
    return {
        "run": plan.folder.name,
        "role": role,
        "node_rank": node,
        "ranks": list(plan.ranks_of(node)),
        "seconds": time.monotonic() - begin,
        "logs": str(plan.logs),
    }


def _torchrun(plan: LaunchPlan, experiment: Experiment, files: Path) -> dict[str, Any]:
    lines = render.torchrun_lines(plan)
    shown = [
        f"\n## torchrun, node {node} ({host}), ranks {_span(plan.ranks_of(node))}\n{line}"
        for node, (host, line) in enumerate(zip(plan.hosts, lines, strict=True))
    ]
    return {"commands": lines, "text": "\n".join([*shown, ""])}


def _deepspeed(plan: LaunchPlan, experiment: Experiment, files: Path) -> dict[str, Any]:
    hostfile, environment = files / "hostfile", files / "deepspeed_env"
    command = render.deepspeed_command(plan, str(hostfile), str(environment))
    write_text(hostfile, render.deepspeed_hostfile(plan))
    write_text(environment, render.deepspeed_environment(plan))
    text = (
        f"\n## DeepSpeed, on the first node: {hostfile}\n{hostfile.read_text()}"
        f"## {environment}\n{environment.read_text()}## the command\n{command}\n"
    )
    return {"command": command, "hostfile": str(hostfile), "environment": str(environment),
            "text": text}  # fmt: skip


def _slurm(plan: LaunchPlan, experiment: Experiment, files: Path) -> dict[str, Any]:
    plan.logs.mkdir(parents=True, exist_ok=True)  # or Slurm's own log, and the job, are lost
    script = write_text(files / "job.sbatch", render.sbatch_script(plan, device_name(experiment)))
    text = f"\n## Slurm: sbatch --time=… {script}\n{script.read_text()}"
    return {"script": str(script), "text": text}


def _volcano(plan: LaunchPlan, experiment: Experiment, files: Path) -> dict[str, Any]:
    job = write_text(files / "volcano.yaml", render.volcano_job(plan, device_name(experiment)))
    return {"job": str(job), "text": f"\n## Volcano: kubectl create -f {job}\n{job.read_text()}"}


_RENDERERS: dict[str, Callable[[LaunchPlan, Experiment, Path], dict[str, Any]]] = {
    "torchrun": _torchrun,
    "deepspeed": _deepspeed,
    "slurm": _slurm,
    "volcano": _volcano,
}


def _facts(plan: LaunchPlan) -> dict[str, Any]:
    return {
        "world_size": plan.world_size,
        "ranks_per_node": plan.ranks_per_node,
        "hosts": {host: list(plan.ranks_of(node)) for node, host in enumerate(plan.hosts)},
        "environment": dict(plan.environment),
        "folder": str(plan.folder.path),
        "logs": str(plan.logs),
        "cluster": plan.cluster and plan.cluster.facts(),
    }


def _notes(plan: LaunchPlan, experiment: Experiment, role: str) -> list[str]:
    """What a person has to know before the commands are typed."""
    layout, root = experiment.layout(role), plan.folder.root
    notes = [
        f"{layout.label} on {plan.nnodes} × {plan.ranks_per_node} ranks; "
        f"{plan.folder.experiment} is written, every rank reads it",
        f"logs: {plan.logs}",
    ]
    if plan.cluster:
        notes.append(plan.cluster.summary())
        notes += plan.cluster.notes(device_name(experiment), plan.hosts[0])
    if plan.nnodes > 1:
        notes.append(
            f"every node needs {plan.folder.path} and this Python at the same path: a shared file "
            f"system below {root}"
        )
    if any(host == f"HOST_{node}" for node, host in enumerate(plan.hosts)) and plan.nnodes > 1:
        notes.append("put the nodes' names for HOST_0, HOST_1, …, or give --hosts")
    if plan.nnodes > 1 and "GLOO_SOCKET_IFNAME" not in plan.environment:
        notes.append(
            "no --interface: ranks use the one on which a host's name resolves; where that is "
            "loopback they do not find each other"
        )
    if plan.ranks_per_node % layout.tensor_model_parallel_size:
        notes.append(
            f"slow: tensor parallel groups of {layout.tensor_model_parallel_size} do not fit into "
            f"nodes of {plan.ranks_per_node} ranks, so every layer waits for the network"
        )
    if missing := _missing(plan.folder, experiment):
        notes.append(missing)
    return notes


def _missing(folder: RunFolder, experiment: Experiment) -> str:
    """Says what the ranks would not find, and what makes it; "" if all is there."""
    needed = {path: "01_prepare" for path in recorded_corpora(folder).files()}
    needed[starting_folder(folder, experiment.model)] = "02_convert"
    absent = {path: stage for path, stage in needed.items() if not path.exists()}
    if not absent:
        return ""
    stages = ",".join(sorted(set(absent.values())))
    return (
        f"missing: {', '.join(map(str, absent))}; first, on one machine: internlm run PARAMS "
        f"--run-name {folder.name} --only {stages}"
    )


def _checked_node(plan: LaunchPlan, node_rank: int | None) -> int:
    if node_rank is None and plan.nnodes > 1:
        said = f"{plan.cluster.summary()}. " if plan.cluster else ""
        raise InputError(
            f"{said}--node-rank: {plan.nnodes} nodes, and not said which one this is; give 0 to "
            f"{plan.nnodes - 1}, or --dry-run to see the commands for all"
        )
    node = node_rank or 0
    if not 0 <= node < plan.nnodes:
        raise InputError(f"--node-rank {node}: the nodes are 0 to {plan.nnodes - 1}")
    if plan.nnodes > 1 and plan.hosts[0] == "HOST_0":
        raise InputError(
            "--master-addr is missing: give the address of node 0, at which the others reach it"
        )
    return node


def _wait_for_experiment(folder: RunFolder, experiment: Experiment) -> None:
    """Wait until the first node has written this very experiment where this one can read it."""
    deadline = time.monotonic() + _SECONDS_TO_SHARE
    while not (exists := folder.experiment.exists()) or not _holds(folder, experiment):
        if time.monotonic() > deadline:
            found = "another experiment" if exists else "nothing"
            raise InputError(
                f"{folder.experiment}: {found} is there. Node 0 writes it when it is started: "
                "start it with the same params and --set, and let all nodes share this folder"
            )
        time.sleep(_POLL_SECONDS)


def _holds(folder: RunFolder, experiment: Experiment) -> bool:
    return load_experiment(folder.experiment) == (folder.name, experiment)


def _span(ranks: range) -> str:
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
