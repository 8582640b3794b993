"""What to recompute so that a training fits a device (`training.auto_recompute_device_memory_mib`).

Every rank measures one layer and what lies around the layers (`activations.py`); from what all of
them found, every rank makes the same choice here. Imports nothing heavy.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import Layout, TrainingSection
from internlm_lib.model.parts import PARTS, WHOLE_LAYER

MIB = 1 << 20


@dataclass(frozen=True)
class PartCost:
    """Recomputing one part of one layer, for one micro-batch."""

    name: str
    saved_bytes: int
    """How much less is kept for the backward pass."""
    seconds: float
    """Its forward pass, which is run once more; 0 where nothing is computed (meta device)."""


@dataclass(frozen=True)
class LayerCost:
    """One layer, for one micro-batch, on one rank."""

    kept_bytes: int
    """Kept for the backward pass without recomputation."""
    selective_saved_bytes: int
    """How much less with `recompute_granularity: selective`."""
    rotary_bytes: int
    """The table of rotary angles, which megatron's `full` keeps, once for all layers."""
    parts: tuple[PartCost, ...]
    """Those of `PARTS`, then `WHOLE_LAYER`."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "LayerCost":
        """From what `dataclasses.asdict` made of one."""
        return cls(**{**values, "parts": tuple(PartCost(**part) for part in values["parts"])})

    def part(self, name: str) -> PartCost:
        return next(part for part in self.parts if part.name == name)


@dataclass(frozen=True)
class RankMemory:
    """What else a rank holds."""

    state_bytes: int
    """Weights, gradients and optimizer state: `model.arithmetic.rank_state_bytes`."""
    around_bytes: int
    """Kept per micro-batch outside the layers: the output head on the last pipeline stage."""
    layers: int
    in_flight: int
    """Micro-batches between their forward and backward pass at the same time."""


@dataclass(frozen=True)
class Choice:
    """Of which parts how many layers of every rank are recomputed, counted from its first one."""

    layers: dict[str, int]
    """`WHOLE_LAYER` → number of layers recomputed whole; part → number of layers after these."""
    memory_bytes: int
    """Of the fullest rank."""
    added_seconds: float
    """Per micro-batch and rank."""

    def parts_of(self, index: int) -> frozenset[str]:
        """What is recomputed of a rank's layer `index`, counted from 0."""
        whole = self.layers[WHOLE_LAYER]
        if index < whole:
            return frozenset([WHOLE_LAYER])
        return frozenset(name for name in PARTS if index - whole < self.layers[name])


def micro_batches_in_flight(
    layout: Layout, stage: int, num_micro_batches: int, chunks: int = 1
) -> int:
    """Micro-batches whose activations a pipeline stage holds: 1F1B, p − s on stage s of p.

    Interleaved over v chunks, 2 (p − s − 1) + (v − 1) p + 1 passes through a chunk are in flight,
    more of the first chunk than of the last. Rounded up to whole micro-batches, and with the first
    layers recomputed, that is an upper bound. Source: Narayanan et al. 2021, megatron-core's
    schedules.
    """
    stages = layout.pipeline_model_parallel_size
    behind = stages - stage - 1
    passes = behind if chunks == 1 else 2 * behind + (chunks - 1) * stages
    return min(math.ceil((passes + 1) / chunks), num_micro_batches)


def kept_bytes(layer: LayerCost, rank: RankMemory, training: TrainingSection) -> int:
    """Activations kept of one micro-batch under `recompute_granularity`, in bytes."""
    whole = layer.part(WHOLE_LAYER)
    layer_input = layer.kept_bytes - whole.saved_bytes
    number = training.recompute_num_layers or 1
    kept = rank.layers * layer.kept_bytes
    if training.recompute_granularity == "selective":
        kept -= rank.layers * layer.selective_saved_bytes
    elif training.recompute_granularity == "full" and training.recompute_method == "block":
        kept -= number * whole.saved_bytes - layer.rotary_bytes
    elif training.recompute_granularity == "full":
        kept = rank.layers // number * layer_input + layer.rotary_bytes
    return rank.around_bytes + kept


def kept_bytes_of_choice(layer: LayerCost, rank: RankMemory, layers: Mapping[str, int]) -> int:
    """Activations kept of one micro-batch if `layers` of each part are recomputed, in bytes."""
    saved = sum(layer.part(name).saved_bytes * number for name, number in layers.items())
    return rank.around_bytes + rank.layers * layer.kept_bytes - saved


def memory_bytes(layer: LayerCost, rank: RankMemory, layers: Mapping[str, int]) -> int:
    """States, the activations in flight, and what comes on top of them for a while.

    That is, whichever is more: the loss and its gradient, taken to be as large as all that is kept
    around the layers; or what is recomputed of one layer (of its parts twice, an upper bound:
    megatron copies the outputs it computes again into the tensors it had dropped). Not counted:
    what the framework, the collectives' buffers and fragmentation take.
    """
    return _total(rank, kept_bytes_of_choice(layer, rank, layers), _returning(layer, layers))


def _total(rank: RankMemory, kept: int, returning: int) -> int:
    return rank.state_bytes + rank.in_flight * kept + max(rank.around_bytes, returning)


def _returning(layer: LayerCost, layers: Mapping[str, int]) -> int:
    """Bytes of one layer that are there again while its backward pass runs."""
    parts = 2 * sum(layer.part(name).saved_bytes for name in PARTS if layers[name])
    return max(parts, layer.part(WHOLE_LAYER).saved_bytes if layers[WHOLE_LAYER] else 0)


