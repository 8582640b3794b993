"""The launch plan: what fits, in which order, and that every rendering starts the same ranks."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from internlm_lib.errors import InputError
from internlm_lib.ranks import render
from internlm_lib.ranks.cluster import Cluster
from internlm_lib.ranks.environment import on_one_node, rank_environment
from internlm_lib.ranks.plan import LaunchPlan, plan_ranks
from internlm_lib.ranks.stopping import stopped_file
from internlm_lib.run_folder import RunFolder

SPY = f"""#!{sys.executable}
import json, os, sys
record = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}}
with open(os.environ["SPY_RECORD"], "a") as file:
    file.write(json.dumps(record) + "\\n")
"""
SRUN = """#!/bin/bash
echo "$1 $2" >> "$SPY_RECORD.srun"
for node in 0 1; do SLURM_NODEID=$node "${@:3}" || exit; done
if [ -n "${STOPPED:-}" ]; then echo stopped > "$STOPPED"; exit 1; fi
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then echo "$2" > "$SPY_RECORD.requeue"; else printf 'a01\\na02\\n'; fi
"""


def plan(root: Path, world_size: int = 4, **options: Any) -> LaunchPlan:
    folder = RunFolder.of("run", root)
    options = {"nnodes": 2, "hosts": ["a01", "a02"], **options}
    return plan_ranks(
        "some.module", folder, "candidate", "it's $HOME",
        world_size=world_size, logs=folder.training("candidate").logs, **options,
    )  # fmt: skip


@pytest.fixture
def spy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a name that needs quotes, and a Python that only tells how it was called."""
    root, tools = tmp_path / "it's a $HOME", tmp_path / "tools"
    root.mkdir()
    tools.mkdir()
    for name, text in (("py thon", SPY), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tools / "py thon"))
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SPY_RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "a[01-02]")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return root


def records(spy: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (spy.parent / "record").read_text().splitlines()]


def check_nodes(spy: Path, made: LaunchPlan) -> None:
    """The spy was called once per node, in order, with exactly this plan."""
    for node, seen in enumerate(records(spy)):
        expected = made.torchrun(node)[1:]
        # the order of options may differ, that of the program's arguments may not
        assert sorted(seen["arguments"]) == sorted(expected)
        assert seen["arguments"][-5:] == ["-m", *made.program()]
        assert {k: seen["environment"].get(k) for k in made.environment} == made.environment
        assert seen["folder"] == str(spy)
    assert len(records(spy)) == made.nnodes


def test_ranks_fill_the_nodes_in_order(tmp_path: Path) -> None:
    made = plan(tmp_path, world_size=32, nnodes=4, hosts=(), nproc_per_node=8)
    assert (made.ranks_per_node, made.world_size) == (8, 32)
    assert [*made.ranks_of(0)] == [*range(8)] and [*made.ranks_of(3)] == [*range(24, 32)]
    assert made.hosts == ("HOST_0", "HOST_1", "HOST_2", "HOST_3")
    names = {made.launcher_log(node).name for node in range(4)}
    assert len(names) == 4 and made.launcher_log(0).name == "launcher.log"


