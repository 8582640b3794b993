"""Stage 04: does the candidate train like the reference, and how fast?

The reference is this run's own reference training, or what `parallel.reference_run` names; the
candidate this run's own, or `parallel.candidate_run`. Without a reference there is no verdict, only
the candidate's own curve and throughput. `internlm compare` takes the same steps without a run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from internlm_lib import provenance
from internlm_lib.errors import NotComparableError, VerdictError
from internlm_lib.files import read_json
from internlm_lib.model.arithmetic import MODEL_FLOPS_CONVENTION
from internlm_lib.reporting import identity, performance
from internlm_lib.reporting.loss import LossComparison, compare_losses
from internlm_lib.reporting.sources import open_training
from internlm_lib.reporting.training import LoggedTraining, read_training
from internlm_lib.stages.stage import Record, Stage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_COMPARED = "not compared"
PUBLISHED_CAPTION = (
    "Published training speeds, each cell computed again from the rest of its row. Contradictions "
    "name what is printed and what would fit; internlm published has all rows and sources."
)


@dataclass(frozen=True)
class Trainings:
    """What is held against what, and how strictly."""

    candidate: LoggedTraining
    reference: LoggedTraining | None
    tolerance: float
    repeats: list[LoggedTraining] = field(default_factory=list)
    """Trainings of one device, whose differences are the noise floor."""
    force: bool = False
    """Compare losses of different experiments."""
    convention: str = MODEL_FLOPS_CONVENTION
    log_scale: bool = False
    """Draw the losses on a logarithmic axis."""
    command: str | None = None
    """What compares them again; None for a stage's own."""

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
                "read from": training.origin,
                "steps": len(training),
                "first_loss": float(training.losses[0]),
                "last_loss": float(training.losses[-1]),
                "tokens_per_step": training.start.get("tokens_per_step"),
            }
            for training in self.roles.values()
        ]


@dataclass(frozen=True)
class Speeds:
    """Performance of the trainings, and of one against the other."""

    rows: list[dict[str, Any]]
    ratio: Mapping[str, Any]
    """Of `performance.speed_ratio`; all None without a reference."""
    unfair: list[str]
    """What makes the ratio unfair."""

    @property
    def caption(self) -> str:
        """How to read the table."""
        text = performance.convention_text(self.rows[0]["flop_convention"])
        if self.ratio["ratio"] is not None:
            text += f" {_ratio_text(self.ratio)}"
        return f"{text} Not like for like: {'; '.join(self.unfair)}." if self.unfair else text


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
    settings = stage.experiment.parallel
    return Trainings(
        candidate=_named(stage, settings.candidate_run, "candidate")
        or read_training(
            stage.needs(stage.folder.training("candidate").journal, "03_train"), "candidate"
        ),
        reference=_named(stage, settings.reference_run, "reference") or _own_reference(stage),
        tolerance=stage.experiment.evaluation.loss_tolerance,
    )


def compare_loss(record: Record, trainings: Trainings) -> LossComparison | None:
    """Statistics of the candidate's loss against the reference's; None without a reference.

    Writes the losses and their errors per step as `tables/loss.csv`, the error as a curve, and what
    the trainings were as `tables/identity.csv`.
    """
    from internlm_lib.reporting.compare_figures import losses_rows

    if trainings.reference is None:
        record.table("loss", _own_loss_rows(trainings.candidate))
        record.tags({"compare/verdict": NOT_COMPARED})
        return None
    comparison = compare_losses(
        trainings.reference, trainings.candidate, trainings.tolerance,
        repeats=trainings.repeats, force=trainings.force,
    )  # fmt: skip
    record.table("loss", losses_rows(comparison))
    record.table("identity", [fact.row for fact in comparison.facts])
    numbers = {k: v for k, v in comparison.statistics().items() if isinstance(v, (int, float))}
    record.metrics({f"compare/{name}": value for name, value in numbers.items()})
    _record_curve(record, comparison)
    tags = {"compare/verdict": comparison.verdict, "compare/tolerance": str(trainings.tolerance)}
    record.tags(tags | {"compare/reasons": "; ".join(comparison.reasons)})
    return comparison


