"""What a rank's layers keep for the backward pass, and how long their parts take: measured.

Bytes are those of the distinct storages that torch saves, parameters apart, on any device, the meta
device included. Import only after `Device.adapt_megatron()`.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from internlm_lib.devices import Device
from internlm_lib.experiment.schema import Experiment, Layout, TrainingSection
from internlm_lib.files import read_json, write_json
from internlm_lib.model.arithmetic import rank_state_bytes
from internlm_lib.model.layer import RecomputingLayer
from internlm_lib.model.parallel import is_rank_zero
from internlm_lib.model.parts import PARTS, WHOLE_LAYER
from internlm_lib.model.precision import DTYPES
from internlm_lib.training.recompute import (
    Choice,
    LayerCost,
    PartCost,
    RankMemory,
    choice_record,
    choose,
    micro_batches_in_flight,
)

_TIMINGS = 5


def decide_recompute(
    chunks: Sequence[GPTModel],
    experiment: Experiment,
    layout: Layout,
    device: Device,
    record: Path,
) -> Choice | None:
    """Choose what to recompute, or take what an earlier start of this training chose, and set it on
    the rank's layers; None without `training.auto_recompute_device_memory_mib`. Collective.

    Args:
        chunks: the rank's part of the model, with its weights: more than one if interleaved.
        record: JSON file of the choice; rank 0 writes it.
    Raises:
        InputError: nothing that fits; on all ranks.
    """
    limit = experiment.training.auto_recompute_device_memory_mib
    if limit is None:
        return None
    inputs = _inputs(experiment, layout, device)
    choice = _earlier_choice(record, inputs)
    if choice is None:
        mine = (
            measure_layer(chunks[0], experiment.training, device),
            measure_rank(chunks, experiment.training, layout, device),
        )
        everyone: list[tuple[LayerCost, RankMemory]] = [mine] * layout.world_size
        torch.distributed.all_gather_object(everyone, mine)
        layer, ranks = everyone[0][0], [rank for _, rank in everyone]
        choice = choose(layer, ranks, limit, layout)
        if is_rank_zero():
            write_json(record, choice_record(inputs, layer, ranks, choice))
    apply_recompute(chunks, choice)
    return choice


def apply_recompute(chunks: Sequence[GPTModel], choice: Choice) -> None:
    """Set a choice on the rank's layers, counted over its chunks."""
    layers = (layer for gpt in chunks for layer in gpt.decoder.layers)
    for index, layer in enumerate(layers):
        layer.recompute = choice.parts_of(index)


def measure_layer(gpt: GPTModel, training: TrainingSection, device: Device) -> LayerCost:
    """The rank's first layer with nothing, each part, and all of it recomputed. Collective over
    tensor parallel ranks. On the meta device times are 0."""
    layer, x = gpt.decoder.layers[0], _layer_input(gpt, training, device)
    rotary = gpt.rotary_pos_emb(training.seq_length)

    def forward() -> Tensor:
        out: Tensor = layer(hidden_states=x, attention_mask=None, rotary_pos_emb=rotary)[0]
        return out

    def kept(*parts: str) -> int:
        with _recomputing(layer, frozenset(parts)):
            return saved_bytes(forward, layer.parameters())

    whole = kept()
    with _selective(layer):
        selective_saved = whole - kept()
    seconds = _part_seconds(layer, x, rotary, device)
    parts = (PartCost(name, whole - kept(name), seconds[name]) for name in (*PARTS, WHOLE_LAYER))
    return LayerCost(whole, selective_saved, rotary.untyped_storage().nbytes(), tuple(parts))


def measure_rank(
    chunks: Sequence[GPTModel], training: TrainingSection, layout: Layout, device: Device
) -> RankMemory:
    """What a rank holds beside its layers. Collective over tensor parallel ranks."""
    parameters = sum(parameter.numel() for gpt in chunks for parameter in gpt.parameters())
    states = rank_state_bytes(parameters, layout, training.precision)
    return RankMemory(
        state_bytes=sum(states.values()),
        around_bytes=sum(_bytes_around(gpt, training, device) for gpt in chunks),
        layers=sum(len(gpt.decoder.layers) for gpt in chunks),
        in_flight=micro_batches_in_flight(
            layout,
            parallel_state.get_pipeline_model_parallel_rank(),
            training.num_micro_batches(layout),
            len(chunks),
        ),
    )


