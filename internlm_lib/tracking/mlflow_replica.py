"""Brings MLflow up to date with a run's journals, each point once.

One parent run per kit run; under it one run per execution of a stage, and one per attempt of a
training, named `03_train-reference` or `03_train-candidate`. The journals stay the truth: what a
dead store missed is sent by the next call.
"""

import yaml

from internlm_lib.errors import InputError, KitError
from internlm_lib.run_folder import RunFolder
from internlm_lib.tracking.mlflow_store import ExperimentStore, load, locked, store_uri
from internlm_lib.tracking.replay import Session, StageReplay, TrainingReplay
from internlm_lib.tracking.replica_state import (
    TRAINING_JOURNALS,
    ReplicaState,
    Status,
    load_state,
)


def sync(folder: RunFolder) -> int:
    """Send what MLflow does not have yet; returns the number of journal events sent.

    Raises:
        InputError: there is no such run.
        KitError: the store cannot be reached or refuses; nothing is lost, call again later.
    """
    if not folder.experiment.exists():
        raise InputError(f"{folder.path}: no such run; `ls runs` shows the runs there are")
    values = yaml.safe_load(folder.experiment.read_text(encoding="utf-8"))
    tracking = values["tracking"]
    uri = store_uri(folder.root, tracking["uri"])
    with locked(folder.path / "mlflow.lock"):
        state = load_state(folder, uri)
        if not state.has_new_events(folder):
            return 0
        load()
        from mlflow.exceptions import MlflowException

        try:
            store = ExperimentStore.open(folder.root, tracking["uri"], tracking["experiment"])
            if state.parent is not None and not store.has(state.parent.run_id):
                state = ReplicaState(uri)
            return _replay(Session(folder, store, state, values))
        except (MlflowException, OSError) as error:
            raise KitError(
                f"MLflow store {uri}: {error}; nothing is lost, the journal has it: mend the "
                f"store, or set tracking.uri, then `internlm sync {folder.name}`"
            ) from error


def _replay(session: Session) -> int:
    trainings = [TrainingReplay(session, role) for role in TRAINING_JOURNALS]
    sent = StageReplay(session).replay() + sum(training.replay() for training in trainings)
    for training in trainings:
        training.close_lost()
    _update_parent(session)
    session.state.save(session.folder)
    return sent


def _update_parent(session: Session) -> None:
    """The kit run runs while anything below it does, and failed if anything of it did."""
    parts = [*session.state.stages.values(), *session.state.trainings.values()]
    if session.state.parent is None or not parts:
        return
    order: tuple[Status, ...] = ("RUNNING", "FAILED", "KILLED", "FINISHED")
    status = min((part.status for part in parts), key=order.index)
    time = max(part.last_time for part in parts)
    session.close(session.state.parent, status, time)
