"""Stage 04: does the candidate train like the reference, and how fast?

The reference is this run's own reference training, or the candidate of `parallel.reference_run`.
Without either there is no verdict, only the candidate's own curve and throughput.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_lib import provenance
from internlm_lib.errors import MissingStageError, VerdictError
from internlm_lib.files import read_json
from internlm_lib.reporting.loss import (
    LoggedTraining,
    LossComparison,
    compare_losses,
    read_training,
)
from internlm_lib.reporting.performance import throughput, throughput_ratio
from internlm_lib.run_folder import RunFolder
from internlm_lib.stages.stage import Stage

NOT_COMPARED = "not compared"


@dataclass(frozen=True)
class Trainings:
    candidate: LoggedTraining
    reference: LoggedTraining | None

    @property
    def roles(self) -> dict[str, LoggedTraining]:
        """The trainings there are, the reference first."""
        found = {"reference": self.reference, "candidate": self.candidate}
        return {role: training for role, training in found.items() if training is not None}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One table row per training."""
        return [
            {
                "training": training.name,
                "steps": len(training.steps),
                "first_loss": float(training.losses[0]),
                "last_loss": float(training.losses[-1]),
                "tokens_per_step": training.start["tokens_per_step"],
            }
            for training in self.roles.values()
        ]


@dataclass(frozen=True)
class LayoutParity:
    """How far every layout is from one rank, as `benchmarks/parity.py` measured it here."""

    rows: list[dict[str, Any]]
    """One table row per layout; a single row saying how to measure if that was not done."""
    origin: str
    """What was compared, by which commit and on what; empty if it was not measured."""


def load_trainings(stage: Stage) -> Trainings:
    """Read the journals of the candidate and of its reference, if it has one.

    Raises MissingStageError if a training that the experiment asks for has not been made.
    """
    journal = stage.needs(stage.folder.training("candidate").journal, "03_train")
    reference = _reference_journal(stage)
    return Trainings(
        candidate=read_training(journal, "candidate"),
        reference=read_training(reference, "reference") if reference else None,
    )


def compare_loss(stage: Stage, trainings: Trainings) -> LossComparison | None:
    """Statistics of the candidate's loss against the reference's; None without a reference.

    Writes the losses and their errors per step as `tables/loss.csv`.

    Raises NotComparableError if the two are not the same experiment.
    """
    if trainings.reference is None:
        stage.table("loss", _own_loss_rows(trainings.candidate))
        stage.tags({"compare/verdict": NOT_COMPARED})
        return None
    tolerance = stage.experiment.evaluation.loss_tolerance
    comparison = compare_losses(trainings.reference, trainings.candidate, tolerance)
    stage.table("loss", _loss_rows(comparison))
    stage.metrics({f"compare/{name}": v for name, v in comparison.statistics().items()})
    stage.tags({"compare/verdict": comparison.verdict, "compare/tolerance": str(tolerance)})
    return comparison


def statistics_rows(comparison: LossComparison | None) -> list[dict[str, Any]]:
    """The comparison's numbers as table rows; a single row saying so without a reference."""
    if comparison is None:
        return [{"statistic": "verdict", "value": NOT_COMPARED}]
    rows = [
        {"statistic": name.replace("_", " "), "value": value}
        for name, value in comparison.statistics().items()
    ]
    rows.append({"statistic": "tolerance of the mean", "value": comparison.tolerance})
    return [*rows, {"statistic": "verdict", "value": comparison.verdict}]


def draw_loss(stage: Stage, trainings: Trainings, comparison: LossComparison | None) -> Path:
    """Draw the losses and the relative error, or the only loss; returns the PNG."""
    from internlm_lib.reporting.figures import loss_comparison_figure, loss_figure

    if comparison is None or trainings.reference is None:
        return stage.figure("loss", loss_figure(trainings.candidate))
    figure = loss_comparison_figure(trainings.reference, trainings.candidate, comparison)
    return stage.figure("loss", figure)


def compare_throughput(stage: Stage, trainings: Trainings) -> list[dict[str, Any]]:
    """Throughput rows, one per training, the candidate's with its ratio to the reference's."""
    rows = [throughput(training, role) for role, training in trainings.roles.items()]
    if trainings.reference is not None:
        rows[1]["ratio"] = throughput_ratio(*rows)
    stage.table("throughput", rows)
    values = {"tokens_per_second_per_device_ratio": rows[-1].get("ratio")}
    for row in rows:
        name = f"{row['role']}_tokens_per_second_per_device"
        values[name] = row["tokens_per_second_per_device"]
    stage.metrics({f"compare/{name}": v for name, v in values.items() if v is not None})
    return rows


def draw_throughput(stage: Stage, rows: list[dict[str, Any]]) -> Path:
    """Draw the throughput bars; returns the PNG."""
    from internlm_lib.reporting.figures import throughput_figure

    return stage.figure("throughput", throughput_figure(rows))


