"""One rank of stage 02: `python -m internlm_lib.stages.convert_worker RUN_FOLDER`.

Loads what training will start from, and records what was checked on it. It stands among the stages,
not in `weights`, because it also needs `generation`, to compute logits over all ranks.
"""

import math
from typing import TYPE_CHECKING, Any

from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Experiment, ModelSection
from internlm_lib.files import write_json
from internlm_lib.generation.inference import inference_layout, open_model
from internlm_lib.model.arithmetic import parameter_count
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder
from internlm_lib.weights.start import source_folder, starting_folder

if TYPE_CHECKING:
    from torch.nn import Module

    from internlm_lib.generation.parallel_model import ParallelModel
    from internlm_lib.weights.checkpoint import Checkpoint

_LOGIT_BATCH = (2, 64)
_LOGIT_PARAMETERS = 10**9
"""Largest model that transformers is also asked for its logits: it must fit one device whole."""


def check(folder: RunFolder) -> None:
    """Load this rank's part of the weights to start from, and check it against the source."""
    _, experiment = load_experiment(folder.experiment)
    model = experiment.model
    with open_model(experiment) as parallel_model:
        # These import megatron, which `open_model` has adapted to the device.
        from internlm_lib.model.parallel import is_rank_zero
        from internlm_lib.weights.formats import open_checkpoint
        from internlm_lib.weights.megatron import load_weights

        gpt = parallel_model.gpt
        _forget(gpt)
        load_weights(gpt, starting_folder(folder, model), model)
        with open_checkpoint(source_folder(folder, model), model) as source:
            record = {
                "layout": inference_layout(experiment.parallel.candidate).label,
                **_account(gpt, source, model),
                **_compare_logits(parallel_model, source, experiment),
            }
        if is_rank_zero():
            write_json(folder.conversion_record, record)


def _forget(gpt: "Module") -> None:
    """Make every parameter NaN, so that one that is not loaded cannot look right."""
    import torch

    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.fill_(math.nan)


def _account(gpt: "Module", source: "Checkpoint", model: ModelSection) -> dict[str, Any]:
    """What became of every tensor of the table, over all ranks."""
    from internlm_lib.weights.layout import rules
    from internlm_lib.weights.megatron import differing_parameters, named_parameters

    expected = {rule.name for rule in rules(model)}
    held = _gather(list(named_parameters(gpt)))
    return {
        "megatron_tensors": len(held),
        "parameters": parameter_count(model),
        "missing": sorted(expected - held),
        "unexpected": sorted(held - expected),
        "differing": sorted(_gather(differing_parameters(gpt, source, model))),
    }


def _compare_logits(
    parallel_model: "ParallelModel", source: "Checkpoint", experiment: Experiment
) -> dict[str, Any]:
    """Largest difference of our logits from transformers', or why it was not computed."""
    if reason := _why_not(experiment):
        return {"max_logit_difference": None, "logits_not_checked": reason}
    import torch

    from internlm_lib.model.parallel import is_rank_zero
    from internlm_lib.weights.huggingface import transformers_logits

    model = experiment.model
    generator = torch.Generator().manual_seed(experiment.training.seed)
    shape = (_LOGIT_BATCH[0], min(_LOGIT_BATCH[1], model.max_position_embeddings))
    tokens = torch.randint(model.vocab_size, shape, generator=generator).to(parallel_model.device)
    with torch.no_grad():
        ours = parallel_model.logits(tokens)[..., : model.vocab_size].float()
    if not is_rank_zero():
        return {}
    theirs = transformers_logits(source, tokens)
    return {
        "max_logit_difference": (ours - theirs).abs().max().item(),
        "logit_std": theirs.std().item(),
        "logit_tokens": list(shape),
        "logits_not_checked": None,
    }


def _why_not(experiment: Experiment) -> str | None:
    if (precision := experiment.training.precision) != "fp32":
        return f"rounding of {precision} hides small errors: checked only with precision fp32"
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
    rank_main(check)
