"""Start the ranks of a job with torchrun, wait for them, and say which one failed and why."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import psutil

from internlm_lib.errors import RanksHangError, StoppedError, WorkerError
from internlm_lib.processes import die_with_parent
from internlm_lib.ranks.failures import describe_failure
from internlm_lib.ranks.plan import DEFAULT_GRACE_SECONDS, LaunchPlan, plan_ranks
from internlm_lib.ranks.stopping import stopped_file, terminated_as_interrupted
from internlm_lib.run_folder import RunFolder

LAUNCHER_VARIABLE = "INTERNLM_LAUNCHER_PID"

_TICK_SECONDS = 0.5
_SECONDS_TO_REPORT = 5.0
"""What torchrun needs, once its ranks have ended, to end itself."""
_SECONDS_TO_DUMP = 1.0


def launch(
    module: str,
    folder: RunFolder,
    *arguments: str,
    world_size: int,
    logs: Path,
    on_tick: Callable[[], None] | None = None,
    grace_seconds: float = DEFAULT_GRACE_SECONDS,
    device: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run `python -m module FOLDER ARGUMENTS…` on `world_size` ranks of this machine to the end.

    Args:
        device, environment: as for `plan_ranks`.
    The other arguments, and what is raised: as `LaunchPlan` and `launch_node`.
    """
    plan = plan_ranks(
        module, folder, *arguments, world_size=world_size, logs=logs, device=device,
        environment=environment, grace_seconds=grace_seconds,
    )  # fmt: skip
    launch_node(plan, on_tick=on_tick)


def launch_node(
    plan: LaunchPlan, node_rank: int = 0, on_tick: Callable[[], None] | None = None
) -> None:
    """Run one node's ranks of a plan to their end.

    `plan.logs` gets torchrun's log, `rank<N>.log` of each rank and, of a rank that failed,
    `rank<N>.error`. Ctrl-C, SIGTERM or an error in `on_tick` stops the ranks: they get SIGTERM, and
    after `plan.grace_seconds`, or at a second Ctrl-C, SIGKILL.

    Args:
        on_tick: called twice a second meanwhile, from the calling thread. If it raises
            RanksHangError, every rank writes its stacks into its log and is killed at once.
    Raises:
        WorkerError: with the traceback of the rank that failed first, and the log to read.
        StoppedError: the ranks were asked to stop, and saved before they did.
    """
    plan.logs.mkdir(parents=True, exist_ok=True)
    _remove_old(plan, node_rank)
    log = plan.launcher_log(node_rank)
    with log.open("wb") as handle, terminated_as_interrupted():
        job = _start(plan, node_rank, handle)
        try:
            _wait(job, on_tick)
        except RanksHangError:
            _dump_stacks(job)
            raise
        except KeyboardInterrupt as interrupt:
            _stop(job, plan.grace_seconds)
            if said := _stopped(plan, node_rank):
                raise StoppedError(said) from interrupt
            raise
        except BaseException:
            _stop(job, plan.grace_seconds)
            raise
        finally:
            _kill(job)
    if job.returncode:
        if said := _stopped(plan, node_rank):
            raise StoppedError(said)
        raise WorkerError(describe_failure(plan.module, plan.logs, log, job.returncode))


def _remove_old(plan: LaunchPlan, node_rank: int) -> None:
    """Remove what earlier ranks left, but nothing that other nodes are writing now."""
    if plan.nnodes == 1:
        patterns = ["rank*"]
    else:
        patterns = [f"rank{rank}.*" for rank in plan.ranks_of(node_rank)]
    for pattern in patterns:
        for old in plan.logs.glob(pattern):
            old.unlink()


def _start(plan: LaunchPlan, node_rank: int, log: IO[bytes]) -> "subprocess.Popen[bytes]":
    # torchrun takes options that are not given from PET_…: the plan says all of them.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    environment = {**inherited, **plan.environment, LAUNCHER_VARIABLE: str(os.getpid())}
    return subprocess.Popen(
        plan.torchrun(node_rank),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def _wait(job: "subprocess.Popen[bytes]", on_tick: Callable[[], None] | None) -> None:
    while True:
        try:
            job.wait(_TICK_SECONDS)
            return
        except subprocess.TimeoutExpired:
            if on_tick:
                on_tick()


def _stop(job: "subprocess.Popen[bytes]", grace_seconds: float) -> None:
    """Ask the ranks to end: torchrun passes SIGTERM on, and kills those that outlive the grace."""
    job.send_signal(signal.SIGTERM)
    try:
        job.wait(grace_seconds + _SECONDS_TO_REPORT)
    except subprocess.TimeoutExpired:
        pass  # what is left is killed


def _dump_stacks(job: "subprocess.Popen[bytes]") -> None:
    """Make every rank write the stacks of its threads into its log (`ranks.rank` listens)."""
    for rank in _descendants(job):
        _send(rank, signal.SIGUSR1)
    time.sleep(_SECONDS_TO_DUMP)


def _kill(job: "subprocess.Popen[bytes]") -> None:
    """Kill what is left. Ranks, too: one that is stopped or holds the interpreter's lock would not
    notice that its parent is gone."""
    if job.poll() is not None:
        return
    left = _descendants(job)
    job.kill()
    for process in left:
        _send(process, signal.SIGKILL)
    job.wait()


def _descendants(job: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    try:
        return psutil.Process(job.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass


def _stopped(plan: LaunchPlan, node_rank: int) -> str:
    """What the ranks of this node said when they stopped on request; "" unless all of them did."""
    files = [stopped_file(plan.logs, rank) for rank in plan.ranks_of(node_rank)]
    return files[0].read_text() if all(file.exists() for file in files) else ""
