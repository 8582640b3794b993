"""What the environments of cluster systems say of a job, recorded as each of them sets it."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from internlm_lib.errors import InputError
from internlm_lib.ranks import schedulers
from internlm_lib.ranks.cluster import (
    Cluster,
    cluster_from_environment,
    names_of_this_machine,
)
from internlm_lib.ranks.hostlist import expand_hostlist
from tests.unit.ranks.conftest import TableWriter

PODS = ("job-worker-0.job", "job-worker-1.job", "job-worker-2.job", "job-worker-3.job")

# ModelArts user guide, environment variables of a training container: the third of 4 × 8 NPUs.
MODELARTS = {
    "MA_JOB_DIR": "/home/ma-user/modelarts/user-job-dir",
    "MA_NUM_HOSTS": "4",
    "MA_NUM_GPUS": "8",
    "MA_TASK_NAME": "worker",
    "MA_CURRENT_IP": "192.168.0.3",
    "MA_CURRENT_HOST_IP": "10.0.0.3",
    "VC_TASK_INDEX": "2",
    "VC_WORKER_NUM": "4",
    "VC_WORKER_HOSTS": ",".join(PODS),
}
# Volcano's env and svc plugins, one task.
VOLCANO = {
    "VK_TASK_INDEX": "1",
    "VC_TASK_INDEX": "1",
    "VC_WORKER_NUM": "4",
    "VC_WORKER_HOSTS": ",".join(PODS),
}
# Volcano's pytorch plugin: the second worker of a master and two workers.
VOLCANO_PYTORCH = {
    "VC_TASK_INDEX": "1",
    "VC_MASTER_NUM": "1",
    "VC_MASTER_HOSTS": "job-master-0.job",
    "VC_WORKER_NUM": "2",
    "VC_WORKER_HOSTS": "job-worker-0.job,job-worker-1.job",
    "MASTER_ADDR": "job-master-0.job",
    "MASTER_PORT": "23456",
    "WORLD_SIZE": "3",
    "RANK": "2",
}
# MindCluster's Ascend Operator, PyTorch, 2 pods of 8 NPUs, the worker.
MINDCLUSTER = {
    "MINDX_TASK_ID": "d0c1",
    "MASTER_ADDR": "10.96.3.4",
    "MASTER_PORT": "2222",
    "WORLD_SIZE": "16",
    "RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "LOCAL_RANK": "0,1,2,3,4,5,6,7",
}
# The shell of an sbatch script.
SLURM_BATCH = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_NNODES": "4",
    "SLURM_JOB_NODELIST": "a[01-03],b7",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_GPUS_ON_NODE": "8",
}
# A task of `srun --ntasks-per-node=1` in it.
SLURM_TASK = SLURM_BATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "a[01-03],b7",
    "SLURM_NODEID": "3",
    "SLURM_PROCID": "3",
}
PLAIN = {
    "NNODES": "2", "NODE_RANK": "1", "NPROC_PER_NODE": "8",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "6000",
}  # fmt: skip
# Kubeflow's Trainer.
KUBEFLOW = {
    "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "auto",
    "PET_MASTER_ADDR": "job-node-0-0.job", "PET_MASTER_PORT": "29500",
}  # fmt: skip


def read(environ: Mapping[str, str], *me: str) -> Cluster | None:
    return cluster_from_environment(environ, frozenset(me))


def refused(environ: Mapping[str, str], *me: str) -> str:
    with pytest.raises(InputError) as refusal:
        read(environ, *me)
    return str(refusal.value)


EXPECTED: list[tuple[dict[str, str], dict[str, Any]]] = [
    (MODELARTS, {"nnodes": 4, "node_rank": 2, "devices_per_node": 8, "hosts": PODS}),
    (VOLCANO, {"nnodes": 4, "node_rank": 1, "hosts": PODS, "devices_per_node": None}),
    (VOLCANO_PYTORCH, {
        "nnodes": 3, "node_rank": 2, "master_addr": "job-master-0.job", "master_port": 23456,
        "hosts": ("job-master-0.job", "job-worker-0.job", "job-worker-1.job")}),
    (MINDCLUSTER, {"nnodes": 2, "node_rank": 1, "devices_per_node": 8, "nproc_per_node": None,
                   "master_addr": "10.96.3.4", "master_port": 2222}),
    (SLURM_TASK, {"nnodes": 4, "node_rank": 3, "hosts": ("a01", "a02", "a03", "b7"),
                  "devices_per_node": 8, "master_addr": None}),
    (PLAIN, {"nnodes": 2, "node_rank": 1, "nproc_per_node": 8, "hosts": (),
             "master_addr": "10.0.0.1", "master_port": 6000}),
    (KUBEFLOW, {"nnodes": 2, "node_rank": 1, "nproc_per_node": None,
                "master_addr": "job-node-0-0.job", "master_port": 29500}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "expected"),
    EXPECTED,
    ids=["modelarts", "volcano", "volcano pytorch", "mindcluster", "slurm", "plain", "kubeflow"],
)
def test_each_system_is_read(environ: dict[str, str], expected: dict[str, Any]) -> None:
    cluster = read(environ)
    assert cluster is not None
    assert {name: getattr(cluster, name) for name in expected} == expected
    assert cluster.rank_table is None
    # every source is a variable that is there
    assert cluster.sources and all(
        name in environ
        for source in cluster.sources.values()
        for name in source.replace(" / ", ", ").split(", ")
    )


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"PATH": "/bin", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "NODE_RANK": "1"},
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        {"NNODES": "", "RANK_TABLE_FILE": "", "SLURM_JOB_NUM_NODES": ""},
        MINDCLUSTER | {"TORCHELASTIC_RUN_ID": "none", "RANK": "9", "LOCAL_RANK": "1"},
        {"VC_TASK_INDEX": "0"},
    ],
    ids=["nothing", "where to meet", "a rank", "empty", "a rank of MindCluster", "a lone pod"],
)
def test_without_a_number_of_nodes_there_is_no_cluster(environ: dict[str, str]) -> None:
    assert read(environ) is None


def test_a_rank_table_says_where_every_rank_is(write_table: TableWriter) -> None:
    path = write_table()
    cluster = read({"RANK_TABLE_FILE": str(path)}, "10.0.0.3", "192.168.0.3")
    assert cluster is not None
    assert (cluster.nnodes, cluster.nproc_per_node, cluster.node_rank) == (4, 8, 2)
    assert cluster.hosts == tuple(f"192.168.0.{i}" for i in (1, 2, 3, 4))
    assert cluster.rank_table == path
    assert cluster.summary() == (
        f"4 nodes × 8 from RANK_TABLE_FILE={path}; this is node 2 (192.168.0.3)"
    )
    elsewhere = read({"RANK_TABLE_FILE": str(path)}, "10.0.9.9")
    assert elsewhere is not None and elsewhere.node_rank is None
    assert "none of its servers has a name or an address of this machine" in elsewhere.summary()


def test_a_server_that_is_only_called_something_must_resolve() -> None:
    """The user guide's own examples call servers node_0, node_1."""
    cluster = Cluster(2, {}, hosts=("node_0", "node_1"), rank_table=Path("/t.json"))
    assert "resolve that name" in " ".join(cluster.notes("npu", "node_0"))
    assert "resolve" not in " ".join(cluster.notes("npu", "10.0.0.1"))
    assert Cluster(2, {}, hosts=("a01", "a02")).notes("npu", "a01") == []


