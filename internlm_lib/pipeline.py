"""Runs the six notebooks through papermill: skips what has not changed, resumes what failed.

papermill's exit and the cells' metadata are not evidence of success (a killed kernel leaves its
cell marked "completed"): a stage is done when its notebook came to its end and its status file
says so.
"""

import difflib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_lib import errors
from internlm_lib.errors import InputError, KitError, NotComparableError, VerdictError
from internlm_lib.experiment.load import load_experiment, save_experiment
from internlm_lib.experiment.schema import Experiment
from internlm_lib.files import read_json
from internlm_lib.ranks.stopping import terminated_as_interrupted
from internlm_lib.run_folder import RunFolder, project_root
from internlm_lib.stages.inputs import inputs_of, record_inputs, what_changed
from internlm_lib.stages.stage import STAGES, record_failure, status_path
from internlm_lib.tracking.tail import OWNER_VARIABLE, Tail

_FINDINGS = (VerdictError.__name__, NotComparableError.__name__)
"""Errors that are a result of the comparison: the stages after it are still worth running."""


_NOT_FINISHED = (
    "the notebook came to its end without stage.finish(...): its status file does not say done; "
    "the last cell of the notebook must call it"
)
_INTERRUPTED = "stopped by a signal; the same command goes on with this stage"


@dataclass(frozen=True)
class Event:
    """Told to `on_event` when a stage starts (`running`) and when it is over."""

    folder: RunFolder
    stage: str
    status: str
    """`running`, `done`, `unchanged` or `failed`."""
    seconds: float = 0.0
    detail: str = ""
    """Why a stage runs, or the error it ended with."""


@dataclass(frozen=True)
class Failure:
    """How a stage ended that is not done."""

    stage: str
    kind: str
    """Class name of the error, e.g. `WorkerError`."""
    message: str
    notebook: str
    """The executed notebook, relative to the project's root."""
    log: str | None = None
    """The log to read, relative to the project's root."""

    @property
    def exit_code(self) -> int:
        """The command line's, by the kind of error."""
        return getattr(getattr(errors, self.kind, KitError), "exit_code", KitError.exit_code)