def choose(layer: LayerCost, ranks: Sequence[RankMemory], limit_mib: int, layout: Layout) -> Choice:
    """The choice that adds least time of all that fit every rank: a search of all, no heuristic.

    What returns in the backward pass depends only on whether layers are recomputed whole and on
    which parts of others are. So for every number of whole layers and every set of parts, the bytes
    still to be saved are known, and the numbers of layers are those of a small integer program.

    Args:
        layer: measured on one rank; ranks of other stages have the same layers.
        limit_mib: `training.auto_recompute_device_memory_mib`.
    Raises:
        InputError: none fits; it says by how many MiB.
    """
    kinds, number = set(ranks), min(rank.layers for rank in ranks)
    limit = limit_mib * MIB
    best: tuple[float, dict[str, int]] | None = None
    for whole in range(number + 1):
        seconds = whole * layer.part(WHOLE_LAYER).seconds
        if best and seconds >= best[0]:
            break
        for parts in _sets_of_parts(layer):
            layers = _layers(whole, parts, 0)
            returning = _returning(layer, _layers(whole, parts, 1))
            needed = max(
                math.ceil(
                    (_total(rank, kept_bytes_of_choice(layer, rank, layers), returning) - limit)
                    / rank.in_flight
                )
                for rank in kinds
            )
            bound = best[0] - seconds if best else math.inf
            if found := _cheapest_cover(parts, number - whole, needed, bound):
                best = (seconds + found[0], layers | found[1])
    if best is None:
        raise InputError(_too_much(layer, kinds, number, limit_mib, layout))
    fullest = max(memory_bytes(layer, rank, best[1]) for rank in kinds)
    return Choice(best[1], fullest, best[0])


def _sets_of_parts(layer: LayerCost) -> list[list[PartCost]]:
    """All sets of parts that save memory, small ones first."""
    useful = [layer.part(name) for name in PARTS if layer.part(name).saved_bytes > 0]
    sizes = range(len(useful) + 1)
    return [list(chosen) for size in sizes for chosen in combinations(useful, size)]


def _layers(whole: int, parts: Sequence[PartCost], number: int) -> dict[str, int]:
    """`whole` layers, and of each of the parts `number`, as `Choice.layers`."""
    return {
        WHOLE_LAYER: whole,
        **dict.fromkeys(PARTS, 0),
        **{part.name: number for part in parts},
    }


def _cheapest_cover(
    parts: Sequence[PartCost], limit: int, needed: int, bound: float
) -> tuple[float, dict[str, int]] | None:
    """0 … `limit` of each part that save `needed` bytes in least time, if in less than `bound` s.

    Branch and bound; the bound is that of the relaxation to fractions of a layer.
    """
    ordered = sorted(parts, key=lambda part: (part.seconds / part.saved_bytes, part.name))
    best: tuple[float, dict[str, int]] | None = None

    def least_seconds(index: int, needed: float) -> float:
        seconds = 0.0
        for part in ordered[index:]:
            used = min(limit, max(needed, 0) / part.saved_bytes)
            seconds += used * part.seconds
            needed -= used * part.saved_bytes
        # What is left of it is a rounding error, or more than all parts save.
        return seconds if needed < 1 else math.inf

    def search(index: int, needed: int, seconds: float, chosen: dict[str, int]) -> None:
        nonlocal best, bound
        if needed <= 0:
            if seconds < bound:
                best, bound = (seconds, chosen), seconds
            return
        if index == len(ordered) or seconds + least_seconds(index, needed) >= bound:
            return
        part = ordered[index]
        for count in range(min(limit, math.ceil(needed / part.saved_bytes)), -1, -1):
            more = (needed - count * part.saved_bytes, seconds + count * part.seconds)
            search(index + 1, *more, {**chosen, part.name: count})

    search(0, needed, 0.0, {})
    return best


def _too_much(
    layer: LayerCost, kinds: Collection[RankMemory], number: int, limit_mib: int, layout: Layout
) -> str:
    extremes = (
        _layers(whole, parts, number - whole)
        for whole in range(number + 1)
        for parts in _sets_of_parts(layer)
    )
    least = min(max(memory_bytes(layer, rank, each) for rank in kinds) for each in extremes)
    needed = math.ceil(least / MIB)
    return (
        f"training.auto_recompute_device_memory_mib = {limit_mib}: {layout.label} needs {needed} "
        f"MiB per device, {needed - limit_mib} MiB more, even with all recomputed that saves "
        "memory; raise tensor or pipeline parallel size, lower training.micro_batch_size, or raise "
        "it"
    )


def rows(layer: LayerCost, choice: Choice) -> list[dict[str, Any]]:
    """The table of a choice, one row per part: what it saves and takes, per micro-batch."""
    return [
        {
            "part": part.name,
            "saves MiB per layer": part.saved_bytes / MIB,
            "adds ms per layer": part.seconds * 1000,
            "layers recomputed": (number := choice.layers[part.name]),
            "saves MiB": number * part.saved_bytes / MIB,
            "adds ms": number * part.seconds * 1000,
        }
        for part in layer.parts
    ]


def choice_record(
    inputs: Mapping[str, Any], layer: LayerCost, ranks: Sequence[RankMemory], choice: Choice
) -> dict[str, Any]:
    """What is written beside the training: the choice, what it was made of, and its table."""
    return {
        "inputs": dict(inputs),
        "choice": asdict(choice),
        "layer": asdict(layer),
        "ranks": [asdict(rank) for rank in ranks],
        "rows": rows(layer, choice),
    }