def test_modelarts_with_a_rank_table_is_one_cluster(write_table: TableWriter) -> None:
    """The table's own names come first; the rest is filled in."""
    path = write_table()
    cluster = read(MODELARTS | {"RANK_TABLE_FILE": str(path)}, "10.0.0.3")
    assert cluster is not None and cluster.node_rank == 2
    assert cluster.hosts[0] == "192.168.0.1" and cluster.devices_per_node == 8
    assert cluster.sources["node_rank"].startswith("RANK_TABLE_FILE=")
    assert cluster.sources["devices_per_node"] == "MA_NUM_GPUS"
    # a table that does not list this machine leaves its number to the others
    cluster = read(MODELARTS | {"RANK_TABLE_FILE": str(path)}, "10.0.9.9")
    assert cluster is not None and cluster.sources["node_rank"] == "VC_TASK_INDEX"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"MA_NUM_HOSTS": "3"}, ("MA_NUM_HOSTS", "RANK_TABLE_FILE=", "4 nodes", "says 3")),
        ({"VC_TASK_INDEX": "1"}, ("VC_TASK_INDEX", "says 2 as this node's number", "says 1")),
        ({"NNODES": "8"}, ("NNODES", "RANK_TABLE_FILE=", "says 8")),
        ({"PET_NPROC_PER_NODE": "4"}, ("PET_NPROC_PER_NODE says 4", "says 8 ranks per node")),
        (SLURM_TASK, ("SLURM_NODEID says 3", "says 2")),
    ],
)
def test_a_table_that_contradicts_the_platform_is_refused_with_both_named(
    write_table: TableWriter, changes: dict[str, str], named: tuple[str, ...]
) -> None:
    environ = MODELARTS | {"RANK_TABLE_FILE": str(write_table())} | changes
    message = refused(environ, "10.0.0.3")
    assert all(words in message for words in (*named, "--ignore-cluster"))


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (SLURM_TASK | {"NNODES": "2"}, ("SLURM_STEP_NUM_NODES says 4", "NNODES says 2")),
        (PLAIN | {"PET_NODE_RANK": "0"}, ("PET_NODE_RANK says 0", "NODE_RANK says 1")),
        (VOLCANO | {"VC_WORKER_NUM": "3"}, ("VC_WORKER_HOSTS names 4", "VC_WORKER_NUM says 3")),
        (SLURM_TASK | {"SLURM_STEP_NODELIST": "a[01-02]"},
         ("SLURM_STEP_NODELIST='a[01-02]' is read as 2", "SLURM_STEP_NUM_NODES says 4")),
        (SLURM_TASK | {"SLURM_STEP_NUM_TASKS": "32"},
         ("SLURM_STEP_NUM_TASKS=32 on 4 nodes", "--ntasks-per-node=1")),
        (SLURM_TASK | {"MASTER_ADDR": "a02"}, ("MASTER_ADDR=a02", "node 1", "node 0, a01")),
        (SLURM_TASK | {"MASTER_ADDR": "localhost"}, ("MASTER_ADDR=localhost", "4 nodes")),
        (PLAIN | {"MASTER_ADDR": "127.0.0.1"}, ("MASTER_ADDR=127.0.0.1", "2 nodes")),
        (PLAIN | {"NODE_RANK": "2"}, ("NODE_RANK says that this is node 2", "NNODES says 2")),
        (PLAIN | {"NNODES": "two"}, ("NNODES='two': a whole number from 1",)),
        (PLAIN | {"NNODES": "0"}, ("NNODES='0': a whole number from 1",)),
        (PLAIN | {"NODE_RANK": "-1"}, ("NODE_RANK='-1'",)),
        (PLAIN | {"NPROC_PER_NODE": "many"}, ("NPROC_PER_NODE='many'",)),
        (KUBEFLOW | {"PET_NNODES": "1:4"}, ("PET_NNODES='1:4'", "changes")),
        (MINDCLUSTER | {"WORLD_SIZE": "12"}, ("WORLD_SIZE=12", "LOCAL_WORLD_SIZE=8")),
        (MODELARTS | {"VC_PS_HOSTS": "p0", "MA_TASK_NAME": ""}, ("VC_PS_HOSTS", "which train")),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_all_of_it_named(
    environ: dict[str, str], named: tuple[str, ...]
) -> None:
    message = refused(environ)
    assert all(words in message for words in named)