def run_pipeline(
    params_path: Path,
    *,
    run_name: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    only: Sequence[str] = (),
    start_from: str | None = None,
    force: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Run an experiment's stages and write its report.

    Args:
        params_path: the params file.
        run_name: instead of the file's own.
        overrides: flat dict of dotted keys, as `--set` gives it.
        only: stages to run; all by default.
        start_from: leave out the stages before this one.
        force: run stages whose inputs have not changed, too.
        on_event: called in this thread at the start and the end of every stage.
    Returns:
        The summary (see `summarize`), with `error` in it if a stage failed.
    Raises:
        InputError: before anything starts: the experiment, the run's name or a stage's name.
        KitError: another pipeline works on this run.
    """
    named, experiment = load_experiment(params_path, overrides)
    folder = RunFolder.of(run_name or named, project_root())
    chosen = _choose(only, start_from)
    _check_questions(chosen, experiment)
    with _exclusive(folder), terminated_as_interrupted(), _mirrored(folder, experiment):
        pipeline = _Pipeline(folder, experiment, force, on_event)
        pipeline.run(chosen)
    return summarize(folder, pipeline.outcome, pipeline.failure)


class _Pipeline:
    """The stages of one call, and how they ended."""

    def __init__(
        self,
        folder: RunFolder,
        experiment: Experiment,
        force: bool,
        on_event: Callable[[Event], None],
    ) -> None:
        self.folder = folder
        self.experiment = experiment
        self.force = force
        self.on_event = on_event
        self.outcome: dict[str, dict[str, Any]] = {}
        """Stage → `status` and `seconds`, in the order they ran."""
        self.failure: Failure | None = None

    def run(self, stages: Sequence[str]) -> None:
        """Run stages up to the first that fails for another reason than its verdict."""
        for stage in stages:
            failure = self._run_stage(stage)
            self.failure = failure or self.failure
            if failure and failure.kind not in _FINDINGS:
                break
        _write_report(self.folder)

    def _run_stage(self, stage: str) -> Failure | None:
        inputs = inputs_of(stage, self.folder, self.experiment)
        changed = what_changed(stage, self.folder, inputs)
        executed = _executed(self.folder, stage)
        if not changed and executed.exists() and not self.force:
            self._tell(stage, "unchanged", 0.0)
            return None
        self._tell(stage, "running", 0.0, _why(changed, self.force))
        started = time.time()
        failure = self._execute(stage, executed, started)
        if failure is None:
            record_inputs(stage, self.folder, inputs)
        status, detail = ("failed", failure.message) if failure else ("done", "")
        self._tell(stage, status, round(time.time() - started, 2), detail)
        return failure

    def _execute(self, stage: str, executed: Path, started: float) -> Failure | None:
        """Execute a stage's notebook and keep an HTML copy."""
        from internlm_lib.reporting.page import notebook_to_html

        failure = None
        try:
            _papermill(self.folder, stage, executed, self._parameters())
            if not _is_done(self.folder, stage, started):
                failure = self._failure(stage, "KitError", _NOT_FINISHED, executed, started)
        except KeyboardInterrupt:
            failure = self._failure(stage, "Interrupted", _INTERRUPTED, executed, started)
        except Exception as error:
            kind, message = _kind_and_message(error)
            failure = self._failure(stage, kind, message, executed, started)
        if failure is not None:
            record_failure(self.folder, stage, started, failure.message)
        if executed.exists():
            notebook_to_html(executed)
        return failure

    def _failure(
        self, stage: str, kind: str, message: str, executed: Path, started: float
    ) -> Failure:
        root = self.folder.root
        log = _newest_log(self.folder, started)
        return Failure(
            stage,
            kind,
            message,
            str(executed.relative_to(root)),
            str(log.relative_to(root)) if log else None,
        )

    def _parameters(self) -> dict[str, Any]:
        return {"run_name": self.folder.name, **self.experiment.model_dump(mode="json")}

    def _tell(self, stage: str, status: str, seconds: float, detail: str = "") -> None:
        if status != "running":
            self.outcome[stage] = {"status": status, "seconds": seconds}
        self.on_event(Event(self.folder, stage, status, seconds, detail))


def summarize(
    folder: RunFolder, outcome: Mapping[str, Mapping[str, Any]], failure: Failure | None
) -> dict[str, Any]:
    """What a run came to, from its stages' results; None where a stage has none yet.

    Keys: `run`, `stages` (name → `status`, `seconds` spent now), `reference`, `candidate`,
    `compare`, `accuracy`, `report` (path from the project's root), and `error` after a failure.
    """
    results = {status["stage"]: status["result"] for status in _statuses(folder)}
    train = results.get("03_train", {})
    compare, accuracy = results.get("04_compare", {}), results.get("06_evaluate", {})
    names = ("mean_relative_error", "max_relative_error", "max_absolute_error", "verdict")
    summary = {
        "run": folder.name,
        "stages": {stage: dict(values) for stage, values in outcome.items()},
        "reference": train.get("reference"),
        "candidate": train.get("candidate"),
        "compare": {name: compare.get(name) for name in names},
        "accuracy": {n: (accuracy.get("accuracy") or {}).get(n) for n in ("before", "after")},
        "report": str((folder.report / "index.html").relative_to(folder.root)),
    }
    if failure is not None:
        summary["error"] = {**vars(failure), "exit_code": failure.exit_code}
    return summary


def _choose(only: Sequence[str], start_from: str | None) -> list[str]:
    for name in [*only, *([start_from] if start_from else [])]:
        if name not in STAGES:
            near = difflib.get_close_matches(name, STAGES, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{name!r} is no stage; there are {', '.join(STAGES)}{hint}")
    first = STAGES.index(start_from) if start_from else 0
    chosen = [stage for stage in STAGES[first:] if not only or stage in only]
    if not chosen:
        raise InputError(f"--only and --from leave no stage to run; --from is {start_from}")
    return chosen


def _check_questions(stages: Sequence[str], experiment: Experiment) -> None:
    """Refuse now what 06_evaluate would refuse after the training."""
    own_data = experiment.data.train_path is not None
    if "06_evaluate" in stages and own_data and experiment.evaluation.questions_path is None:
        others = ",".join(stage for stage in stages if stage != "06_evaluate")
        raise InputError(
            "evaluation.questions_path is null, and with data.train_path there is no pocket world "
            "to ask about: 06_evaluate would have no questions; give a folder in MMLU's layout "
            f"(dev/, test/), or leave the stage out: --only {others}"
        )


def _papermill(
    folder: RunFolder, stage: str, executed: Path, parameters: Mapping[str, Any]
) -> None:
    """Execute a stage's notebook in the project's root; the copy is written as it goes."""
    import papermill
    from traitlets.config import Config

    source = folder.root / "notebooks" / f"{stage}.ipynb"
    if not source.exists():
        raise InputError(f"{source}: no such notebook; run from a checkout of the kit")
    executed.parent.mkdir(parents=True, exist_ok=True)
    # Over TCP, notebooks started at the same time can pick the same ports, and anyone on the
    # machine can read along; sockets in a private folder have neither trouble. A socket's path
    # is at most 107 bytes long: not below TMPDIR, which may be anywhere.
    with tempfile.TemporaryDirectory(prefix="internlm-", dir="/tmp") as sockets:
        connection = {"transport": "ipc", "connection_file": f"{sockets}/kernel.json"}
        papermill.execute_notebook(
            str(source),
            str(executed),
            parameters=dict(parameters),
            cwd=str(folder.root),
            progress_bar=False,
            log_output=False,
            config=Config({"KernelManager": connection}),
        )


def _kind_and_message(error: Exception) -> tuple[str, str]:
    """Class name and message of what went wrong, a cell's own error rather than papermill's."""
    kind = getattr(error, "ename", type(error).__name__)
    if kind == "NoSuchKernel":
        return kind, f"{error}; `make env` registers it, `internlm doctor` says what is there"
    message = str(getattr(error, "evalue", error))
    return kind, message if hasattr(errors, kind) else f"{kind}: {message}"


def _newest_log(folder: RunFolder, started: float) -> Path | None:
    """The log a rank of this stage wrote last; a failed rank's traceback before all others."""
    found = (p for p in folder.path.glob("*/**/logs/*") if p.is_file())
    logs = [p for p in found if p.stat().st_mtime >= started]
    errors_first = sorted(logs, key=lambda p: (p.suffix == ".error", p.stat().st_mtime))
    return errors_first[-1] if errors_first else None


def _executed(folder: RunFolder, stage: str) -> Path:
    return folder.report / "notebooks" / f"{stage}.ipynb"


def _is_done(folder: RunFolder, stage: str, started: float) -> bool:
    path = status_path(folder, stage)
    return path.exists() and (s := read_json(path))["status"] == "done" and s["time"] >= started


def _why(changed: Sequence[str], force: bool) -> str:
    if changed and changed != ["not done yet"]:
        return f"changed: {', '.join(changed)}"
    return "forced" if force and not changed else ""


def _statuses(folder: RunFolder) -> list[dict[str, Any]]:
    """Status records of the stages that were ever begun, in order."""
    paths = [status_path(folder, stage) for stage in STAGES]
    return [read_json(path) for path in paths if path.exists()]


def _write_report(folder: RunFolder) -> None:
    from internlm_lib.reporting.page import write_index

    write_index(folder, {}, _statuses(folder))


@contextmanager
def _exclusive(folder: RunFolder) -> Iterator[None]:
    """Only one pipeline may write into a run; the lock goes with the process that holds it."""
    folder.path.mkdir(parents=True, exist_ok=True)
    with (folder.path / "pipeline.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise KitError(
                f"run {folder.name!r} is being worked on by another `internlm run`; wait for it, "
                "or choose another --run-name"
            ) from error
        yield


@contextmanager
def _mirrored(folder: RunFolder, experiment: Experiment) -> Iterator[None]:
    """Mirror the run's journals into MLflow meanwhile, so that no kernel has to."""
    save_experiment(folder.experiment, folder.name, experiment)
    tail = Tail.start(folder)
    before = os.environ.get(OWNER_VARIABLE)
    os.environ[OWNER_VARIABLE] = folder.name
    try:
        yield
    finally:
        os.environ.pop(OWNER_VARIABLE)
        if before is not None:
            os.environ[OWNER_VARIABLE] = before
        tail.stop()
