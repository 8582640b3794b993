"""One rank of stage 02: `python -m internlm_lib.stages.convert_worker RUN_FOLDER`.

Makes Megatron's checkpoint and the record of what was checked on it. It stands among the stages,
not in `weights`, because it also needs `generation`, to compute logits over all ranks.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm_lib.devices import Device, select_device
from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Experiment, Layout, ModelSection
from internlm_lib.files import write_json
from internlm_lib.model.arithmetic import parameter_count
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder

if TYPE_CHECKING:
    from torch.nn import Module

    from internlm_lib.weights.huggingface import HuggingFaceFolder

_LOGIT_BATCH = (2, 64)
_LOGIT_PARAMETERS = 10**9
"""Largest model that transformers is also asked for its logits: it must fit one device whole."""


def source_folder(folder: RunFolder, model: ModelSection) -> Path:
    """The Hugging Face folder that a run starts from."""
    return folder.root / model.weights if model.weights else folder.huggingface


def conversion_layout(candidate: Layout) -> Layout:
    """The candidate's TP and PP, once: neither data nor sequence parallelism changes weights."""
    return Layout(
        tensor_model_parallel_size=candidate.tensor_model_parallel_size,
        pipeline_model_parallel_size=candidate.pipeline_model_parallel_size,
    )


def convert(folder: RunFolder) -> None:
    """Write this rank's part of the checkpoint, read it back, and check it."""
    _, experiment = load_experiment(folder.experiment)
    layout = conversion_layout(experiment.parallel.candidate)
    device = select_device(experiment.parallel.device)
    device.adapt_megatron()
    _convert(folder, experiment, layout, device)


def _convert(folder: RunFolder, experiment: Experiment, layout: Layout, device: Device) -> None:
    # These import megatron, which must be adapted to the device first.
    from internlm_lib.model.build import build_gpt_model
    from internlm_lib.model.parallel import initialize_parallel, is_rank_zero, shutdown
    from internlm_lib.weights.huggingface import HuggingFaceFolder
    from internlm_lib.weights.megatron import load_huggingface, load_weights, save_weights

    model, training = experiment.model, experiment.training
    initialize_parallel(
        layout, device, seed=training.seed,
        timeout_minutes=experiment.parallel.distributed_timeout_minutes,
    )  # fmt: skip
    source = HuggingFaceFolder(source_folder(folder, model))
    gpt = build_gpt_model(model, layout, training, device)
    load_huggingface(gpt, source, model)
    save_weights(gpt, folder.megatron)
    _forget(gpt)
    load_weights(gpt, folder.megatron)
    record = {
        "layout": layout.label,
        "precision": training.precision,
        **_account(gpt, source, model),
        **_compare_logits(gpt, source, experiment, device),
    }
    if is_rank_zero():
        write_json(folder.conversion_record, record | {"weights_sha256": source.sha256})
    shutdown()


def _forget(gpt: "Module") -> None:
    """Make every parameter NaN, so that one that is not loaded cannot look right."""
    import torch

    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.fill_(math.nan)


def _account(gpt: "Module", source: "HuggingFaceFolder", model: ModelSection) -> dict[str, Any]:
    """What became of every tensor of the table, over all ranks."""
    from internlm_lib.weights.layout import huggingface_shapes, rules
    from internlm_lib.weights.megatron import differing_parameters, named_parameters

    table = rules(model)
    expected, held = {rule.megatron for rule in table}, _gather(list(named_parameters(gpt)))
    shapes = huggingface_shapes(model)
    itemsize = next(gpt.parameters()).element_size()
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return {
        "tensors": len(source.names()),
        "megatron_tensors": len(held),
        "parameters": parameters,
        "bytes": parameters * itemsize,
        "missing": sorted((expected - held) | (shapes.keys() - set(source.names()))),
        "unexpected": sorted((held - expected) | (set(source.names()) - shapes.keys())),
        "differing": sorted(_gather(differing_parameters(gpt, source, model))),
        "table": _table_rows(model),
    }


def _table_rows(model: ModelSection) -> list[dict[str, Any]]:
    """The table's rows for the tensors outside of layers and for the first layer."""
    from internlm_lib.weights.layout import rules

    return [
        {
            "Megatron": rule.megatron,
            "Hugging Face": ", ".join(rule.huggingface),
            "split": rule.split,
            "shape": " × ".join(map(str, rule.shape)),
        }
        for rule in rules(model)
        if "layers." not in rule.megatron or ".layers.0." in rule.megatron
    ]


def _compare_logits(
    gpt: "Module", source: "HuggingFaceFolder", experiment: Experiment, device: Device
) -> dict[str, Any]:
    """Largest difference of our logits from transformers', or why it was not computed."""
    if reason := _why_not(experiment):
        return {"max_logit_difference": None, "logits_not_checked": reason}
    import torch

    from internlm_lib.generation.parallel_model import ParallelModel
    from internlm_lib.model.parallel import is_rank_zero
    from internlm_lib.weights.huggingface import transformers_logits

    model = experiment.model
    generator = torch.Generator().manual_seed(experiment.training.seed)
    shape = (_LOGIT_BATCH[0], min(_LOGIT_BATCH[1], model.max_position_embeddings))
    tokens = torch.randint(model.vocab_size, shape, generator=generator).to(device.current())
    with torch.no_grad():
        ours = ParallelModel(gpt, model).logits(tokens)[..., : model.vocab_size].float()
    if not is_rank_zero():
        return {}
    theirs = transformers_logits(source, model, tokens)
    return {
        "max_logit_difference": (ours - theirs).abs().max().item(),
        "logit_std": theirs.std().item(),
        "logit_tokens": list(shape),
        "logits_not_checked": None,
    }


def _why_not(experiment: Experiment) -> str | None:
    if experiment.training.precision != "fp32":
        return "rounding of bf16 hides small errors: checked only with training.precision fp32"
    if parameter_count(experiment.model) >= _LOGIT_PARAMETERS:
        return "transformers would need the whole model on one device: checked below 1e9 parameters"
    return None


def _gather(names: list[str]) -> set[str]:
    """Union over all ranks."""
    import torch

    gathered: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, names)
    return {name for part in gathered for name in part}


if __name__ == "__main__":
    rank_main(convert)
