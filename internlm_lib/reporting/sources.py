"""Where a training to compare is read from: a run of the kit, an MLflow run, or a log file."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import ROLES
from internlm_lib.reporting.training import LoggedTraining, from_events
from internlm_lib.run_folder import RunFolder, is_run_name


def open_training(
    source: str,
    role: str,
    root: Path,
    *,
    tracking_uri: str | None = None,
) -> LoggedTraining:
    """Read a training.

    Args:
        source: a run's name (its candidate; `RUN/reference` is its reference), an MLflow run id,
            or the path of a log file.
        role: what it is here: "reference" or "candidate".
        root: the project, whose `runs/` and MLflow store are meant.
        tracking_uri: where MLflow run ids are looked up; None is the project's own store.
    Raises:
        InputError: there is no such training, or it recorded no step.
    """
    events, origin = _events(source, root, tracking_uri)
    training = from_events(events, role, origin)
    if training is None:
        raise InputError(f"--{role} {source}: {origin} recorded no step; train that run first")
    return training


def source_path(source: str, root: Path) -> Path:
    """The file that a training is read from; one that does not exist if it lies elsewhere."""
    return _journal(source, root) or Path(source)


def _events(
    source: str, root: Path, tracking_uri: str | None
) -> tuple[Iterable[Mapping[str, Any]], str]:
    from internlm_lib.journal import read_journal
    from internlm_lib.logs.read import read_log
    from internlm_lib.tracking.mlflow_runs import RUN_ID, training_events

    if journal := _journal(source, root):
        return (event for event, _ in read_journal(journal)), f"run {source}"
    if Path(source).is_file():
        return read_log(Path(source)), f"log {Path(source).name}"
    if RUN_ID.fullmatch(source):
        return training_events(root, tracking_uri, source), f"MLflow run {source}"
    raise InputError(f"{source!r} is no run, no MLflow run id and no file; {_known(source, root)}")


def _journal(source: str, root: Path) -> Path | None:
    """The journal of a run of the kit, if the source names one that has been trained."""
    name, _, role = source.partition("/")
    if role not in ("", *ROLES) or not is_run_name(name):
        return None
    journal = RunFolder.of(name, root).training(role or "candidate").journal
    return journal if journal.exists() else None


def _known(source: str, root: Path) -> str:
    journals = (root / "runs").glob("*/training/candidate/journal.jsonl")
    runs = sorted(journal.parents[2].name for journal in journals)
    near = difflib.get_close_matches(source, runs, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}runs here: {', '.join(runs) or 'none'}"
