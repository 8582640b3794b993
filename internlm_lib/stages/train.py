"""Stage 03: train every layout of the experiment from the same weights, each by its own engine.

The work is done in ranks (`training/worker.py`); this process starts them and follows the journal.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from internlm_lib.data.corpora import recorded_corpora
from internlm_lib.devices import select_device
from internlm_lib.devices.base import check_world_size
from internlm_lib.errors import KitError
from internlm_lib.files import read_json
from internlm_lib.journal import read_journal
from internlm_lib.ranks.render import torchrun_lines
from internlm_lib.reporting.performance import performance, step_times
from internlm_lib.reporting.training import LoggedTraining, read_training
from internlm_lib.stages.stage import Stage
from internlm_lib.training.nodes import Nodes, plan_training
from internlm_lib.training.profile import check_steps, slowest_operators
from internlm_lib.training.recompute import MIB
from internlm_lib.training.schedule import learning_rate
from internlm_lib.training.supervise import train_role, trainings_left
from internlm_lib.weights.start import starting_folder

_CURVE_POINTS = 200
_BEFALLEN = ("checkpoint", "checkpoint_failed", "bad_step", "restart")


def check_inputs(stage: Stage) -> list[dict[str, Any]]:
    """Refuse what cannot run before any rank starts; returns table rows, one per training.

    Raises:
        MissingStageError: token files or converted weights are not there.
        InputError: too few devices on this machine.
    """
    for path in recorded_corpora(stage.folder).files():
        stage.needs(path, "01_prepare")
    stage.needs(starting_folder(stage.folder, stage.experiment.model), "02_convert")
    training, device = stage.experiment.training, select_device(stage.experiment.parallel.device)
    rows = []
    for role in stage.experiment.roles:
        layout = stage.experiment.layout(role)
        check_world_size(device, layout.world_size, f"parallel.{role}")
        rows.append(
            {
                "training": role,
                "layout": layout.label,
                "ranks": layout.world_size,
                "device": device.name,
                "micro-batches per step": _span(
                    training.num_micro_batches(layout, 1), training.num_micro_batches(layout)
                ),
                "tokens per step": _span(
                    training.batch_size(1) * training.seq_length,
                    training.global_batch_size * training.seq_length,
                ),
                "steps": training.train_iters,
                "recompute": training.recompute_policy,
            }
        )
    return rows


def launch_plan(stage: Stage) -> list[dict[str, Any]]:
    """The command that starts each training's ranks, one row per training."""
    plans = {
        role: plan_training(stage.folder, stage.experiment, role, Nodes())
        for role in stage.experiment.roles
    }
    return [
        {"training": role, "ranks": plan.world_size, "command": torchrun_lines(plan)[0]}
        for role, plan in plans.items()
    ]


