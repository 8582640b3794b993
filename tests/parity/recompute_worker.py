"""One rank of `test_recompute_policies.py`: a few steps under every policy, in one group.

`python -m tests.parity.recompute_worker RUN_FOLDER RESULT`
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from internlm_lib.devices import Device, select_device
from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Experiment, Layout
from internlm_lib.files import read_json, write_json
from internlm_lib.model.parts import PARTS, WHOLE_LAYER
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder

STEPS = 3
LR = 1e-2
POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full uniform 1": {"recompute_granularity": "full"},
    "full uniform 2": {"recompute_granularity": "full", "recompute_num_layers": 2},
    "full block 3": {
        "recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3,
    },
}  # fmt: skip
CHOSEN: dict[str, dict[str, int]] = {
    **{part: {part: 4} for part in (*PARTS, WHOLE_LAYER)},
    "neighbours": {"input_layernorm": 3, "qkv": 2, "linear_fc1": 3, "activation": 4},
    "all parts": dict.fromkeys(PARTS, 4),
    "whole layers and parts": {WHOLE_LAYER: 1, "activation": 3, "core_attention": 1},
}
"""What `auto_recompute_device_memory_mib` may choose, as layers of each part."""
NOTHING = dict.fromkeys((*PARTS, WHOLE_LAYER), 0)


SEQUENCE_PARALLEL = Layout(tensor_model_parallel_size=2, sequence_parallel=True)
SETTINGS: dict[str, tuple[Layout, dict[str, Any], tuple[str, ...]]] = {
    "megatron TP2 SP": (SEQUENCE_PARALLEL, {}, (*POLICIES, *CHOSEN)),
    "megatron TP2 SP, operators spelled out": (
        SEQUENCE_PARALLEL,
        {
            "use_flash_attn": False,
            "use_fused_rmsnorm": False,
            "use_fused_rotary_pos_emb": False,
            "use_fused_swiglu": False,
        },
        ("none", "selective", "input_layernorm", "core_attention", "all parts"),
    ),
    "megatron PP2": (
        Layout(pipeline_model_parallel_size=2),
        {},
        ("none", "full uniform 2", "neighbours", "whole layers and parts"),
    ),
    "ZeRO-3 DP2": (
        Layout(engine="deepspeed", zero_stage=3, data_parallel_size=2),
        {},
        ("none", "full uniform 1", "neighbours", "all parts"),
    ),
}
"""Layout, what its training differs in, and the policies tried."""


def compare(folder: RunFolder, result: str) -> None:
    device = select_device("cpu")
    device.adapt_megatron()
    _, experiment = load_experiment(folder.experiment)
    _compare(folder, experiment, device, Path(result))


def _compare(folder: RunFolder, experiment: Experiment, device: Device, result: Path) -> None:
    from internlm_lib.model.parallel import initialize_parallel, is_rank_zero, shutdown, split_ranks

    initialize_parallel(SEQUENCE_PARALLEL, device)
    found = {}
    for name, (layout, keys, policies) in SETTINGS.items():
        split_ranks(layout)
        changed = _with(experiment, **keys)
        found[name] = {
            "policies": _policies(folder, changed, layout, device, policies),
            **_decided_twice(folder, changed, layout, device, result.with_name(f"{name}.json")),
        }
    if is_rank_zero():
        write_json(result, found)
    shutdown()


def _policies(
    folder: RunFolder,
    experiment: Experiment,
    layout: Layout,
    device: Device,
    policies: tuple[str, ...],
) -> dict[str, Any]:
    from internlm_lib.training.recompute import kept_bytes, kept_bytes_of_choice

    layer, rank = _measured(_model(folder, experiment, layout, device), experiment, layout, device)
    found = {}
    for name in policies:
        changed = _with(experiment, **POLICIES.get(name, {}))
        gpt = _model(folder, changed, layout, device)
        predicted = kept_bytes(layer, rank, changed.training)
        if name in CHOSEN:
            left = rank.layers - CHOSEN[name].get(WHOLE_LAYER, 0)
            layers = NOTHING | {
                k: n if k == WHOLE_LAYER else min(n, left) for k, n in CHOSEN[name].items()
            }
            _apply(gpt, layers)
            predicted = kept_bytes_of_choice(layer, rank, layers)
        found[name] = _trained(gpt, changed, layout, device, predicted)
    return found


def _decided_twice(
    folder: RunFolder, experiment: Experiment, layout: Layout, device: Device, record: Path
) -> dict[str, Any]:
    """With a limit halfway between all and nothing recomputed; then again, as on a restart, and
    once more with a limit that nothing fits."""
    from internlm_lib.errors import InputError
    from internlm_lib.training import activations

    gpt = _model(folder, experiment, layout, device)
    limit = _limit(gpt, experiment, layout, device)
    adaptive = _with(experiment, auto_recompute_device_memory_mib=limit)
    first = activations.decide_recompute([gpt], adaptive, layout, device, record)
    assert first is not None
    again = _model(folder, experiment, layout, device)
    with patch.object(activations, "measure_layer", side_effect=AssertionError("measured again")):
        second = activations.decide_recompute([again], adaptive, layout, device, record)
    everyone: list[Any] = [None] * layout.world_size
    sets = [sorted(layer.recompute) for layer in again.decoder.layers]
    torch.distributed.all_gather_object(everyone, (first.layers, second and second.layers, sets))
    try:
        tiny = _with(experiment, auto_recompute_device_memory_mib=1)
        activations.decide_recompute([again], tiny, layout, device, record.with_name("none.json"))
        refusal = ""
    except InputError as error:
        refusal = str(error)
    return {
        "limit": limit,
        "record": read_json(record) if record.exists() else None,
        "choices": everyone,
        "refusal": refusal,
        "trained": _trained(gpt, adaptive, layout, device, 0),
    }


def _limit(gpt: Any, experiment: Experiment, layout: Layout, device: Device) -> int:
    """In MiB; the first rank's, told to all."""
    from internlm_lib.training.recompute import MIB, memory_bytes

    layer, rank = _measured(gpt, experiment, layout, device)
    bounds = (memory_bytes(layer, rank, NOTHING | {WHOLE_LAYER: n}) for n in (0, rank.layers))
    limit = [round(sum(bounds) / 2 / MIB)]
    torch.distributed.broadcast_object_list(limit, src=0)
    return limit[0]


