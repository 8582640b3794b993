"""A launch plan written out for the launchers of a cluster: torchrun, DeepSpeed, Slurm, Volcano.

Every text starts the same ranks, in the same order, in the same environment, and needs the run
folder at the same path on every node.
"""

import math
import re
import shlex
import sys
from typing import Any

import yaml

from internlm_lib.devices.cann import AUTOLOAD_VARIABLE
from internlm_lib.errors import InputError
from internlm_lib.ranks.plan import DEFAULT_PORT, LaunchPlan
from internlm_lib.ranks.stopping import stopped_file

FORMATS = ("torchrun", "deepspeed", "slurm", "volcano")

RESOURCES = {"npu": "huawei.com/Ascend910", "cuda": "nvidia.com/gpu"}
"""What Kubernetes calls a device. Sources: MindCluster, vcjob YAML; Kubernetes, "Schedule GPUs"."""

_TO_END_SECONDS = 60
"""What torchrun and Slurm need, once the ranks' grace is over, before the time limit."""
_PLAIN = re.compile(r"[\w@+=:,./-]*", re.ASCII)


def torchrun_lines(plan: LaunchPlan) -> list[str]:
    """One shell command per node, in rank order."""
    enter = shlex.join(["cd", str(plan.folder.root)])
    variables = [f"{name}={value}" for name, value in plan.environment.items()]
    return [
        f"{enter} && {shlex.join(['env', *variables, *plan.torchrun(node)])}"
        for node in range(plan.nnodes)
    ]


def deepspeed_hostfile(plan: LaunchPlan) -> str:
    """One line per node. Source: deepspeed/launcher/runner.py, `_parse_hostfile`."""
    return "".join(f"{host} slots={plan.ranks_per_node}\n" for host in plan.hosts)


def deepspeed_environment(plan: LaunchPlan) -> str:
    """The file whose variables DeepSpeed's launcher sets on every node; it reads NAME=VALUE.

    Raises InputError if a value would not survive pdsh, which hands it to a shell unquoted.
    """
    return "".join(f"{name}={_for_pdsh(name, value)}\n" for name, value in plan.environment.items())


def deepspeed_command(plan: LaunchPlan, hostfile: str, environment: str) -> str:
    """What to type on the first node, which needs ssh without password to all, and pdsh.

    Args:
        hostfile: path of what `deepspeed_hostfile` gives.
        environment: path of what `deepspeed_environment` gives.
    Raises:
        InputError: as `deepspeed_environment`.
    """
    _for_pdsh("the project's folder", str(plan.folder.root))
    for argument in plan.program():
        _for_pdsh("an argument", argument)
    command = [
        "env", f"DS_ENV_FILE={environment}",
        # The launcher imports torch, on a node that may lack what the others have.
        f"{AUTOLOAD_VARIABLE}={plan.environment[AUTOLOAD_VARIABLE]}",
        sys.executable, "-m", "deepspeed.launcher.runner",
        f"--hostfile={hostfile}", f"--master_addr={plan.hosts[0]}",
        *([f"--master_port={plan.master_port}"] if plan.master_port else []),
        "--force_multi", "--no_local_rank", "--module", *plan.program(),
    ]  # fmt: skip
    return f"{shlex.join(['cd', str(plan.folder.root)])} && {shlex.join(command)}"


def sbatch_script(plan: LaunchPlan, device: str | None) -> str:
    """A batch script: one torchrun per node, SIGTERM before the time limit, and requeueing.

    Slurm's signal reaches torchrun on every node. Ranks that then save and stop leave
    `rank<N>.stopped`; if the first did, the script puts the job back in the queue.
    """
    inner = _node_by_variables(plan, "$MASTER_ADDR", "$SLURM_NODEID")
    lead = math.ceil(plan.grace_seconds) + _TO_END_SECONDS
    options = [
        f"--job-name={plan.folder.name}",
        f"--nodes={plan.nnodes}",
        "--ntasks-per-node=1",
        "--exclusive",
        # The resource's name for NPUs is the cluster's own choice (--gres).
        *([f"--gpus-per-node={plan.ranks_per_node}"] if device == "cuda" else []),
        f"--output={plan.logs}/slurm-%j.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=TERM@{lead}",
    ]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in plan.environment.items()]
    stopped = shlex.quote(str(stopped_file(plan.logs, 0)))
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {_sbatch_word(option)}" for option in options),
            "# Yours to add: --partition, --account, --time, and the NPUs (--gres).",
            "set -uo pipefail",
            shlex.join(["cd", str(plan.folder.root)]),
            *exports,
            'MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
            "export MASTER_ADDR",
            f"rm -f {stopped}",
            f"srun --kill-on-bad-exit=1 --cpu-bind=none bash -c {shlex.quote(inner)}",
            "code=$?",
            f"if [ -e {stopped} ]; then",
            '    scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$code"',
            "",
        ]
    )


