"""Stage 02: the weights to start from → Megatron's distributed checkpoint, checked bit by bit.

Without `model.weights` the weights are drawn from `training.seed`. With `model.direct_start`
nothing is written: ranks read their slices of the source themselves, and this stage checks it.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from internlm_lib.errors import KitError
from internlm_lib.experiment.schema import Layout, ModelSection
from internlm_lib.files import read_json, write_json
from internlm_lib.generation.inference import inference_layout
from internlm_lib.ranks.launch import launch
from internlm_lib.stages.stage import Stage
from internlm_lib.training.nodes import device_name
from internlm_lib.training.progress import clock
from internlm_lib.weights.start import source_folder, starting_folder

if TYPE_CHECKING:
    from pathlib import Path

    from internlm_lib.weights.checkpoint import Checkpoint
    from internlm_lib.weights.convert import Plan
    from internlm_lib.weights.layout import TensorRule

LOGIT_TOLERANCE = 1e-5
"""Largest difference of fp32 logits that rounding explains; a wrong layout gives 0.01 and more."""

_PREVIEW = 12
_SECONDS_BETWEEN_TEXTS = 0.25


def source_weights(stage: Stage) -> list[dict[str, Any]]:
    """Draw random weights, or check those given; returns table rows of the files.

    Raises InputError if the checkpoint given does not hold the model of this experiment.
    """
    model, training = stage.experiment.model, stage.experiment.training
    if model.weights is None:
        from internlm_lib.weights.initial import write_random

        write_random(stage.folder.huggingface, model, training.seed, training.precision)
    with _source(stage) as source:
        return [
            {"file": str(file.relative_to(source.path)), "format": source.format_name,
             "layout": source.layout, "dtype": source.dtype, "bytes": file.stat().st_size}
            for file in source.files
        ]  # fmt: skip


def plan(stage: Stage) -> list[dict[str, Any]]:
    """What is going to be written, as table rows, one per file; written as CSV too."""
    if stage.experiment.model.direct_start:
        return [{"file": "none: ranks read the source", "tensors": 0, "bytes": 0}]
    conversion = _plan(stage)
    conversion.source.close()
    rows = conversion.file_rows()
    stage.table("conversion_plan", rows)
    return rows


def draw_layout(stage: Stage) -> "Path":
    """Draw how the candidate's ranks share the tensors, with its CSVs beside; returns the PNG."""
    from internlm_lib.reporting.layout_figure import layout_figure

    layout = stage.experiment.parallel.candidate
    tensors = _tensor_sizes(stage.experiment.model)
    stages = _stage_shares(stage.experiment.model, layout, stage.experiment.training.precision)
    stage.table("weights_layout", tensors)
    stage.table("pipeline_stages", stages)
    figure = layout_figure(tensors, stages, layout.tensor_model_parallel_size)
    return stage.figure("weights_layout", figure)


