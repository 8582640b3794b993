"""`internlm launch`: the commands of every node, and what is refused before ranks start."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from internlm_lib.cli import app
from internlm_lib.errors import StoppedError
from internlm_lib.experiment.load import load_experiment, save_experiment
from internlm_lib.ranks.plan import LaunchPlan
from internlm_lib.run_folder import RunFolder
from internlm_lib.training import nodes, supervise

CPU = ("--set", "parallel.device=cpu")


def launch(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["launch", *arguments])


def test_a_dry_run_prints_every_launchers_commands_for_65b(home: Path) -> None:
    result = launch(
        "params/internlm_65b.yaml", "--nnodes", "4", "--dry-run", "--interface", "eth0",
        "--run-name", "big", "--set", "parallel.device=npu",
        "--set", "parallel.environment.HCCL_EXEC_TIMEOUT=3600",
    )  # fmt: skip
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if line.startswith("cd ")]
    assert [f"--node-rank={node}" in lines[node] for node in range(4)] == [True] * 4
    for variable in ("HCCL_SOCKET_IFNAME==eth0", "HCCL_EXEC_TIMEOUT=3600"):
        assert all(f" {variable} " in line for line in lines[:4])
    assert "HOST_3 slots=8" in result.stdout and "#SBATCH --nodes=4" in result.stdout
    assert "huawei.com/Ascend910: 8" in result.stdout and "replicas: 4" in result.stdout
    assert "missing: " in result.stdout and "--only 01_prepare,02_convert" in result.stdout
    assert "shared file system" in result.stdout
    # what the nodes read is there
    _, experiment = load_experiment(home / "runs" / "big" / "experiment.yaml")
    assert experiment.parallel.candidate.world_size == 32


def test_one_format_as_json(home: Path) -> None:
    result = launch("params/tiny.yaml", "--nnodes", "2", "--hosts", "a01,a02", *CPU,
                    "--format", "slurm", "--dry-run", "--json")  # fmt: skip
    found = json.loads(result.stdout)
    assert found["plan"]["hosts"] == {"a01": [0], "a02": [1]}
    assert not {"torchrun", "deepspeed"} & found.keys()
    subprocess.run(["bash", "-n", found["slurm"]["script"]], check=True)


def test_a_launcher_that_cannot_carry_a_path_is_left_out_unless_it_is_asked_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERNLM_HOME", str(home / "a blank"))
    every = launch("params/tiny.yaml", "--dry-run", *CPU)
    assert every.exit_code == 0 and "left out, deepspeed: the project's folder" in every.stdout
    assert "#SBATCH" in every.stdout and "slots=" not in every.stdout
    one = launch("params/tiny.yaml", "--dry-run", *CPU, "--format", "deepspeed")
    assert one.exit_code == 2


def test_tensor_parallel_groups_across_nodes_are_pointed_out(home: Path) -> None:
    tp2 = ("--set", "parallel.candidate.tensor_model_parallel_size=2")
    result = launch("params/tiny.yaml", "--nnodes", "2", "--dry-run", *tp2, *CPU)
    assert "slow: tensor parallel groups of 2 do not fit into nodes of 1 ranks" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nnodes", "3", "--dry-run"), "nodes × ranks that fit: 1 × 2, 2 × 1"),
        (("--role", "teacher", "--dry-run"), "--role teacher: this experiment has"),
        (("--format", "pbs", "--dry-run"), "--format pbs: give one of torchrun, deepspeed, slurm"),
        (("--nnodes", "2"), "--node-rank: 2 nodes, and not said which one this is"),
        (("--nnodes", "2", "--node-rank", "2"), "--node-rank 2: the nodes are 0 to 1"),
        (("--nnodes", "2", "--node-rank", "1"), "--master-addr is missing"),
        (("--node-rank", "0"), "missing: "),
    ],
)
def test_what_cannot_start_is_refused(home: Path, arguments: tuple[str, ...], message: str) -> None:
    result = launch("params/tiny.yaml", *arguments, *CPU)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (home / "runs").exists()


@pytest.fixture
def started(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[LaunchPlan, int]]:
    """Plans whose ranks would have been started, with the node; the run has all it needs."""
    seen: list[tuple[LaunchPlan, int]] = []

    def start(plan: LaunchPlan, node_rank: int, on_tick: Any) -> None:
        seen.append((plan, node_rank))
        on_tick()

    monkeypatch.setattr(supervise, "launch_node", start)
    monkeypatch.setattr(nodes, "_missing", lambda folder, experiment: "")
    monkeypatch.setattr(nodes, "_SECONDS_TO_SHARE", 0.1)
    return seen


TWO = ("params/tiny.yaml", "--nnodes", "2", "--master-addr", "10.0.0.1", *CPU)


def test_the_first_node_writes_the_experiment_and_starts_its_ranks(
    home: Path, started: list[tuple[LaunchPlan, int]]
) -> None:
    result = launch(*TWO, "--node-rank", "0", "--set", "training.lr=1e-5",
                    "--set", "training.min_lr=0", "--json")  # fmt: skip
    assert json.loads(result.stdout)["ranks"] == [0]
    ((plan, node),) = started
    assert (node, plan.hosts[0], plan.grace_seconds) == (0, "10.0.0.1", nodes.GRACE_SECONDS)
    assert plan.module == "internlm_lib.training.worker" and plan.arguments == ("candidate",)
    _, experiment = load_experiment(plan.folder.experiment)
    assert experiment.training.lr == 1e-5


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({}, None),
        (None, "nothing is there"),
        ({"training.train_iters": 7}, "another experiment is there"),
    ],
)
def test_another_node_starts_only_with_the_first_ones_experiment(
    home: Path,
    started: list[tuple[LaunchPlan, int]],
    theirs: dict[str, Any] | None,
    message: str | None,
) -> None:
    if theirs is not None:
        name, experiment = load_experiment(
            Path("params/tiny.yaml"), {"parallel.device": "cpu", **theirs}
        )
        save_experiment(RunFolder.of(name).experiment, name, experiment)
    result = launch(*TWO, "--node-rank", "1")
    assert result.exit_code == (2 if message else 0)
    assert [node for _, node in started] == ([] if message else [1])
    assert message is None or message in result.stderr


def test_a_training_that_stopped_on_request_has_its_own_exit_code(
    started: list[tuple[LaunchPlan, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise StoppedError("stopped after step 7")

    monkeypatch.setattr(supervise, "launch_node", stop)
    result = launch("params/tiny.yaml", *CPU, "--json")
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["exit_code"], error["kind"]) == (5, 5, "StoppedError")


def test_ranks_beyond_this_nodes_devices_are_refused(
    started: list[tuple[LaunchPlan, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = SimpleNamespace(name="npu", count=lambda: 1)
    monkeypatch.setattr(nodes, "select_device", lambda name: one)
    result = launch("params/tiny.yaml", "--set", "parallel.device=npu")
    assert result.exit_code == 2 and not started
    assert "--nproc-per-node needs 2 npu devices" in result.stderr


def write_table(path: Path, servers: int, devices: int, first: str = "10.0.0.{}") -> Path:
    """A rank table of A2 servers, as Ascend Operator writes it."""
    table = {
        "status": "completed", "version": "1.0", "server_count": str(servers),
        "server_list": [
            {"server_id": first.format(i + 1),
             "device": [{"device_id": str(d), "device_ip": f"29.{i}.0.{d}",
                         "rank_id": str(i * devices + d)} for d in range(devices)]}
            for i in range(servers)
        ],
    }  # fmt: skip
    path.write_text(json.dumps(table))
    return path


def test_a_rank_table_of_this_machine_is_the_plan(home: Path) -> None:
    """In a process of its own: nothing but the variable says where ranks run."""
    table = write_table(home / "hccl.json", 1, 2, "127.0.0.{}")
    done = subprocess.run(
        [sys.executable, "-m", "internlm_lib.cli", "launch", "params/tiny.yaml", *CPU,
         "--dry-run", "--json"],
        env={**os.environ, "RANK_TABLE_FILE": str(table)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    plan = found["plan"]
    assert (plan["world_size"], plan["hosts"]) == (2, {"127.0.0.1": [0, 1]})
    cluster = {name: plan["cluster"][name] for name in ("nnodes", "nproc_per_node", "node_rank")}
    assert cluster == {"nnodes": 1, "nproc_per_node": 2, "node_rank": 0}
    assert plan["cluster"]["rank_table"] == str(table)
    summary = f"1 node × 2 from RANK_TABLE_FILE={table}; this is node 0 (127.0.0.1)"
    assert summary in found["notes"]
    assert any("nothing else reads it, as ranks run on cpu" in note for note in found["notes"])


def test_a_dry_run_for_npus_says_what_the_rank_table_is_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_table(home / "hccl.json", 4, 8)
    monkeypatch.setenv("RANK_TABLE_FILE", str(table))
    arguments = ("params/internlm_65b.yaml", "--dry-run", "--set", "parallel.device=npu")
    result = launch(*arguments)
    assert result.exit_code == 0
    assert f"# 4 nodes × 8 from RANK_TABLE_FILE={table}; none of its servers" in result.stdout
    assert "they also connect by it" in result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("cd ")]
    assert all(f"RANK_TABLE_FILE={table}" in line for line in lines[:4])
    assert all("--master-addr=10.0.0.1" in line for line in lines[:4])
    # a mounted ConfigMap's files are symbolic links
    (home / "link.json").symlink_to(table)
    monkeypatch.setenv("RANK_TABLE_FILE", str(home / "link.json"))
    assert "torch_npu follows no symbolic link" in launch(*arguments).stdout
    # without the cluster, no rank sees the table
    ignored = launch(*arguments, "--nnodes", "4", "--ignore-cluster")
    assert ignored.exit_code == 0 and "HOST_3 slots=8" in ignored.stdout
    assert "RANK_TABLE_FILE= " in ignored.stdout and str(table) not in ignored.stdout


def test_a_node_of_a_cluster_starts_its_own_ranks(
    started: list[tuple[LaunchPlan, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("NNODES", "2"), ("NODE_RANK", "0"), ("MASTER_ADDR", "10.0.0.1"),
                        ("MASTER_PORT", "6000")):  # fmt: skip
        monkeypatch.setenv(name, value)
    result = launch("params/tiny.yaml", *CPU, "--json")
    assert result.exit_code == 0
    assert "internlm: 2 nodes from NNODES, NODE_RANK, MASTER_ADDR; this is node 0" in result.stderr
    assert json.loads(result.stdout)["ranks"] == [0]
    ((plan, node),) = started
    assert (node, plan.hosts, plan.master_port) == (0, ("10.0.0.1", "HOST_1"), 6000)


@pytest.mark.parametrize(
    ("environ", "arguments", "message"),
    [
        ({"NNODES": "4"}, ("--nnodes", "2"), "--nnodes 2, but NNODES says 4"),
        ({"NNODES": "2", "NODE_RANK": "1"}, ("--node-rank", "0"), "NODE_RANK says 1"),
        # the layout's two ranks on four nodes
        ({"NNODES": "4", "NODE_RANK": "1"}, (), "the cluster: 4 nodes from NNODES, NODE_RANK"),
        ({"NNODES": "2", "NPROC_PER_NODE": "8"}, ("--dry-run",), "2 nodes × 8 ranks cannot hold"),
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "a[1-2]"}, (),
         "`internlm launch` once per node, with srun"),
        ({"RANK_TABLE_FILE": "/nowhere/hccl.json"}, ("--dry-run",), "/nowhere/hccl.json: No such"),
    ],
)  # fmt: skip
def test_a_cluster_that_does_not_fit_is_refused(
    started: list[tuple[LaunchPlan, int]],
    monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    result = launch("params/tiny.yaml", *arguments, *CPU)
    assert result.exit_code == 2 and not started
    assert message in result.stderr
    alone = launch("params/tiny.yaml", *CPU, "--ignore-cluster")
    assert alone.exit_code == 0 and [node for _, node in started] == [0]
