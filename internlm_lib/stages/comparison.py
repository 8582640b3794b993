"""Two trainings from anywhere, compared without being stages of one experiment."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from internlm_lib.errors import InputError
from internlm_lib.experiment.load import record_kind
from internlm_lib.files import write_text
from internlm_lib.model.arithmetic import MODEL_FLOPS_CONVENTION
from internlm_lib.reporting.published import FORMULAS
from internlm_lib.reporting.sources import open_training
from internlm_lib.run_folder import RunFolder
from internlm_lib.stages.compare import Trainings, compare
from internlm_lib.stages.stage import begin_record

_HEADER = "# A comparison, made by `internlm compare`; there is nothing here to train.\n"


@dataclass(frozen=True)
class Comparison:
    """What is to be compared, and how."""

    reference: str
    """A run's name, an MLflow run id, or the path of a log (see `reporting.sources`)."""
    candidate: str
    run_name: str | None = None
    """Where it is written: `reports/<run_name>/`; made of both names by default."""
    tolerance: float = 0.02
    repeats: Sequence[str] = ()
    """Trainings of one device, two or more, whose differences are the noise floor."""
    force: bool = False
    convention: str = MODEL_FLOPS_CONVENTION
    log_scale: bool = False
    """Draw the losses on a logarithmic axis."""
    tracking_uri: str | None = None
    tracking_experiment: str = "internlm"


def compare_sources(comparison: Comparison, root: Path) -> dict[str, Any]:
    """Compare, write the report and the record of it in the journal and in MLflow.

    Returns:
        The result, as of stage 04; `stages.compare.check_verdict` says what follows from it.
    Raises:
        InputError: a source is none, or the name is taken, before anything is written.
        NotComparableError: the trainings have no step in common.
    """
    if comparison.convention not in FORMULAS:
        raise InputError(f"--flops {comparison.convention!r}: allowed are {', '.join(FORMULAS)}")
    if not comparison.tolerance > 0:
        raise InputError(f"--tolerance {comparison.tolerance}: give a share above 0, e.g. 0.02")
    if len(comparison.repeats) == 1:
        raise InputError("--noise-floor: one repeat has no partner; give two or more, one each")

    def open_source(source: str, role: str) -> Any:
        return open_training(source, role, root, tracking_uri=comparison.tracking_uri)

    trainings = Trainings(
        candidate=open_source(comparison.candidate, "candidate"),
        reference=open_source(comparison.reference, "reference"),
        tolerance=comparison.tolerance,
        repeats=[open_source(source, "repeat") for source in comparison.repeats],
        force=comparison.force,
        convention=comparison.convention,
        log_scale=comparison.log_scale,
        command=_command(comparison),
    )
    folder = RunFolder.of(comparison.run_name or _name(comparison), root)
    if folder.experiment.exists() and record_kind(folder.experiment) != "comparison":
        raise InputError(f"{folder.path}: this run is no comparison; give another --run-name")
    write_text(folder.experiment, _HEADER + yaml.safe_dump(_described(comparison), sort_keys=False))
    record = begin_record("04_compare", folder)
    try:
        result = compare(record, trainings)
        record.finish(result)
    except BaseException as error:
        record.fail(error)
        raise
    return result


def _described(comparison: Comparison) -> dict[str, Any]:
    """What `experiment.yaml` of a comparison says."""
    return {
        "tracking": {"uri": comparison.tracking_uri, "experiment": comparison.tracking_experiment},
        "comparison": {
            "reference": comparison.reference,
            "candidate": comparison.candidate,
            "tolerance": comparison.tolerance,
            "repeats": list(comparison.repeats),
            "force": comparison.force,
            "flop_convention": comparison.convention,
        },
    }


def _command(comparison: Comparison) -> str:
    """What makes the same comparison again, in a shell."""
    words = ["internlm", "compare", "--reference", comparison.reference]
    words += ["--candidate", comparison.candidate, "--tolerance", f"{comparison.tolerance:g}"]
    for source in comparison.repeats:
        words += ["--noise-floor", source]
    if comparison.force:
        words.append("--force")
    if comparison.log_scale:
        words.append("--log-scale")
    if comparison.convention != MODEL_FLOPS_CONVENTION:
        words += ["--flops", comparison.convention]
    if comparison.tracking_uri:
        words += ["--tracking-uri", comparison.tracking_uri]
    return shlex.join(words)


def _name(comparison: Comparison) -> str:
    parts = (comparison.candidate, comparison.reference)
    names = [Path(part).name if Path(part).is_file() else part for part in parts]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-vs-".join(names)).strip("-._")[:100]