def test_one_container_needs_no_index() -> None:
    """ModelArts: there VC_TASK_INDEX "has no meaning"."""
    cluster = read({"MA_NUM_HOSTS": "1", "MA_NUM_GPUS": "8"})
    assert cluster is not None and (cluster.nnodes, cluster.node_rank) == (1, 0)
    one = read({"VC_WORKER_HOSTS": PODS[0], "VC_WORKER_NUM": "1"})
    assert one is not None and one.node_rank == 0


def test_of_several_tasks_modelarts_names_this_containers() -> None:
    cluster = read(MODELARTS | {"VC_LEARNER_HOSTS": "l0,l1", "VC_LEARNER_NUM": "2"})
    assert cluster is not None and cluster.hosts == PODS


def test_a_pod_is_known_by_its_name_where_no_index_says_it() -> None:
    environ = {"VC_WORKER_HOSTS": VOLCANO["VC_WORKER_HOSTS"]}
    found = read(environ, "job-worker-3")
    assert found is not None and found.node_rank == 3
    lost = read(environ, "job-worker")
    assert lost is not None and lost.node_rank is None and "env plugin" in lost.summary()
    # with a master and workers the index counts workers only
    named = read({k: v for k, v in VOLCANO_PYTORCH.items() if k != "RANK"}, "job-worker-0")
    assert named is not None and named.node_rank == 1
    unnamed = read({k: v for k, v in VOLCANO_PYTORCH.items() if k != "RANK"})
    assert unnamed is not None and unnamed.node_rank is None


def test_volcano_without_hosts_in_the_environment_has_them_in_files(tmp_path: Path) -> None:
    (tmp_path / "worker.host").write_text("\n".join(PODS))
    facts = schedulers.volcano({"VC_TASK_INDEX": "2"}, frozenset(), tmp_path)
    assert facts["hosts"].value == PODS and facts["node_rank"].value == 2
    assert facts["nnodes"].source == str(tmp_path / "worker.host")
    assert schedulers.volcano({}, frozenset(), tmp_path) == {}


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_NODES": "1"}])
def test_a_slurm_script_or_shell_is_no_node_of_its_allocation(step: dict[str, str]) -> None:
    """Else `internlm launch` in it would train on the first node only, and wait for the others."""
    cluster = read(SLURM_BATCH | step)
    assert cluster is not None and (cluster.nnodes, cluster.node_rank) == (4, None)
    assert "once per node, with srun --ntasks-per-node=1" in cluster.summary()
    alone = read(SLURM_BATCH | step | {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "a01"})
    assert alone is not None and alone.node_rank == 0


