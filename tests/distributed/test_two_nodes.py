"""One training on two nodes takes the steps it takes on one, started by the plan's own lines.

The nodes are network namespaces joined by a veth pair, where they are permitted: their ranks share
no interface but that. Where they are not, two torchrun agents on loopback, whose meeting is tested
everywhere, with ranks that start quickly.
"""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Layout
from internlm_lib.journal import events
from internlm_lib.processes import die_with_parent
from internlm_lib.ranks.launch import launch_node
from internlm_lib.ranks.plan import LaunchPlan, plan_ranks
from internlm_lib.ranks.render import torchrun_lines
from internlm_lib.run_folder import RunFolder
from internlm_lib.training.nodes import Nodes, plan_training
from tests.parity.make_run import make_run

LAYOUT = Layout(tensor_model_parallel_size=2, data_parallel_size=2)
SETTINGS = {"training.train_iters": 4, "training.lr": 1e-2, "parallel.device": "cpu"}
SECONDS = 240.0
ADDRESSES = ("10.231.7.1", "10.231.7.2")
INTERFACE = "internlm0"

Processes = list["subprocess.Popen[bytes]"]


def namespaces_permitted() -> bool:
    """Whether this user may make a network here, and has the tools."""
    if not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        return False
    command = ["unshare", "--net", "ip", "link", "add", "type", "veth"]
    return subprocess.run(command, capture_output=True).returncode == 0


MEETING = "namespaces" if namespaces_permitted() else "loopback"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("nodes"), LAYOUT, **SETTINGS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The same number in every plan: sums are split by threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def on_one_node(run: RunFolder) -> list[tuple[float, float]]:
    _, experiment = load_experiment(run.experiment)
    launch_node(plan_training(run, experiment, "candidate", Nodes()))
    return curve(run)


@pytest.fixture
def processes() -> Iterator[Processes]:
    """What a test starts; nothing of it is left, however the test ends."""
    started: Processes = []
    yield started
    family = [psutil.Process(process.pid) for process in started if process.poll() is None]
    for parent in family:
        for process in (*parent.children(recursive=True), parent):
            process.kill()
    for process in started:
        process.wait()


def curve(run: RunFolder) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step; the journal is then taken away."""
    journal = run.training("candidate").journal
    steps = [(step["loss"], step["grad_norm"]) for step in events(journal, "step")]
    shutil.rmtree(run.training("candidate").path)
    return steps


def start(processes: Processes, command: list[str]) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(command, preexec_fn=die_with_parent, start_new_session=True)
    processes.append(process)
    return process


def two_namespaces(processes: Processes) -> list[list[str]]:
    """Two networks without names, joined; returns what to put before a command to run it there.

    They last as long as a process in them, so that nothing is left behind.
    """
    holders = [start(processes, ["unshare", "--net", "sleep", "600"]) for _ in ADDRESSES]
    inside = [["nsenter", f"--net=/proc/{holder.pid}/ns/net"] for holder in holders]
    own = os.readlink("/proc/self/ns/net")
    deadline = time.monotonic() + 20
    while any(os.readlink(f"/proc/{holder.pid}/ns/net") == own for holder in holders):
        assert time.monotonic() < deadline, "unshare made no network"
        time.sleep(0.05)
    pair = ["ip", "link", "add", INTERFACE, "type", "veth",
            "peer", "name", INTERFACE, "netns", str(holders[1].pid)]  # fmt: skip
    subprocess.run([*inside[0], *pair], check=True)
    for enter, address in zip(inside, ADDRESSES, strict=True):
        for command in (
            f"ip address add {address}/24 dev {INTERFACE}",
            f"ip link set {INTERFACE} up",
            "ip link set lo up",
        ):
            subprocess.run([*enter, *command.split()], check=True)
    return inside


def nodes_of(meeting: str, processes: Processes) -> tuple[list[list[str]], Nodes]:
    """How to enter each node, and what the plan is told of them."""
    if meeting == "namespaces":
        inside = two_namespaces(processes)
        return inside, Nodes(2, master_addr=ADDRESSES[0], interface=INTERFACE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [[], []], Nodes(2, master_addr="127.0.0.1", master_port=port, interface="lo")


def run_nodes(processes: Processes, inside: list[list[str]], plan: LaunchPlan) -> None:
    """Type the plan's line on every node, and wait until all have ended well."""
    agents = [
        start(processes, [*enter, "bash", "-c", line])
        for enter, line in zip(inside, torchrun_lines(plan), strict=True)
    ]
    deadline = time.monotonic() + SECONDS
    codes = [agent.wait(deadline - time.monotonic()) for agent in agents]
    assert codes == [0, 0], logs(plan.logs)


@pytest.mark.parametrize("meeting", [MEETING])
def test_two_nodes_take_the_same_steps_as_one(
    run: RunFolder,
    on_one_node: list[tuple[float, float]],
    processes: Processes,
    meeting: str,
) -> None:
    _, experiment = load_experiment(run.experiment)
    inside, nodes = nodes_of(meeting, processes)
    run_nodes(processes, inside, plan_training(run, experiment, "candidate", nodes))
    assert len(on_one_node) == SETTINGS["training.train_iters"]
    assert len({loss for loss, _ in on_one_node}) > 1
    assert curve(run) == on_one_node


def test_two_agents_on_loopback_are_one_job(tmp_path: Path, processes: Processes) -> None:
    folder = RunFolder.of("run", tmp_path)
    inside, nodes = nodes_of("loopback", processes)
    plan = plan_ranks(
        "tests.distributed.sum_worker", folder,
        world_size=4, logs=folder.path / "logs", device="cpu", **asdict(nodes),
    )  # fmt: skip
    run_nodes(processes, inside, plan)
    seen = [json.loads((folder.path / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert seen == [
        {"RANK": rank, "LOCAL_RANK": rank % 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2,
         "GROUP_RANK": rank // 2, "sum": 6}
        for rank in range(4)
    ]  # fmt: skip


def logs(folder: Path) -> str:
    return "\n".join(
        f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("rank*"))
    )
