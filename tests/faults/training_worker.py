"""The training's own worker, in which something goes wrong once: which attempt, step and rank.

`python -m tests.faults.training_worker RUN_FOLDER ROLE`; faults stand in `faults.json` of the run.
"""

import os
import resource
import signal
import time
from collections.abc import Callable
from typing import Any

from internlm_lib.files import read_json
from internlm_lib.journal import events
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder
from internlm_lib.training.worker import train_role


def work(folder: RunFolder, role: str) -> None:
    attempt = len(events(folder.training(role).journal, "start")) + 1
    fault = read_json(folder.path / "faults.json").get(str(attempt), {})
    _at_step(fault, {"kill": _kill, "hang": _hang, "full disk": _fill, "nan": _spoil})
    train_role(folder, role)


def _at_step(fault: dict[str, Any], ways: dict[str, Callable[[], float]]) -> None:
    """Make the loop stumble when it judges the loss of a step, on one rank or on all."""
    from internlm_lib.training import guard

    judge = guard.StepGuard.fault

    def judge_or_fail(self: guard.StepGuard, loss: float) -> str:
        step = len(self.recent) + 1
        for what, (at, rank) in fault.items():
            if step == at and rank in (None, int(os.environ["RANK"])):
                loss += ways[what]()
        return judge(self, loss)

    guard.StepGuard.fault = judge_or_fail  # type: ignore[method-assign]


def _kill() -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


def _hang() -> float:
    while True:
        time.sleep(1)


def _fill() -> float:
    """No file of this rank may grow over 100 kB from here to the next step but one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    return 0.0


def _spoil() -> float:
    return float("nan")


if __name__ == "__main__":
    rank_main(work)