def statistics_rows(comparison: LossComparison | None) -> list[dict[str, Any]]:
    """The comparison's numbers as table rows, of loss and gradient norm; a single row saying so
    without a reference."""
    if comparison is None:
        return [{"statistic": "verdict", "loss": NOT_COMPARED}]
    loss, norm = comparison.statistics(), comparison.grad_norm.statistics()
    rows = [
        {
            "statistic": name.replace("_", " "),
            "loss": _range_text(value),
            "gradient norm": _range_text(norm.get(name)),
        }
        for name, value in loss.items()
        if value is not None
    ]
    decided = {"tolerance": comparison.tolerance, "verdict": comparison.verdict}
    return rows + [
        {"statistic": name, "loss": value, "gradient norm": None} for name, value in decided.items()
    ]


def reasons_rows(comparison: LossComparison | None) -> list[dict[str, str]]:
    """Why the verdict is what it is, one row each, the decisive ones first."""
    return [{"reasons": reason} for reason in comparison.reasons] if comparison else []


def identity_rows(comparison: LossComparison | None) -> list[dict[str, str]]:
    """What the trainings were, side by side: first what differs, then what is unknown."""
    order = ("decides", "differs", "unknown", "same")
    facts = comparison.facts if comparison else []
    return [fact.row for fact in sorted(facts, key=lambda fact: order.index(fact.finding))]


def draw_loss(record: Record, trainings: Trainings, comparison: LossComparison | None) -> Path:
    """Draw the losses and the relative error, or the only loss; returns the PNG."""
    from internlm_lib.reporting.compare_figures import losses_figure
    from internlm_lib.reporting.figures import loss_figure

    if comparison is None:
        return record.figure("loss", loss_figure(trainings.candidate))
    scale: Literal["log", "linear"] = "log" if trainings.log_scale else "linear"
    return record.figure("loss", losses_figure(comparison, scale=scale))


def draw_signed_error(record: Record, comparison: LossComparison | None) -> Path | None:
    """Draw the signed error with its mean, late trend and tolerance; returns the PNG."""
    from internlm_lib.reporting.error_figures import signed_error_figure, signed_error_rows

    return _draw(record, "signed_error", comparison, signed_error_figure, signed_error_rows)


def draw_histogram(record: Record, comparison: LossComparison | None) -> Path | None:
    """Draw how the signed errors are distributed; returns the PNG."""
    from internlm_lib.reporting.error_figures import error_histogram, error_histogram_rows

    return _draw(record, "error_histogram", comparison, error_histogram, error_histogram_rows)


def draw_grad_norms(record: Record, comparison: LossComparison | None) -> Path | None:
    """Draw the gradient norms and their relative error; returns the PNG."""
    from internlm_lib.reporting.compare_figures import grad_norm_figure, grad_norm_rows

    return _draw(record, "grad_norm", comparison, grad_norm_figure, grad_norm_rows)


def compare_speed(
    record: Record, trainings: Trainings, comparison: LossComparison | None
) -> Speeds:
    """Performance rows, one per training, and the candidate's ratio to the reference.

    Writes `tables/throughput.csv` and `tables/flop_conventions.csv`. Raises InputError if a
    training would exceed its device's peak.
    """
    rows = [
        performance.performance(training, role, trainings.convention)
        for role, training in trainings.roles.items()
    ]
    ratio: Mapping[str, Any] = performance.NO_RATIO
    if trainings.reference is not None:
        ratio = performance.speed_ratio(trainings.reference, trainings.candidate)
    record.table("throughput", rows)
    record.table("flop_conventions", _convention_rows(trainings))
    values = {"tokens_per_second_per_device_ratio": ratio["ratio"]}
    for row in rows:
        name = f"{row['role']}_tokens_per_second_per_device"
        values[name] = row["tokens_per_second_per_device"]
    record.metrics({f"compare/{name}": v for name, v in values.items() if v is not None})
    unfair = identity.not_like_for_like(comparison.facts) if comparison else []
    return Speeds(rows, ratio, unfair)