def test_a_slurm_step_of_some_nodes_is_a_cluster_of_these() -> None:
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NODELIST": "a[02-03]", "SLURM_NODEID": "1"}  # fmt: skip
    cluster = read(SLURM_TASK | step)
    assert cluster is not None and cluster.hosts == ("a02", "a03") and cluster.node_rank == 1


def test_where_ranks_meet_may_be_said_beside_the_platform() -> None:
    cluster = read(SLURM_TASK | {"MASTER_ADDR": "a01-ib0", "MASTER_PORT": "6001"})
    assert cluster is not None
    assert (cluster.master_addr, cluster.master_port) == ("a01-ib0", 6001)
    assert "MASTER_ADDR" in cluster.summary()


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a01", ["a01"]),
        ("a[01-03,07],b5", ["a01", "a02", "a03", "a07", "b5"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("r[0-1]n[1-2]-ib", ["r0n1-ib", "r0n2-ib", "r1n1-ib", "r1n2-ib"]),
        ("gpu-a-1,gpu-b-[098-101]", ["gpu-a-1", *(f"gpu-b-{n}" for n in ("098", "099", 100, 101))]),
    ],
)
def test_hostlists_are_expanded_as_slurm_does(text: str, hosts: list[str]) -> None:
    assert expand_hostlist(text) == hosts


def options(**given: Any) -> dict[str, Any]:
    nothing = {"nnodes": None, "nproc_per_node": None, "hosts": (), "master_addr": None,
               "master_port": None, "interface": None, "node_rank": None}  # fmt: skip
    return {**nothing, **given}


def test_options_win_and_the_cluster_fills_the_rest() -> None:
    cluster = read(SLURM_TASK | {"MASTER_PORT": "6001"})
    assert cluster is not None
    settled = cluster.settle(options(master_port=7000, interface="eth0", nnodes=4))
    assert settled == options(
        nnodes=4, hosts=cluster.hosts, master_port=7000, interface="eth0", node_rank=3
    )
    others = ("a01-ib", "a02-ib", "a03-ib", "b7-ib")
    settled = cluster.settle(options(hosts=others, master_addr="10.1.1.1", node_rank=3))
    assert (settled["hosts"], settled["master_addr"]) == (others, "10.1.1.1")
    assert settled["master_port"] == 6001


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"nnodes": 2}, ("--nnodes 2", "SLURM_STEP_NUM_NODES says 4")),
        ({"node_rank": 0}, ("--node-rank 0", "SLURM_NODEID says 3")),
        ({"nproc_per_node": 4}, ("--nproc-per-node 4", "NPROC_PER_NODE says 8")),
        ({"hosts": ("a01", "a02")}, ("--hosts names 2", "SLURM_STEP_NUM_NODES says 4")),
        ({"hosts": ("a02", "a01", "a03", "b7")}, ("--hosts has a02 as node 0", "as node 1")),
        ({"master_addr": "b7"}, ("--master-addr b7", "node 3", "node 0, a01")),
        ({"master_addr": "::1"}, ("--master-addr ::1", "4 nodes")),
    ],
)
def test_an_option_that_contradicts_the_cluster_is_refused_with_both(
    given: dict[str, Any], named: tuple[str, ...]
) -> None:
    cluster = read(SLURM_TASK | {"NPROC_PER_NODE": "8"})
    assert cluster is not None
    with pytest.raises(InputError) as refusal:
        cluster.settle(options(**given))
    assert all(words in str(refusal.value) for words in (*named, "--ignore-cluster"))


def test_this_machine_is_known_by_its_names_and_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def at(family: int, address: str) -> SimpleNamespace:
        return SimpleNamespace(family=family, address=address)

    monkeypatch.setattr(socket, "gethostname", lambda: "a07.cluster")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": [
        at(socket.AF_INET, "10.0.0.7"), at(socket.AF_INET6, "fe80::7%eth0"),
        at(psutil.AF_LINK, "00:00:5e:00:53:07"),
    ]})  # fmt: skip
    names = names_of_this_machine({"POD_IP": "192.168.0.7", "HOME": "/root", "XDL_IP": ""})
    assert names == {"a07.cluster", "a07", "10.0.0.7", "fe80::7", "192.168.0.7"}


def test_the_environment_is_that_of_the_process(
    monkeypatch: pytest.MonkeyPatch, write_table: TableWriter
) -> None:
    assert cluster_from_environment() is None
    monkeypatch.setenv("RANK_TABLE_FILE", str(write_table(servers=1, devices=2)))
    cluster = cluster_from_environment()
    assert cluster is not None and (cluster.nnodes, cluster.node_rank) == (1, 0)
    assert "RANK_TABLE_FILE" in os.environ