def _bytes_around(gpt: GPTModel, training: TrainingSection, device: Device) -> int:
    """What a forward pass without layers keeps: that of the embedding and of the output head."""
    layers = gpt.decoder.layers
    gpt.decoder.layers = torch.nn.ModuleList()
    try:
        return saved_bytes(forward_pass(gpt, training, device), gpt.parameters())
    finally:
        gpt.decoder.layers = layers


def forward_pass(gpt: GPTModel, training: TrainingSection, device: Device) -> Callable[[], Tensor]:
    """A forward pass of this rank's part of the model: a micro-batch of zeros, and on later
    pipeline stages an input of ones."""
    tokens = torch.zeros(
        training.micro_batch_size, training.seq_length, dtype=torch.int64, device=device.current()
    )
    x = None if gpt.pre_process else _layer_input(gpt, training, device)

    def forward() -> Tensor:
        if x is not None:
            gpt.set_input_tensor(x)
        out: Tensor = gpt(tokens, tokens, None, labels=tokens)
        if x is not None:
            gpt.set_input_tensor(None)
        return out

    return forward


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, as they are when it has ended."""
    return counted(forward, parameters)[1]


def counted(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> tuple[Tensor, int]:
    """What a forward pass returns, and `saved_bytes` of it."""
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    # Kept alive while counting: the address of a storage that is gone may be given to another.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    # Counted at the end: outputs that are recomputed were saved first and emptied later.
    return output, sum(storage.nbytes() for storage in kept.values())


def _layer_input(gpt: GPTModel, training: TrainingSection, device: Device) -> Tensor:
    """Ones, [s, b, h], of the sequence this rank's part; random ones would change later draws."""
    config = gpt.config
    shared = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return torch.ones(
        training.seq_length // shared, training.micro_batch_size, config.hidden_size,
        dtype=DTYPES[training.precision], device=device.current(), requires_grad=True,
    )  # fmt: skip


@contextmanager
def _recomputing(layer: RecomputingLayer, parts: frozenset[str]) -> Iterator[None]:
    before = layer.recompute
    layer.recompute = parts
    try:
        yield
    finally:
        layer.recompute = before


@contextmanager
def _selective(layer: RecomputingLayer) -> Iterator[None]:
    """megatron-core's `recompute_granularity: selective` for one layer."""
    attention = layer.self_attention
    before = attention.checkpoint_core_attention
    attention.checkpoint_core_attention = True
    try:
        yield
    finally:
        attention.checkpoint_core_attention = before


def _part_seconds(
    layer: RecomputingLayer, x: Tensor, rotary: Tensor, device: Device
) -> dict[str, float]:
    """Medians of the parts' forward passes after one to warm up; the layer's is the sum of all."""
    if device.name == "meta":
        return dict.fromkeys((*PARTS, WHOLE_LAYER), 0.0)
    taken: dict[str, list[float]] = defaultdict(list)

    def run(part: str, function: Callable[..., Any], *tensors: Tensor) -> Any:
        device.synchronize()
        begin = time.perf_counter()
        outputs = function(*tensors)
        device.synchronize()
        taken[part].append(time.perf_counter() - begin)
        return outputs

    for _ in range(1 + _TIMINGS):
        layer.in_parts(x, rotary, None, run)
    seconds = {part: median(times[1:]) for part, times in taken.items()}
    return {**seconds, WHOLE_LAYER: sum(seconds.values())}


def _inputs(experiment: Experiment, layout: Layout, device: Device) -> dict[str, Any]:
    """All that a choice depends on."""
    read = (
        "auto_recompute_device_memory_mib", "precision", "seq_length", "micro_batch_size",
        "global_batch_size", *experiment.training.kernel_switches,
    )  # fmt: skip
    return {
        "model": experiment.model.model_dump(mode="json"),
        "training": {name: getattr(experiment.training, name) for name in read},
        "layout": layout.model_dump(mode="json"),
        "device": device.description(),
        "torch": torch.__version__,
    }


def _earlier_choice(record: Path, inputs: Mapping[str, Any]) -> Choice | None:
    """What rank 0 finds on its disk, told to all."""
    found: list[Choice | None] = [None]
    if is_rank_zero() and record.exists():
        saved = read_json(record)
        if saved["inputs"] == inputs:
            found = [Choice(**saved["choice"])]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]