def draw_throughput(record: Record, speeds: Speeds) -> Path | None:
    """Draw the throughput bars; returns the PNG, None if no speed is known."""
    from internlm_lib.reporting.figures import throughput_figure

    known = [row for row in speeds.rows if row["tokens_per_second_per_device"] is not None]
    return record.figure("throughput", throughput_figure(known)) if known else None


def draw_step_times(record: Record, trainings: Trainings) -> Path:
    """Draw the seconds of every step, what is left out in grey; returns the PNG."""
    from internlm_lib.reporting.step_times import StepTimes, step_time_figure, step_time_rows

    series = [
        StepTimes(
            training.name, role, training.steps, training.column("step_seconds"),
            ~performance.measured(training),
        )
        for role, training in trainings.roles.items()
    ]  # fmt: skip
    record.table("step_seconds", step_time_rows(series))
    return record.figure("step_seconds", step_time_figure(series))


def draw_breakdown(record: Record, trainings: Trainings) -> Path | None:
    """Draw where the time of a step went; returns the PNG, None if no training says (logs)."""
    from internlm_lib.reporting.figures import step_times_figure

    rows = [performance.step_times(t, role) for role, t in trainings.roles.items()]
    if all(row[part] is None for row in rows for part in performance.TIME_PARTS):
        return None
    record.table("step_times", rows)
    return record.figure("step_times", step_times_figure(rows))


def published_rows() -> list[dict[str, Any]]:
    """Published speeds to hold one's own beside, one table row each."""
    from internlm_lib.reporting.published import beside_rows

    return beside_rows()


def layout_parity(record: Record) -> LayoutParity:
    """What was last measured of the layouts, in any run; writes it as `tables/parity.csv`."""
    if not record.folder.parity.exists():
        todo = {"layouts": "not measured here", "to measure": "python benchmarks/parity.py"}
        return LayoutParity([todo], "")
    found = read_json(record.folder.parity)
    rows = [
        {
            "layout": row["layout"],
            "ranks": row["ranks"],
            **{key: row[f"max_relative_{key}_difference"] for key in found["limits"]},
            "within_limits": "yes" if all(row["within"].values()) else "no",
        }
        for row in found["layouts"]
    ]
    record.table("parity", rows)
    return LayoutParity(rows, _parity_origin(found))


def write_report(
    record: Record, trainings: Trainings, comparison: LossComparison | None, speeds: Speeds
) -> Path:
    """Write `reports/<run>/compare.html`, one file that needs nothing else; returns its path."""
    from internlm_lib.reporting.compare_page import write_compare_page

    path = write_compare_page(
        record.folder,
        trainings=trainings.roles,
        comparison=comparison,
        statistics=statistics_rows(comparison),
        identity=identity_rows(comparison),
        speeds=speeds.rows,
        speed_ratio=speeds.ratio["ratio"],
        speed_caption=speeds.caption,
        published=published_rows(),
        published_caption=PUBLISHED_CAPTION,
        command=trainings.command
        or f"internlm run runs/{record.folder.name}/experiment.yaml --only 04_compare --force",
    )
    record.artifact(path)
    return path


def summarize(record: Record, comparison: LossComparison | None, speeds: Speeds) -> dict[str, Any]:
    """The stage's result; statistics are None where there are none."""
    found = comparison.statistics() if comparison else {}
    return {
        **{name: found.get(name) for name in _RESULT},
        "verdict": comparison.verdict if comparison else NOT_COMPARED,
        "tolerance": comparison.tolerance if comparison else None,
        "reasons": comparison.reasons if comparison else [],
        "performance": {row["role"]: row for row in speeds.rows} | dict(speeds.ratio)
        | {"not_like_for_like": speeds.unfair},
        "report": (record.folder.report / "compare.html")
        .relative_to(record.folder.root)
        .as_posix(),
    }  # fmt: skip


_RESULT = (
    "steps", "mean_relative_error", "max_relative_error", "max_relative_error_step",
    "max_absolute_error", "signed_mean", "signed_mean_ci95", "detectable_bias", "late_slope",
    "late_slope_ci95", "band_left_step", "steps_outside", "noise_floor", "noise_ratio",
    "correlation",
)  # fmt: skip


