"""Start the ranks of a job with torchrun, wait for them, and say which one failed and why."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from internlm_lib.errors import WorkerError
from internlm_lib.ranks.orphans import die_with_parent
from internlm_lib.run_folder import RunFolder

LAUNCHER_VARIABLE = "INTERNLM_LAUNCHER_PID"
LOGS_VARIABLE = "INTERNLM_RANK_LOGS"

_TICK_SECONDS = 0.5
_GRACE_SECONDS = 5.0
_TAIL_LINES = 20


def launch(
    module: str,
    folder: RunFolder,
    *arguments: str,
    world_size: int,
    logs: Path,
    on_tick: Callable[[], None] | None = None,
) -> None:
    """Run `python -m module FOLDER ARGUMENTS…` on `world_size` ranks of this machine to the end.

    Args:
        module: run as a program it calls `ranks.rank.rank_main`.
        logs: gets `launcher.log`, `rank<N>.log` and, of a rank that failed, `rank<N>.error`.
        on_tick: called twice a second meanwhile, from the calling thread.
    Raises:
        WorkerError: with the traceback of the rank that failed first, and the log to read.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("rank*"):
        old.unlink()
    with (logs / "launcher.log").open("wb") as log:
        job = _start(module, [str(folder.path), *arguments], world_size, logs, log)
        try:
            _wait(job, on_tick)
        finally:
            _stop(job)
    if job.returncode:
        raise WorkerError(_what_failed(module, logs, job.returncode))


def _start(
    module: str, arguments: Sequence[str], world_size: int, logs: Path, log: IO[bytes]
) -> "subprocess.Popen[bytes]":
    command = [
        sys.executable, "-m", "torch.distributed.run",
        "--nnodes=1", f"--nproc-per-node={world_size}", "--max-restarts=0",
        "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1",
        "-m", module, *arguments,
    ]  # fmt: skip
    threads = max(1, (os.cpu_count() or 1) // world_size)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        LAUNCHER_VARIABLE: str(os.getpid()),
        LOGS_VARIABLE: str(logs),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.Popen(
        command,
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


def _stop(job: "subprocess.Popen[bytes]") -> None:
    """Stop what is left: torchrun passes SIGTERM on; ranks that outlive it kill themselves."""
    if job.poll() is not None:
        return
    job.send_signal(signal.SIGTERM)
    try:
        job.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        job.kill()
        job.wait()


def _what_failed(module: str, logs: Path, returncode: int) -> str:
    errors = sorted(logs.glob("rank*.error"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        first = errors[0]
        log = first.with_suffix(".log")
        return f"{module}: {first.stem} failed:\n{first.read_text()}\nIts log: {log}"
    log = logs / "launcher.log"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
    return (
        f"{module}: torchrun ended with code {returncode} and no rank left a traceback "
        f"(killed, or out of memory?). Last lines of {log}:\n{tail}"
    )
