"""Stage 02: Hugging Face weights → Megatron's distributed checkpoint, checked tensor by tensor.

Without `model.weights` the weights are drawn from `training.seed`. The conversion is done in ranks;
this process only starts them and reads their record.
"""

from collections.abc import Mapping
from typing import Any

from internlm_lib.errors import KitError
from internlm_lib.files import read_json
from internlm_lib.ranks.launch import launch
from internlm_lib.stages.convert_worker import conversion_layout, source_folder
from internlm_lib.stages.stage import Stage

LOGIT_TOLERANCE = 1e-5
"""Largest difference of fp32 logits that rounding explains; a wrong layout gives 0.01 and more."""


def source_weights(stage: Stage) -> list[dict[str, Any]]:
    """Draw random weights, or check those given; returns table rows of the folder's files.

    Raises InputError if the folder given does not hold the model of this experiment.
    """
    from internlm_lib.weights.huggingface import HuggingFaceFolder, write_random

    model, training = stage.experiment.model, stage.experiment.training
    if model.weights is None:
        write_random(stage.folder.huggingface, model, training.seed, training.precision)
    source = source_folder(stage.folder, model)
    HuggingFaceFolder(source).check_shape(model)
    files = sorted([*source.glob("*.safetensors"), source / "config.json"])
    return [{"file": file.name, "bytes": file.stat().st_size} for file in files]


def convert(stage: Stage) -> dict[str, Any]:
    """Write the checkpoint with the candidate's TP and PP; returns the record of its checks."""
    record = stage.folder.conversion_record
    record.unlink(missing_ok=True)
    layout = conversion_layout(stage.experiment.parallel.candidate)
    launch(
        "internlm_lib.stages.convert_worker",
        stage.folder,
        world_size=layout.world_size,
        logs=stage.folder.path / "weights" / "logs",
    )
    result: dict[str, Any] = read_json(record)
    stage.tags({"weights_sha256": result["weights_sha256"]})
    stage.metrics({"convert/parameters": result["parameters"]})
    if result["max_logit_difference"] is not None:
        stage.metrics({"convert/max_logit_difference": result["max_logit_difference"]})
    stage.artifact(record)
    return result


def tensor_rows(stage: Stage, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of names and splits, without the layers after the first; written as CSV too."""
    rows: list[dict[str, Any]] = record["table"]
    stage.table("tensors", rows)
    return rows


def check_rows(stage: Stage, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was checked and what came out, as table rows; written as CSV too."""
    difference = record["max_logit_difference"]
    rows = [
        {"check": "layout of the ranks", "value": record["layout"]},
        {"check": "Hugging Face tensors", "value": record["tensors"]},
        {"check": "Megatron tensors", "value": record["megatron_tensors"]},
        {"check": "parameters", "value": record["parameters"]},
        {"check": f"bytes in {record['precision']}", "value": record["bytes"]},
        {"check": "tensors missing", "value": len(record["missing"])},
        {"check": "tensors unexpected", "value": len(record["unexpected"])},
        {"check": "tensors not bit-equal when read back", "value": len(record["differing"])},
        {
            "check": "largest difference from transformers' logits",
            "value": record["logits_not_checked"] if difference is None else difference,
        },
    ]
    stage.table("conversion", rows)
    return rows


def summarize(record: Mapping[str, Any]) -> dict[str, Any]:
    """The stage's result."""
    keys = ("tensors", "megatron_tensors", "parameters", "bytes", "layout", "max_logit_difference",
            "logits_not_checked", "weights_sha256")  # fmt: skip
    return {key: record[key] for key in keys}


def check_conversion(record: Mapping[str, Any]) -> str:
    """Says what was checked.

    Raises KitError if a tensor is unaccounted for or changed, or if logits differ by more than
    `LOGIT_TOLERANCE`.
    """
    for problem in ("missing", "unexpected", "differing"):
        if names := record[problem]:
            raise KitError(
                f"02_convert: {len(names)} tensors {problem} in the checkpoint: "
                f"{', '.join(names[:5])}; none is allowed: weights/layout.py does not fit the model"
            )
    counts = f"{record['tensors']} tensors, {record['parameters']:,} parameters, bit-equal"
    difference = record["max_logit_difference"]
    if difference is None:
        return f"{counts}; logits not checked: {record['logits_not_checked']}"
    # Not `difference > tolerance`: that would let NaN pass.
    if not difference <= LOGIT_TOLERANCE:
        raise KitError(
            f"02_convert: logits differ from transformers' by {difference:.3g}, allowed is "
            f"{LOGIT_TOLERANCE:g}: model/spec.py or weights/layout.py computes another model"
        )
    return f"{counts}; logits differ from transformers' by at most {difference:.3g}"


def run(stage: Stage) -> dict[str, Any]:
    """All steps in order; returns the stage's result. Raises what `check_conversion` raises."""
    source_weights(stage)
    record = convert(stage)
    tensor_rows(stage, record)
    check_rows(stage, record)
    check_conversion(record)
    return summarize(record)