def convert(stage: Stage, show: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Write the checkpoint and let the candidate's ranks check it; returns the record.

    Args:
        show: told how far the conversion is, in a line of text.
    """
    record = stage.folder.conversion_record
    record.unlink(missing_ok=True)
    result = (
        _hash_source(stage, show) if stage.experiment.model.direct_start else _write(stage, show)
    )
    layout = inference_layout(stage.experiment.parallel.candidate)
    launch(
        "internlm_lib.stages.convert_worker",
        stage.folder,
        world_size=layout.world_size,
        device=device_name(stage.experiment),
        environment=stage.experiment.parallel.environment,
        logs=stage.folder.path / "weights" / "logs",
    )
    found = {**read_json(record), **result, "weights_sha256": result["tensor_hash"]}
    write_json(record, found)
    stage.tags({"weights_sha256": found["weights_sha256"]})
    stage.metrics({"convert/parameters": found["parameters"]})
    if result["seconds"]:
        stage.metrics({"convert/bytes_per_second": result["bytes"] / result["seconds"]})
    if found["max_logit_difference"] is not None:
        stage.metrics({"convert/max_logit_difference": found["max_logit_difference"]})
    stage.artifact(record)
    return found


def tensor_rows(stage: Stage) -> list[dict[str, Any]]:
    """The table of names and splits, without the layers after the first; written as CSV too."""
    from internlm_lib.weights.layout import rules

    rows = [
        {
            "Megatron": rule.name,
            "Hugging Face": ", ".join(rule.huggingface),
            "split": rule.split,
            "shape": " × ".join(map(str, rule.shape)),
        }
        for rule in _first_layer(rules(stage.experiment.model))
    ]
    stage.table("tensors", rows)
    return rows


def manifest_rows(stage: Stage) -> list[dict[str, Any]]:
    """The manifest's first tensors and their hashes, as table rows; all of them as CSV.

    With `model.direct_start` it is the source's own, if that has one.
    """
    from internlm_lib.weights.manifest import read_manifest

    manifest = read_manifest(starting_folder(stage.folder, stage.experiment.model))
    if manifest is None:
        return [{"tensor": "none: the source has no manifest"}]
    rows = [
        {"tensor": name, "dtype": entry["dtype"], "shape": " × ".join(map(str, entry["shape"])),
         "sha256": entry["sha256"]}
        for name, entry in manifest["tensors"].items()
    ]  # fmt: skip
    stage.table("manifest", rows)
    return rows[:_PREVIEW]


def check_rows(stage: Stage, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was checked and what came out, as table rows; written as CSV too."""
    difference = record["max_logit_difference"]
    rows = [
        {"check": "source", "value": f"{record['from']}, {record['dtype']}"},
        {"check": "layout of the ranks", "value": record["layout"]},
        {"check": "Hugging Face tensors", "value": record["tensors"]},
        {"check": "Megatron tensors", "value": record["megatron_tensors"]},
        {"check": "parameters", "value": record["parameters"]},
        {"check": "bytes", "value": record["bytes"]},
        {"check": "hash over all tensors", "value": record["tensor_hash"]},
        {"check": "tensors missing", "value": len(record["missing"])},
        {"check": "tensors unexpected", "value": len(record["unexpected"])},
        {"check": "tensors not bit-equal on the ranks", "value": len(record["differing"])},
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
                f"02_convert: {len(names)} tensors {problem} on the ranks: "
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


def run(stage: Stage, show: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """All steps in order; returns the stage's result. Raises what `check_conversion` raises."""
    source_weights(stage)
    plan(stage)
    tensor_rows(stage)
    draw_layout(stage)
    record = convert(stage, show)
    manifest_rows(stage)
    check_rows(stage, record)
    check_conversion(record)
    return summarize(record)


def _source(stage: Stage) -> "Checkpoint":
    from internlm_lib.weights.formats import open_checkpoint

    model = stage.experiment.model
    return open_checkpoint(source_folder(stage.folder, model), model)


def _plan(stage: Stage) -> "Plan":
    from internlm_lib.weights.convert import Order, plan_conversion

    model = stage.experiment.model
    source, target = source_folder(stage.folder, model), stage.folder.megatron
    # 01_prepare, which may not have run, makes or copies the run's own tokenizer.
    tokenizer = stage.folder.tokenizer if stage.folder.tokenizer.is_file() else None
    return plan_conversion(
        source, target, Order("megatron"), model=model, tokenizer=tokenizer, overwrite=True
    )


def _write(stage: Stage, show: Callable[[str], None]) -> dict[str, Any]:
    from internlm_lib.weights.convert import convert as write

    conversion = _plan(stage)
    result = write(conversion, _Rate(show))
    return {**result, "dtype": conversion.source.dtype}


def _hash_source(stage: Stage, show: Callable[[str], None]) -> dict[str, Any]:
    from internlm_lib.weights.verify import verify

    model = stage.experiment.model
    path = source_folder(stage.folder, model)
    report = verify(path, model, _Rate(show))
    if not report["ok"]:
        raise KitError("\n  - ".join([f"{path} is damaged:", *report["problems"]]))
    keys = ("tensors", "bytes", "dtype", "tensor_hash")
    return {"from": report["format"], "seconds": None, **{key: report[key] for key in keys}}


class _Rate:
    """Bytes done, rate and time left, in a line of text, at most four times a second."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._what = ""
        self._started = self._told = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._started = what, now
        elif now - self._told < _SECONDS_BETWEEN_TEXTS and done < total:
            return
        self._told = now
        rate = done / max(now - self._started, 1e-3)
        left = clock((total - done) / max(rate, 1.0))
        megabytes = f"{done / 1e6:,.0f}/{total / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s"
        self._show(f"{what} {megabytes}, {left} left")


def _first_layer(table: "list[TensorRule]") -> "list[TensorRule]":
    return [r for r in table if "layers." not in r.name or ".layers.0." in r.name]


def _tensor_sizes(model: ModelSection) -> list[dict[str, Any]]:
    """Split and whole size of the tensors of the first layer and of those outside of layers."""
    from internlm_lib.weights.layout import local_shape, rules

    rows = []
    for rule in _first_layer(rules(model)):
        name = rule.name.removeprefix("decoder.").removeprefix("layers.0.")
        height, *width = local_shape(rule, 1, model.vocab_size)
        rows.append({"name": name, "split": rule.split, "rows": height, "columns": [*width, 1][0]})
    return rows


def _stage_shares(model: ModelSection, layout: Layout, precision: str) -> list[dict[str, Any]]:
    """Layers and bytes per rank of each pipeline stage."""
    from internlm_lib.model.precision import DTYPES
    from internlm_lib.weights.layout import rules
    from internlm_lib.weights.plan import partition, rank_tensors

    stages = layout.pipeline_model_parallel_size
    split = partition(model, layout.tensor_model_parallel_size, stages)
    rows, first = [], 0
    for number, count in enumerate(split.layers_per_stage):
        held = rank_tensors(rules(model), split, 0, number)
        elements = sum(math.prod(tensor.shape) for tensor in held)
        ends = ["embedding"] * (number == 0) + ["norm, output layer"] * (number == stages - 1)
        rows.append(
            {
                "stage": number,
                "layers": f"{first}" if count == 1 else f"{first}–{first + count - 1}",
                "bytes_per_rank": elements * DTYPES[precision].itemsize,
                "holds": ", ".join(ends),
            }
        )
        first += count
    return rows