def volcano_job(plan: LaunchPlan, device: str | None) -> str:
    """A Volcano job: one pod per node, whose svc and env plugins tell it the first and its own.

    Source: volcano-sh/volcano, docs/user-guide; MindCluster, "Full NPU Scheduling", vcjob.
    """
    name = re.sub(r"[^a-z0-9]+", "-", plan.folder.name.lower()).strip("-") or "internlm"
    command = _node_by_variables(plan, "${VC_WORKER_HOSTS%%,*}", "$VC_TASK_INDEX")
    devices = {RESOURCES[device]: plan.ranks_per_node} if device in RESOURCES else {}
    container = {
        "name": "worker",
        "image": "IMAGE",
        "command": [
            "bash",
            "-c",
            _unexpanded(f"{shlex.join(['cd', str(plan.folder.root)])} && {command}"),
        ],
        "env": [
            {"name": key, "value": _unexpanded(value)} for key, value in plan.environment.items()
        ],
        "resources": {"requests": devices, "limits": devices},
        "volumeMounts": [{"name": "project", "mountPath": str(plan.folder.root)}],
    }
    pod = {
        "affinity": {"podAntiAffinity": _one_pod_per_node(name)},
        "containers": [container],
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(plan.grace_seconds) + _TO_END_SECONDS,
        "volumes": [{"name": "project", "persistentVolumeClaim": {"claimName": "CLAIM"}}],
    }
    job = {
        "apiVersion": "batch.volcano.sh/v1alpha1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "minAvailable": plan.nnodes,
            "schedulerName": "volcano",
            "plugins": {"env": [], "svc": []},
            "policies": [{"event": "PodEvicted", "action": "RestartJob"}],
            "tasks": [{"name": "worker", "replicas": plan.nnodes, "template": {"spec": pod}}],
        },
    }
    return (
        f"# Yours to put in: IMAGE, which has {sys.executable}, CLAIM, the shared volume, and the\n"
        "# labels, node selector and variables that your cluster's device plugin asks for.\n"
        f"{_yaml(job)}"
    )


def _unexpanded(text: str) -> str:
    """Kubernetes puts a variable's value for $(NAME)."""
    return text.replace("$(", "$$(")


def _one_pod_per_node(job: str) -> dict[str, Any]:
    own = {"key": "volcano.sh/job-name", "operator": "In", "values": [job]}
    term = {"labelSelector": {"matchExpressions": [own]}, "topologyKey": "kubernetes.io/hostname"}
    return {"requiredDuringSchedulingIgnoredDuringExecution": [term]}


def _yaml(value: Any) -> str:
    """Without anchors for what is there twice."""
    dumper = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})
    return yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=1000)


def _node_by_variables(plan: LaunchPlan, address: str, number: str) -> str:
    """A node's command for a shell that knows where ranks meet and which node it is."""
    node = [*plan.torchrun_options(), f"--master-port={plan.master_port or DEFAULT_PORT}"]
    return (
        f'exec {shlex.join(node)} --master-addr="{address}" --node-rank="{number}" '
        f"{shlex.join(['-m', *plan.program()])}"
    )


def _sbatch_word(option: str) -> str:
    """Slurm reads #SBATCH lines itself; it knows quotes."""
    return f'"{option}"' if re.search(r"\s", option) else option


def _for_pdsh(what: str, value: str) -> str:
    if not _PLAIN.fullmatch(value):
        raise InputError(
            f"{what} {value!r}: DeepSpeed's launcher hands it to a shell on each node without "
            "quotes, so it may hold letters, digits and _@+=:,./- only; rename it, or use "
            "--format torchrun"
        )
    return value