def layout_parity(stage: Stage) -> LayoutParity:
    """What was last measured of the layouts, in any run; writes it as `tables/parity.csv`."""
    if not stage.folder.parity.exists():
        todo = {"layouts": "not measured here", "to measure": "python benchmarks/parity.py"}
        return LayoutParity([todo], "")
    found = read_json(stage.folder.parity)
    rows = [
        {
            "layout": row["layout"],
            "ranks": row["ranks"],
            **{key: row[f"max_relative_{key}_difference"] for key in found["limits"]},
            "within_limits": "yes" if all(row["within"].values()) else "no",
        }
        for row in found["layouts"]
    ]
    stage.table("parity", rows)
    return LayoutParity(rows, _parity_origin(found))


def _parity_origin(found: Mapping[str, Any]) -> str:
    made, recipe = found["made_with"], found["recipe"]
    limits = ", ".join(f"{key.replace('_', ' ')} {v:g}" for key, v in found["limits"].items())
    dirty = " with changes" if made["git_dirty"] is True else ""
    now = provenance.git_state(Path(__file__).resolve().parents[2])["git_commit"]
    return (
        f"Largest relative difference from {found['reference']} over "
        f"{recipe['training.train_iters']} steps in {recipe['training.precision']}; limits: "
        f"{limits}. Loss {found['first_loss']:.3f} → {found['last_loss']:.3f}. Measured by commit "
        f"{made['git_commit'][:12]}{dirty} (this is {now[:12]}) on {made['cpu_model']}, torch "
        f"{made['torch']}, megatron-core {made['megatron-core']}, deepspeed {made['deepspeed']}."
    )


def summarize(comparison: LossComparison | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The stage's result; statistics are None where there are none."""
    result: dict[str, Any] = {
        "mean_relative_error": None,
        "max_relative_error": None,
        "max_absolute_error": None,
        "verdict": NOT_COMPARED,
        "throughput_ratio": rows[-1].get("ratio"),
    }
    if comparison is not None:
        statistics = comparison.statistics().items()
        result |= {name: value if math.isfinite(value) else None for name, value in statistics}
        result |= {"verdict": comparison.verdict, "tolerance": comparison.tolerance}
        if comparison.broken:
            result["reason"] = comparison.broken
    return result


def check_verdict(result: Mapping[str, Any]) -> str:
    """The verdict in one line.

    Args:
        result: of `summarize` or `run`; finish the stage with it first, since this may raise.
    Raises:
        VerdictError: the verdict is "fail".
    """
    if result["verdict"] == NOT_COMPARED:
        return (
            "not compared: this run has no reference; set parallel.reference (a second layout) "
            "or parallel.reference_run (another run)"
        )
    if result.get("reason"):
        raise VerdictError(f"verdict: fail; {result['reason']}")
    mean, tolerance = result["mean_relative_error"], result["tolerance"]
    line = f"mean relative error of the loss {mean:.3g}, tolerance {tolerance:g}"
    if result["verdict"] == "fail":
        raise VerdictError(
            f"verdict: fail; {line}; the figure's right half shows from which step on they part"
        )
    return f"pass: {line}"


def run(stage: Stage) -> dict[str, Any]:
    """All steps in order; returns the stage's result. `check_verdict` then turns it into an error
    if it is a fail."""
    trainings = load_trainings(stage)
    comparison = compare_loss(stage, trainings)
    draw_loss(stage, trainings, comparison)
    rows = compare_throughput(stage, trainings)
    draw_throughput(stage, rows)
    layout_parity(stage)
    return summarize(comparison, rows)


def _reference_journal(stage: Stage) -> Path | None:
    own = stage.folder.training("reference").journal
    if stage.experiment.parallel.reference is not None:
        return stage.needs(own, "03_train")
    name = stage.experiment.parallel.reference_run
    if name is None:
        return own if own.exists() else None
    other = RunFolder.of(name, stage.folder.root).training("candidate").journal
    if not other.exists():
        raise MissingStageError(
            f"parallel.reference_run = {name!r}: {other.relative_to(stage.folder.root)} is "
            "missing; train that run first, or copy its folder from the other machine into runs/"
        )
    return other


def _loss_rows(comparison: LossComparison) -> list[dict[str, Any]]:
    columns = zip(
        comparison.steps.tolist(),
        comparison.reference.tolist(),
        comparison.candidate.tolist(),
        comparison.signed_errors.tolist(),
        strict=True,
    )
    names = ("step", "reference", "candidate", "signed_relative_error")
    return [dict(zip(names, row, strict=True)) for row in columns]


def _own_loss_rows(training: LoggedTraining) -> list[dict[str, Any]]:
    pairs = zip(training.numbers.tolist(), training.losses.tolist(), strict=True)
    return [{"step": step, "candidate": loss} for step, loss in pairs]