@pytest.mark.parametrize(
    ("world_size", "options", "message"),
    [
        (4, {"nnodes": 3, "hosts": ()}, "that fit: 1 × 4, 2 × 2, 4 × 1"),
        (6, {"nproc_per_node": 2}, "2 nodes × 2 ranks cannot hold exactly 6 ranks"),
        (4, {"nnodes": 8, "hosts": ()}, "8 nodes cannot hold exactly 4 ranks"),
        (4, {"nnodes": 0, "hosts": ()}, "0 nodes cannot hold"),
        (4, {"nproc_per_node": 8}, "2 nodes × 8 ranks cannot hold exactly 4"),
        (4, {"hosts": ["a01"]}, "--hosts names 1 (a01), --nnodes says 2"),
        (4, {"hosts": ["a01", "a01"]}, "--hosts names a01 more than once"),
        (4, {"master_port": 0}, "--master-port 0"),
        (4, {"master_port": 65536}, "--master-port 65536"),
        (4, {"device": "tpu"}, "device = 'tpu': ranks run on npu, cuda, cpu"),
    ],
)
def test_nodes_that_do_not_fit_are_refused(
    tmp_path: Path, world_size: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as refusal:
        plan(tmp_path, world_size, **options)
    assert message in str(refusal.value)


def test_one_node_meets_on_loopback_and_many_at_the_first(tmp_path: Path) -> None:
    one = plan(tmp_path, nnodes=1, hosts=()).torchrun(0)
    assert "--rdzv-endpoint=127.0.0.1:0" in one and "--nproc-per-node=4" in one
    two = plan(tmp_path, master_addr="10.0.0.1", master_port=1234, grace_seconds=0.2).torchrun(1)
    expected = {
        "--nnodes=2", "--nproc-per-node=2", "--node-rank=1", "--master-addr=10.0.0.1",
        "--master-port=1234", "--shutdown-timeout=1",
    }  # fmt: skip
    assert expected < set(two)


def test_the_environment_is_that_of_the_device_the_node_and_the_params_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    chosen = {"TASK_QUEUE_ENABLE": "2"}
    made = plan(tmp_path, device="npu", interface="eth1", environment=chosen)
    logs = {"INTERNLM_RANK_LOGS": str(made.logs)}
    assert made.environment == {**rank_environment("npu", 2, "eth1", chosen), **logs}
    assert {"OMP_NUM_THREADS": "6", "TASK_QUEUE_ENABLE": "2", "HCCL_SOCKET_IFNAME": "=eth1"}.items(
    ) <= made.environment.items()  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "one"),
    [
        ({}, True),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, True),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, False),
    ],
    ids=["no launcher", "one node", "torchrun", "DeepSpeed"],
)
def test_a_rank_knows_whether_it_needs_the_network(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], one: bool
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert on_one_node() is one