def _with(experiment: Experiment, **training: Any) -> Experiment:
    changed = experiment.training.model_copy(update=training)
    return experiment.model_copy(update={"training": changed})


def _model(folder: RunFolder, experiment: Experiment, layout: Layout, device: Device) -> Any:
    from internlm_lib.model.build import build_gpt_model
    from internlm_lib.weights.megatron import load_weights

    gpt = build_gpt_model(experiment.model, layout, experiment.training, device)
    load_weights(gpt, folder.huggingface, experiment.model)
    return gpt


def _measured(gpt: Any, experiment: Experiment, layout: Layout, device: Device) -> Any:
    from internlm_lib.training.activations import measure_layer, measure_rank

    training = experiment.training
    return measure_layer(gpt, training, device), measure_rank([gpt], training, layout, device)


def _apply(gpt: Any, layers: dict[str, int]) -> None:
    from internlm_lib.training.activations import apply_recompute
    from internlm_lib.training.recompute import Choice

    apply_recompute([gpt], Choice(layers, 0, 0.0))


def _trained(
    gpt: Any, experiment: Experiment, layout: Layout, device: Device, predicted: int
) -> dict[str, Any]:
    """Bytes kept of a micro-batch, then losses, gradient norms and a sum of the weights after."""
    from internlm_lib.training.activations import forward_pass, saved_bytes
    from internlm_lib.training.worker import build_engine

    measured = saved_bytes(forward_pass(gpt, experiment.training, device), gpt.parameters())
    engine = build_engine([gpt], layout, experiment)
    steps = [engine.train_step(_batches(experiment, step), 2, LR) for step in range(STEPS)]
    with engine.whole_weights() as (trained,):
        weights = sum(weight.double().abs().sum() for weight in trained.parameters())
    return {
        "predicted": predicted,
        "measured": measured,
        "losses": [step.loss for step in steps],
        "norms": [step.grad_norm for step in steps],
        "weights": float(weights),
    }


def _batches(experiment: Experiment, seed: int) -> Iterator[Any]:
    """Two micro-batches of random tokens, the same on every rank."""
    from internlm_lib.data.batches import Batch

    training = experiment.training
    shape = (training.micro_batch_size, training.seq_length + 1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        tokens = torch.randint(experiment.model.vocab_size, shape, generator=generator)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        positions = torch.arange(training.seq_length).expand_as(inputs)
        yield Batch(inputs, labels, torch.ones(inputs.shape), positions)


if __name__ == "__main__":
    rank_main(compare)
