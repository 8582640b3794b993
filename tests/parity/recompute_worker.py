"""One rank of `test_recompute.py`: trains a few steps under every policy, in one process group.

`python -m tests.parity.recompute_worker RUN_FOLDER RESULT`
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


SEQUENCE_PARALLEL = Layout(tensor_model_parallel_size=2, sequence_parallel=True)
SETTINGS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "megatron TP2 SP, fused": (SEQUENCE_PARALLEL, {}),
    "megatron TP2 SP, spelled out": (
        SEQUENCE_PARALLEL, {"use_flash_attn": False, "use_fused_rmsnorm": False},
    ),
    "ZeRO-3 DP2": (Layout(engine="deepspeed", zero_stage=3, data_parallel_size=2), {}),
}  # fmt: skip
"""Layout, and what its training differs in."""


def compare(folder: RunFolder, result: str) -> None:
    device = select_device("cpu")
    device.adapt_megatron()
    _, experiment = load_experiment(folder.experiment)
    _compare(folder, experiment, device, Path(result))


def _compare(folder: RunFolder, experiment: Experiment, device: Device, result: Path) -> None:
    from internlm_lib.model.parallel import initialize_parallel, is_rank_zero, shutdown

    initialize_parallel(SEQUENCE_PARALLEL, device)
    found = {}
    for name, (layout, keys) in SETTINGS.items():
        _split_anew(layout)
        changed = _with(experiment, **keys)
        found[name] = {
            "policies": _policies(folder, changed, layout, device),
            **_decided_twice(folder, changed, layout, device, result.with_name(f"{name}.json")),
        }
    if is_rank_zero():
        write_json(result, found)
    shutdown()


def _split_anew(layout: Layout) -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(layout.tensor_model_parallel_size)


def _policies(
    folder: RunFolder, experiment: Experiment, layout: Layout, device: Device
) -> dict[str, Any]:
    from internlm_lib.training.recompute import kept_bytes, kept_bytes_of_choice

    layer, rank = _measured(_model(folder, experiment, layout, device), experiment, layout, device)
    found = {}
    for name, keys in POLICIES.items():
        changed = _with(experiment, **keys)
        gpt = _model(folder, changed, layout, device)
        predicted = kept_bytes(layer, rank, changed.training)
        found[name] = _trained(gpt, changed, layout, device, predicted)
    for name, chosen in CHOSEN.items():
        layers = dict.fromkeys((*PARTS, WHOLE_LAYER), 0) | chosen
        gpt = _model(folder, experiment, layout, device)
        _apply(gpt, layers)
        predicted = kept_bytes_of_choice(layer, rank, layers)
        found[name] = _trained(gpt, experiment, layout, device, predicted)
    return found


def _decided_twice(
    folder: RunFolder, experiment: Experiment, layout: Layout, device: Device, record: Path
) -> dict[str, Any]:
    """With a limit halfway between all and nothing recomputed; then again, as on a restart, and
    once more with a limit that nothing fits."""
    from internlm_lib.errors import InputError
    from internlm_lib.training.activations import decide_recompute
    from internlm_lib.training.recompute import MIB, memory_bytes

    gpt = _model(folder, experiment, layout, device)
    layer, rank = _measured(gpt, experiment, layout, device)
    bounds = [
        memory_bytes(layer, rank, dict.fromkeys((*PARTS, WHOLE_LAYER), 0) | {WHOLE_LAYER: layers})
        for layers in (rank.layers, 0)
    ]
    limit = round(sum(bounds) / 2 / MIB)
    adaptive = _with(experiment, auto_recompute_device_memory_mib=limit)
    first = decide_recompute(gpt, adaptive, layout, device, record)
    assert first is not None
    written = read_json(record) if record.exists() else None
    again = _model(folder, experiment, layout, device)
    second = decide_recompute(again, adaptive, layout, device, record)
    everyone: list[Any] = [None] * layout.world_size
    sets = [sorted(layer.recompute) for layer in again.decoder.layers]
    torch.distributed.all_gather_object(everyone, (first.layers, second and second.layers, sets))
    try:
        tiny = _with(experiment, auto_recompute_device_memory_mib=1)
        decide_recompute(again, tiny, layout, device, record.with_name("none.json"))
        refusal = ""
    except InputError as error:
        refusal = str(error)
    return {
        "limit": limit, "record": written, "choices": everyone, "refusal": refusal,
        "trained": _trained(gpt, adaptive, layout, device, 0),
    }  # fmt: skip


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
    return measure_layer(gpt, training, device), measure_rank(gpt, training, layout, device)


def _apply(gpt: Any, layers: dict[str, int]) -> None:
    from internlm_lib.training.activations import apply_recompute
    from internlm_lib.training.recompute import Choice

    apply_recompute(gpt, Choice(layers, 0, 0.0))


def _trained(
    gpt: Any, experiment: Experiment, layout: Layout, device: Device, predicted: int
) -> dict[str, Any]:
    """Bytes kept of a micro-batch, then losses, gradient norms and a sum of the weights after."""
    from internlm_lib.training.activations import forward_pass, saved_bytes
    from internlm_lib.training.worker import make_engine

    measured = saved_bytes(forward_pass(gpt, experiment.training, device), gpt.parameters())
    engine = make_engine(gpt, layout, experiment)
    steps = [engine.train_step(_batches(experiment, step), 2, LR) for step in range(STEPS)]
    with engine.whole_weights() as trained:
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