def check_verdict(result: Mapping[str, Any]) -> str:
    """The verdict in one line.

    Args:
        result: of `summarize` or `run`; finish the stage with it first, since this may raise.
    Raises:
        VerdictError: the verdict is "fail".
        NotComparableError: it is "inconclusive" or "not-comparable".
    """
    verdict = result["verdict"]
    if verdict == NOT_COMPARED:
        return (
            "not compared: this run has no reference; set parallel.reference (a second layout) "
            "or parallel.reference_run (another run)"
        )
    line = f"verdict: {verdict}; {'; '.join(result['reasons'][:3])}"
    if verdict == "fail":
        raise VerdictError(f"{line}; see {result['report']}")
    if verdict == "pass":
        return line
    hint = "; to compare all the same: internlm compare --force"
    raise NotComparableError(f"{line}{hint if verdict == 'not-comparable' else ''}")


def run(stage: Stage) -> dict[str, Any]:
    """All steps in order; returns the stage's result. `check_verdict` then turns it into an error
    if it is not a pass."""
    return compare(stage, load_trainings(stage))


def compare(record: Record, trainings: Trainings) -> dict[str, Any]:
    """All steps after the trainings are read; returns the result."""
    comparison = compare_loss(record, trainings)
    draw_loss(record, trainings, comparison)
    for draw in (draw_signed_error, draw_histogram, draw_grad_norms):
        draw(record, comparison)
    speeds = compare_speed(record, trainings, comparison)
    draw_throughput(record, speeds)
    draw_step_times(record, trainings)
    draw_breakdown(record, trainings)
    layout_parity(record)
    write_report(record, trainings, comparison, speeds)
    return summarize(record, comparison, speeds)


def _own_reference(stage: Stage) -> LoggedTraining | None:
    journal = stage.folder.training("reference").journal
    if stage.experiment.parallel.reference is not None:
        return read_training(stage.needs(journal, "03_train"), "reference")
    return read_training(journal, "reference") if journal.exists() else None


def _named(stage: Stage, source: str | None, role: str) -> LoggedTraining | None:
    if source is None:
        return None
    return open_training(
        source, role, stage.folder.root, tracking_uri=stage.experiment.tracking.uri
    )


def _draw(
    record: Record,
    name: str,
    comparison: LossComparison | None,
    figure: "Callable[[LossComparison], Figure]",
    rows: Callable[[LossComparison], Any],
) -> Path | None:
    if comparison is None:
        return None
    record.table(name, rows(comparison))
    return record.figure(name, figure(comparison))


def _record_curve(record: Record, comparison: LossComparison) -> None:
    """The signed error as a curve in MLflow, with all extremes but no more points than it draws."""
    from internlm_lib.reporting.decimation import decimate

    rows = decimate(comparison.steps, comparison.loss.signed)
    steps, errors = comparison.steps[rows], comparison.loss.signed[rows]
    record.series("compare/signed_relative_error", steps.tolist(), errors.tolist())


def _convention_rows(trainings: Trainings) -> list[dict[str, Any]]:
    return [
        {"role": role, **row}
        for role, training in trainings.roles.items()
        for row in performance.conventions(training)
    ]


def _range_text(value: Any) -> Any:
    """An interval in words; whatever else as it is."""
    return f"{value[0]:.3g} to {value[1]:.3g}" if isinstance(value, list) else value


def _ratio_text(ratio: Mapping[str, Any]) -> str:
    text = f"In {ratio['ratio_of']} the candidate is {ratio['ratio']:.3g} times"
    if ratio["ratio_ci95"]:
        low, high = ratio["ratio_ci95"]
        text += f" (95 % interval {low:.3g} to {high:.3g})"
    return f"{text} as fast as the reference."


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


def _own_loss_rows(training: LoggedTraining) -> list[dict[str, Any]]:
    pairs = zip(training.steps.tolist(), training.losses.tolist(), strict=True)
    return [{"step": step, "candidate": loss} for step, loss in pairs]
