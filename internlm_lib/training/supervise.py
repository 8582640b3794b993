"""One training from its first rank's start to its end: watched, and started again if it breaks."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from internlm_lib import provenance
from internlm_lib.errors import RanksHangError, WorkerError
from internlm_lib.experiment.schema import Experiment, Role
from internlm_lib.journal import Journal, events
from internlm_lib.ranks.launch import launch_node
from internlm_lib.ranks.plan import LaunchPlan
from internlm_lib.run_folder import RunFolder, TrainingFolder
from internlm_lib.tracking.device_sampler import Sampling, sampled
from internlm_lib.training.progress import TrainingProgress


def train_role(
    plan: LaunchPlan, experiment: Experiment, role: str, show: Callable[[str], None]
) -> None:
    """Train one layout on this machine, going on where an unfinished attempt stopped.

    Args:
        plan: of one node.
        show: told the latest step, loss, tokens/s and time left, in a line of text.
    Raises:
        WorkerError: the ranks failed or hung, and `training.max_restarts` is used up.
        StoppedError: asked to stop; the state is saved.
    """
    files = plan.folder.training(role)
    if not is_unfinished(files, experiment):
        shutil.rmtree(files.checkpoint, ignore_errors=True)
        shutil.rmtree(files.checkpoints, ignore_errors=True)
    for restarts in range(experiment.training.max_restarts + 1):
        try:
            follow_ranks(plan, experiment, role, show)
            return
        except WorkerError as error:
            if restarts == experiment.training.max_restarts:
                raise
            Journal(files.journal).write("restart", restarts=restarts + 1, error=str(error))
            show(f"{role}: {str(error).splitlines()[0]}; starting again ({restarts + 1})")


def is_unfinished(files: TrainingFolder, experiment: Experiment) -> bool:
    """Whether an attempt at this very experiment left checkpoints and did not end."""
    attempt = _last_attempt(files, experiment)
    return attempt is not None and attempt.ended is None and files.checkpoints.is_dir()


def trainings_left(folder: RunFolder, experiment: Experiment) -> Sequence[Role]:
    """The trainings that an interrupted execution of them all has not finished; else all of them.

    Each begins after the end of the one before it.
    """
    finished = 0.0
    for number, role in enumerate(experiment.roles):
        attempt = _last_attempt(folder.training(role), experiment)
        if attempt is None or attempt.ended is None or attempt.started < finished:
            return experiment.roles[number:]
        finished = attempt.ended
    return experiment.roles


@dataclass(frozen=True)
class _Attempt:
    started: float
    ended: float | None
    """None if it did not come to its last step."""


def _last_attempt(files: TrainingFolder, experiment: Experiment) -> _Attempt | None:
    """The last start of a training of this very experiment; None if there is none."""
    starts = events(files.journal, "start")
    same = provenance.sha256_of_experiment(experiment)
    if not starts or starts[-1]["tags"]["config_sha256"] != same:
        return None
    started = starts[-1]["time"]
    ends = [e for e in events(files.journal, "end") if e["time"] > started]
    done = ends and ends[-1]["status"] == "done" and files.checkpoint.is_dir()
    return _Attempt(started, ends[-1]["time"] if done else None)


def follow_ranks(
    plan: LaunchPlan,
    experiment: Experiment,
    role: str,
    show: Callable[[str], None],
    node_rank: int = 0,
) -> None:
    """Run a node's ranks once, to their end, or until they hang, and sample its devices meanwhile.

    Raises as `train_role`.
    """
    files = plan.folder.training(role)
    progress = TrainingProgress(files.journal)
    watch = _HangWatch(files, experiment.training.hang_timeout_seconds)

    def tick() -> None:
        show(f"{role}: {progress.text() or 'starting'}")
        watch.check()

    sampling = Sampling(
        files.devices(node_rank), experiment.tracking.device_sample_seconds, plan.device,
        plan.module, node_rank, plan.nnodes, started=lambda: progress.started,
    )  # fmt: skip
    with sampled(sampling):
        launch_node(plan, node_rank, on_tick=tick)
        show(f"{role}: {progress.text()}")


_SECONDS_TO_START = 1800.0
"""Until a training's first event: large weights take long to load."""


class _HangWatch:
    """Notices that a training's journal has not grown for too long."""

    def __init__(self, files: TrainingFolder, timeout: float | None) -> None:
        self._files = files
        self._timeout = timeout
        self._size = self._begin = self._current_size()
        self._since = time.monotonic()

    def check(self) -> None:
        if self._timeout is None:
            return
        size, now = self._current_size(), time.monotonic()
        started = size != self._begin
        allowed = self._timeout if started else max(self._timeout, _SECONDS_TO_START)
        if size != self._size:
            self._size, self._since = size, now
        elif now - self._since > allowed:
            steps = events(self._files.journal, "step") if started else []
            last = f"step {steps[-1]['step']}" if steps else "the start"
            raise RanksHangError(
                f"no step for {allowed:g} s (training.hang_timeout_seconds) after {last}: "
                "the ranks hang and are stopped. The stacks of all threads of each rank are in "
                f"{self._files.logs}/rank*.log"
            )

    def _current_size(self) -> int:
        journal = self._files.journal
        return journal.stat().st_size if journal.exists() else 0
