"""One execution of one stage: what it was asked, where it writes, how it ended.

The status file `runs/<run>/stages/<stage>.json` is the evidence that a stage succeeded: a
notebook's cell metadata is not (a killed kernel leaves its cell marked "completed").
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm_lib.errors import MissingStageError
from internlm_lib.experiment.load import from_notebook, save_experiment
from internlm_lib.experiment.schema import Experiment
from internlm_lib.files import read_json, write_json
from internlm_lib.journal import Journal
from internlm_lib.run_folder import RunFolder
from internlm_lib.tracking.tail import Tail

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

STAGES = ("01_prepare", "02_convert", "03_train", "04_compare", "05_infer", "06_evaluate")


@dataclass
class Record:
    """Where the results of one piece of work are written down: numbers, tables, figures, end."""

    name: str
    folder: RunFolder
    journal: Journal
    tail: Tail
    started: float

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers of this stage, e.g. `{"compare/mean_relative_error": 3e-7}`."""
        self.journal.write("metrics", stage=self.name, values=dict(values), step=step)

    def series(self, name: str, steps: Sequence[int], values: Sequence[float]) -> None:
        """Record one metric's values at many steps, as a curve."""
        self.journal.write(
            "series", stage=self.name, name=name, steps=list(steps), values=list(values)
        )

    def tags(self, values: Mapping[str, str]) -> None:
        self.journal.write("tags", stage=self.name, values=dict(values))

    def artifact(self, *paths: Path) -> None:
        """Name files that belong to this stage's record; they are copied to MLflow as they are."""
        for path in paths:
            relative = path.relative_to(self.folder.root).as_posix()
            self.journal.write("artifact", stage=self.name, path=relative)

    def table(self, name: str, rows: "Sequence[Mapping[str, Any]] | DataFrame") -> None:
        """Write `reports/<run>/tables/<name>.csv`, an artifact of this stage."""
        from internlm_lib.reporting.figures import save_table

        self.artifact(save_table(rows, self.folder.tables / f"{name}.csv"))

    def figure(self, name: str, figure: "Figure") -> Path:
        """Write `reports/<run>/figures/<name>.png` and `.svg`, artifacts; returns the PNG."""
        from internlm_lib.reporting.figures import save_figure

        paths = save_figure(figure, self.folder.figures / name)
        self.artifact(*paths)
        return paths[0]

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write the status file, close the stage in the journal and bring MLflow up to date."""
        status = _write_status(self.folder, self.name, self.started, "done", result)
        self.tail.stop()
        return status

    def fail(self, error: BaseException) -> None:
        """Record that the stage ended in an error, or that its result did not pass its check."""
        record_failure(self.folder, self.name, self.started, str(error))
        Tail.start(self.folder).stop()


@dataclass
class Stage(Record):
    """Handed from cell to cell of a notebook, and to a stage's `run()` by the command line."""

    experiment: Experiment

    def needs(self, path: Path, made_by: str) -> Path:
        """`path`, or MissingStageError naming the stage that makes it."""
        if not path.exists():
            raise MissingStageError(
                f"{path.relative_to(self.folder.root)} is missing, which {made_by} makes; run "
                f"notebooks/{made_by}.ipynb for the run {self.folder.name!r} first "
                f"(or: internlm run PARAMS --run-name {self.folder.name})"
            )
        return path

    def result_of(self, stage: str) -> dict[str, Any]:
        """What an earlier stage's `finish` was given. Raises MissingStageError."""
        status = read_json(self.needs(status_path(self.folder, stage), stage))
        if status["status"] != "done":
            raise MissingStageError(f"{stage} of run {self.folder.name!r} did not finish; run it")
        return status["result"]


def open_stage(name: str, parameters: Mapping[str, Any], root: Path | None = None) -> Stage:
    """Check the parameters and begin a stage.

    Args:
        name: one of `STAGES`.
        parameters: a notebook's `globals()`, or a params file's values.
        root: project root; found from the current folder by default.
    Raises:
        ConfigError: before anything is written.
    """
    run_name, experiment = from_notebook(parameters)
    return begin_stage(name, RunFolder.of(run_name, root), experiment)


def begin_stage(name: str, folder: RunFolder, experiment: Experiment) -> Stage:
    save_experiment(folder.experiment, folder.name, experiment)
    return Stage(**_begin(name, folder), experiment=experiment)


def begin_record(name: str, folder: RunFolder) -> Record:
    """Begin work that is no stage of an experiment; `experiment.yaml` of its run is written."""
    return Record(**_begin(name, folder))


def _begin(name: str, folder: RunFolder) -> dict[str, Any]:
    # What the stage made last time is about to be replaced: the pipeline must not trust it.
    inputs_path(folder, name).unlink(missing_ok=True)
    started = time.time()
    journal, tail = Journal(folder.journal), Tail.start(folder)
    _write_status(folder, name, started, "running", {})
    return {"name": name, "folder": folder, "journal": journal, "tail": tail, "started": started}


def record_failure(folder: RunFolder, name: str, started: float, error: str) -> dict[str, Any]:
    """Write that a stage failed, for one whose kernel could not do so itself; keeps its result.

    A stage may have finished and then failed its check: the numbers are still worth showing.
    """
    path = status_path(folder, name)
    result = read_json(path)["result"] if path.exists() else {}
    return _write_status(folder, name, started, "failed", {**result, "error": error})


def status_path(folder: RunFolder, stage: str) -> Path:
    return folder.path / "stages" / f"{stage}.json"


def inputs_path(folder: RunFolder, stage: str) -> Path:
    """Hashes of what the stage read when it was last done by the pipeline (`stages/inputs.py`)."""
    return folder.path / "stages" / f"{stage}.inputs.json"


def _write_status(
    folder: RunFolder, name: str, started: float, status: str, result: Mapping[str, Any]
) -> dict[str, Any]:
    now = time.time()
    seconds = round(now - started, 2)
    record = {"stage": name, "status": status, "seconds": seconds, "time": now}
    record["result"] = dict(result)
    write_json(status_path(folder, name), record)
    Journal(folder.journal).write("stage", stage=name, status=status, seconds=seconds)
    return record