def draw_schedule(stage: Stage) -> Path:
    """Draw the learning rate over the steps, with its CSV beside; returns the PNG."""
    from internlm_lib.reporting.figures import schedule_figure

    training = stage.experiment.training
    stride = max(1, training.train_iters // _CURVE_POINTS)
    steps = [*range(1, training.train_iters, stride), training.train_iters]
    rows = [
        {
            "step": step,
            "learning_rate": learning_rate(training, step),
            "global_batch_size": training.batch_size(step),
        }
        for step in steps
    ]
    stage.table("schedule", rows)
    return stage.figure("schedule", schedule_figure(rows))


def train(
    stage: Stage, show: Callable[[str], None] = lambda text: None, *, profile: bool = False
) -> list[dict[str, Any]]:
    """Train all roles, one after the other; returns table rows of what came out.

    After an interruption it goes on with the one that was not finished.

    Args:
        show: told the latest step, loss, tokens/s and time left, in a line of text.
        profile: trace some steps of every rank; `profiles` reads what it leaves.
    Raises:
        WorkerError: a rank failed, or all hung, and no restart is left.
        StoppedError: asked to stop; the same command goes on from there.
        InputError: too few steps to be profiled.
    """
    if profile:
        check_steps(stage.experiment.training.train_iters)
    for role in trainings_left(stage.folder, stage.experiment):
        arguments = ("--profile",) if profile else ()
        plan = plan_training(stage.folder, stage.experiment, role, Nodes(), *arguments)
        train_role(plan, stage.experiment, role, show)
    rows = [
        {"training": role, "layout": training.start["layout"], **_numbers(training)}
        for role, training in _trainings(stage).items()
    ]
    stage.table("training", rows)
    return rows


def recompute_rows(stage: Stage) -> list[dict[str, Any]]:
    """What each training recomputes, one row per part of a layer, as it was measured and chosen;
    no rows without `training.auto_recompute_device_memory_mib`."""
    records = {role: stage.folder.training(role).recompute for role in stage.experiment.roles}
    return [
        {"training": role, **row}
        for role, path in records.items()
        if path.exists() and stage.experiment.training.auto_recompute_device_memory_mib
        for row in read_json(path)["rows"]
    ]


def draw_losses(stage: Stage) -> Path:
    """Draw the loss of every training; returns the PNG."""
    from internlm_lib.reporting.figures import loss_figure

    return stage.figure("training_loss", loss_figure(**_trainings(stage)))


def draw_times(stage: Stage) -> Path:
    """Draw where the time of a step went, per training, with its CSV beside; returns the PNG."""
    from internlm_lib.reporting.figures import step_times_figure

    rows = [step_times(training, role) for role, training in _trainings(stage).items()]
    stage.table("step_times", rows)
    return stage.figure("step_times", step_times_figure(rows))


def draw_devices(stage: Stage) -> Path:
    """Draw what the devices did over time, per training, with its CSV beside; returns the PNG."""
    from internlm_lib.reporting.device_figure import device_figure
    from internlm_lib.reporting.device_use import device_rows, read_devices

    found = [
        read_devices(stage.folder.training(role), training.name)
        for role, training in _trainings(stage).items()
    ]
    stage.table("devices", device_rows(found))
    return stage.figure("devices", device_figure(found))


def resources(stage: Stage) -> list[dict[str, Any]]:
    """Memory and what befell each training, one row per training; also `resources.csv`."""
    rows = [
        _resources(training, _newest_training(stage.folder.training(role).journal))
        for role, training in _trainings(stage).items()
    ]
    stage.table("resources", rows)
    return rows


def profiles(stage: Stage) -> dict[str, list[dict[str, Any]]]:
    """Of every training the rows of `slowest_operators`, written as `profile_<role>.csv` too.

    Raises KitError if a training was not profiled.
    """
    found: dict[str, list[dict[str, Any]]] = {
        role: slowest_operators(stage.folder.training(role).profile)
        for role in stage.experiment.roles
    }
    for role, rows in found.items():
        stage.table(f"profile_{role}", rows)
    return found


def summarize(stage: Stage) -> dict[str, Any]:
    """The stage's result: `reference` (None without one) and `candidate`."""
    rows = {
        role: {
            "engine": training.start["engine"],
            "layout": training.start["layout"],
            **_numbers(training),
        }
        for role, training in _trainings(stage).items()
    }
    return {"reference": None, **rows}


def check_losses(result: Mapping[str, Any]) -> str:
    """Says how the loss went.

    Raises KitError if a training ended with a higher loss than it began with.
    """
    parts = []
    for role, row in result.items():
        if row is None:
            continue
        line = f"{role} loss {row['loss_first']:.4g} → {row['loss_last']:.4g}"
        if row["loss_last"] > row["loss_first"]:
            raise KitError(
                f"03_train: the {line}: it rose; lower training.lr, lengthen the warm-up, or look "
                "at the first batches in 01_prepare"
            )
        parts.append(line)
    return "; ".join(parts)


def run(
    stage: Stage, show: Callable[[str], None] = lambda text: None, *, profile: bool = False
) -> dict[str, Any]:
    """All steps in order; returns the stage's result. Raises what `check_losses` raises."""
    check_inputs(stage)
    draw_schedule(stage)
    train(stage, show, profile=profile)
    draw_losses(stage)
    draw_times(stage)
    resources(stage)
    draw_devices(stage)
    result = summarize(stage)
    check_losses(result)
    return result


def _resources(training: LoggedTraining, journal: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts are over all attempts; memory is rank 0's, resident on a CPU, else the device's."""
    of_kind = {kind: [e for e in journal if e["event"] == kind] for kind in _BEFALLEN}
    saved = of_kind["checkpoint"]
    return {
        "training": training.start["role"],
        "layout": training.start["layout"],
        "peak_memory_mib": float(training.column("memory_bytes").max()) / MIB,
        "checkpoints": len(saved),
        "checkpoint_mib": saved[-1]["bytes"] / MIB if saved else None,
        "stall_seconds_per_checkpoint": median(e["stall_seconds"] for e in saved)
        if saved
        else None,
        "checkpoints_failed": len(of_kind["checkpoint_failed"]),
        "batches_left_out": len(of_kind["bad_step"]),
        "restarts": len(of_kind["restart"]),
    }


def _span(first: int, full: int) -> int | str:
    """One number, or two where the batch ramps up."""
    return full if first == full else f"{first} to {full}"


def _newest_training(journal: Path) -> list[dict[str, Any]]:
    """The events since step 1 was last begun: those of earlier trainings stay in a journal."""
    found: list[dict[str, Any]] = []
    for event, _ in read_journal(journal):
        if event["event"] == "start" and event["first_step"] == 1:
            found = []
        found.append(event)
    return found


def _trainings(stage: Stage) -> dict[str, LoggedTraining]:
    return {
        role: read_training(stage.folder.training(role).journal, role)
        for role in stage.experiment.roles
    }


def _numbers(training: LoggedTraining) -> dict[str, float]:
    """First and last loss in nats per token; the median rate over all devices together."""
    row = performance(training, training.start["role"])
    return {
        "loss_first": float(training.losses[0]),
        "loss_last": float(training.losses[-1]),
        "tokens_per_second": row["tokens_per_second_per_device"] * row["devices"],
    }
