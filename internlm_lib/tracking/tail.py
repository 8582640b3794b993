"""Mirrors a run's journals into MLflow from a process of its own, while a stage works.

The stage only appends to its journal. This process reads the journal every ten seconds and
sends on what is new, so that a slow or dead tracking server can neither delay nor stop a stage.
Not more often: sending anything costs some 50 ms of a core that ranks may need.
It ends with its parent, however that ends.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

from internlm_lib.run_folder import RunFolder

OWNER_VARIABLE = "INTERNLM_TAIL"
"""Environment variable holding the name of the run that a parent process already mirrors."""

INTERVAL_SECONDS = 10.0
_STOP_SECONDS = 60.0
_STOP_WORD = b"stop\n"


@dataclass
class Tail:
    """Handle of the mirroring process; without a process, every method does nothing."""

    folder: RunFolder
    process: "subprocess.Popen[bytes] | None" = None

    @classmethod
    def start(cls, folder: RunFolder) -> "Tail":
        """Start mirroring `folder`'s journals.

        Does nothing where a parent process mirrors this run already (`OWNER_VARIABLE`); called
        again in the same process, as when a notebook cell is run twice, returns the same tail.
        """
        if os.environ.get(OWNER_VARIABLE) == folder.name:
            return cls(folder)
        tail = _running.get(folder.path)
        if tail is None or not tail.alive:
            tail = _running[folder.path] = cls(folder, _start_process(folder))
        return tail

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Have everything sent that is in the journals, and end the process.

        Warns, and goes on, if that takes over a minute or the store refuses: the journal holds
        everything, and `internlm sync` sends it later.
        """
        if self.process is None:
            return
        _running.pop(self.folder.path, None)
        process, self.process = self.process, None
        try:
            process.communicate(_STOP_WORD, timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        if process.returncode != 0:
            name = self.folder.name
            warnings.warn(
                f"MLflow did not get everything of run {name!r} (why: {log_path(self.folder)}); "
                f"nothing is lost, the journal has it: `internlm sync {name}` sends the rest",
                RuntimeWarning,
                stacklevel=2,
            )


_running: dict[Path, Tail] = {}


def log_path(folder: RunFolder) -> Path:
    """What the mirroring process had to say."""
    return folder.path / "logs" / "mlflow.log"


def _start_process(folder: RunFolder) -> "subprocess.Popen[bytes]":
    log = log_path(folder)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder.root), folder.name],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
        )


def main(root: str, run: str) -> int:
    """The mirroring process; returns 0 if its last pass sent everything."""
    # Ctrl-C reaches the whole process group; the parent decides what it means, and still stops us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    from internlm_lib.tracking import mlflow_replica, mlflow_store

    mlflow_store.load()
    folder, reported = RunFolder.of(run, Path(root)), ""
    while True:
        stopping = _wait_for_stop(INTERVAL_SECONDS)
        try:
            mlflow_replica.sync(folder)
            problem = ""
        except Exception:  # whatever the store does, mirroring goes on with the next pass
            problem = traceback.format_exc()
        if problem and (stopping or problem != reported):
            print(time.strftime("%Y-%m-%d %H:%M:%S"), problem, flush=True)
        reported = problem
        if stopping:
            return 1 if problem else 0


def _wait_for_stop(seconds: float) -> bool:
    """True once the parent asks for the last pass; ends this process if the parent is gone."""
    readable, _, _ = select.select([0], [], [], seconds)
    if not readable:
        return False
    if os.read(0, len(_STOP_WORD)) != _STOP_WORD:
        os._exit(1)
    return True


def _end_with_parent(parent: int) -> None:
    """Closed pipes are not enough: a pass may hang in the store while the parent dies."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