def test_npu_ranks_get_the_rank_table_that_the_plan_follows_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch_npu connects ranks by whatever table is in their environment."""
    table = tmp_path / "hccl.json"
    cluster = Cluster(2, {}, hosts=("a01", "a02"), nproc_per_node=2, rank_table=table)
    followed = plan(tmp_path, device="npu", cluster=cluster)
    assert followed.environment["RANK_TABLE_FILE"] == str(table) and followed.cluster is cluster
    assert "RANK_TABLE_FILE" not in plan(tmp_path, device="cuda", cluster=cluster).environment
    assert "RANK_TABLE_FILE" not in plan(tmp_path, device="npu").environment
    monkeypatch.setenv("RANK_TABLE_FILE", str(tmp_path / "of_another_job.json"))
    for device in ("npu", None):  # not every stage says on what its ranks run
        assert plan(tmp_path, device=device).environment["RANK_TABLE_FILE"] == ""
    without = Cluster(2, {}, hosts=("a01", "a02"))
    assert plan(tmp_path, device="npu", cluster=without).environment["RANK_TABLE_FILE"] == ""


@pytest.mark.parametrize(("device", "refused"), [("npu", True), ("cuda", True), ("cpu", False)])
def test_more_ranks_than_the_cluster_has_devices_are_refused(
    tmp_path: Path, device: str, refused: bool
) -> None:
    cluster = Cluster(2, {"devices_per_node": "MA_NUM_GPUS"}, devices_per_node=1)
    if not refused:
        assert plan(tmp_path, device=device, cluster=cluster).ranks_per_node == 2
        return
    with pytest.raises(InputError, match="MA_NUM_GPUS says that a node has 1 devices, .* needs 2"):
        plan(tmp_path, device=device, cluster=cluster)
    assert plan(tmp_path, world_size=2, device=device, cluster=cluster).ranks_per_node == 1


def test_torchrun_lines_start_what_they_say(spy: Path) -> None:
    made = plan(spy)
    for line in render.torchrun_lines(made):
        subprocess.run(["bash", "-c", line], check=True)
    check_nodes(spy, made)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_batch_script_starts_every_node_and_requeues_what_stopped(
    spy: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    made = plan(spy, grace_seconds=60.0)
    mark = stopped_file(made.logs, 0)
    mark.parent.mkdir(parents=True)
    mark.write_text("of an earlier job")
    if stopped:
        monkeypatch.setenv("STOPPED", str(mark))
    script = spy.parent / "job.sbatch"
    script.write_text(render.sbatch_script(made, "cuda"))
    assert subprocess.run(["bash", str(script)]).returncode == stopped
    check_nodes(spy, made)
    options = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    for option in ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--requeue",
                   "--signal=TERM@120", f'"--output={made.logs}/slurm-%j.log"'):  # fmt: skip
        assert f"#SBATCH {option}" in options
    assert (spy.parent / "record.srun").read_text() == "--kill-on-bad-exit=1 --cpu-bind=none\n"
    requeued = spy.parent / "record.requeue"
    assert (requeued.read_text() if requeued.exists() else None) == ("17\n" if stopped else None)


@pytest.mark.parametrize(
    ("device", "resources"),
    [("npu", {"huawei.com/Ascend910": 2}), ("cuda", {"nvidia.com/gpu": 2}), ("cpu", {})],
)
def test_the_volcano_job_has_a_pod_per_node_that_starts_its_ranks(
    spy: Path, device: str, resources: dict[str, int]
) -> None:
    made = plan(spy, grace_seconds=60.0, device=device)
    job = yaml.safe_load(render.volcano_job(made, device))
    assert (job["apiVersion"], job["kind"]) == ("batch.volcano.sh/v1alpha1", "Job")
    assert job["spec"]["minAvailable"] == 2 and job["spec"]["plugins"] == {"env": [], "svc": []}
    (task,) = job["spec"]["tasks"]
    assert task["name"] == "worker", "VC_WORKER_HOSTS is called after it"
    pod = task["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > made.grace_seconds
    (container,) = pod["containers"]
    assert container["resources"] == {"requests": resources, "limits": resources}
    own = {variable["name"]: variable["value"] for variable in container["env"]}
    for replica in range(task["replicas"]):
        pods = {"VC_WORKER_HOSTS": "a01,a02", "VC_TASK_INDEX": str(replica)}
        subprocess.run(container["command"], env={**os.environ, **own, **pods}, check=True)
    check_nodes(spy, made)


def test_kubernetes_expands_nothing_in_the_volcano_job(tmp_path: Path) -> None:
    job = yaml.safe_load(render.volcano_job(plan(tmp_path / "a $(HOME)"), "npu"))
    (container,) = job["spec"]["tasks"][0]["template"]["spec"]["containers"]
    for text in (container["command"][-1], container["env"][-1]["value"]):
        assert "$$(HOME)" in text and "$(" not in text.replace("$$(", "")


def test_shells_can_read_all_that_is_rendered(tmp_path: Path) -> None:
    made = plan(tmp_path / "it's a $HOME")
    for text in (*render.torchrun_lines(made), render.sbatch_script(made, None)):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_deepspeeds_launcher_understands_its_command(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    folder = RunFolder.of("run", tmp_path / "project")
    made = plan_ranks(
        "some.module", folder, "candidate",
        world_size=4, nnodes=2, hosts=["a01", "a02"], logs=folder.path / "logs",
    )  # fmt: skip
    command = shlex.split(render.deepspeed_command(made, str(tmp_path / "hosts"), "env"))
    runner = command.index("deepspeed.launcher.runner")
    assert command[:5] == ["cd", str(folder.root), "&&", "env", "DS_ENV_FILE=env"]
    assert command[5] == "TORCH_DEVICE_BACKEND_AUTOLOAD=0"  # the launcher itself imports torch
    arguments = parse_args(command[runner + 1 :])
    (tmp_path / "hosts").write_text(render.deepspeed_hostfile(made))
    assert fetch_hostfile(arguments.hostfile) == {"a01": 2, "a02": 2}
    assert (arguments.master_addr, arguments.master_port) == ("a01", 29500)
    assert arguments.module and arguments.no_local_rank and arguments.force_multi
    assert [arguments.user_script, *arguments.user_args] == made.program()
    assert dict(
        line.split("=", maxsplit=1) for line in render.deepspeed_environment(made).splitlines()
    ) == dict(made.environment)


def test_deepspeeds_launcher_is_not_given_what_its_shell_would_change(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use --format torchrun"):
        render.deepspeed_command(plan(tmp_path), "hosts", "env")
    with pytest.raises(InputError, match="the project's folder"):
        render.deepspeed_command(plan(tmp_path / "a blank"), "hosts", "env")
