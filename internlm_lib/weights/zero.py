"""DeepSpeed's checkpoints: weights alone as AscendSpeed writes them, and those of ZeRO trainings.

A ZeRO training's weights are its fp32 main weights, which all data parallel ranks hold a part of:
bf16 or fp16 working copies are roundings of them. Source of the partitions: DeepSpeed 0.19.8,
`deepspeed/utils/zero_to_fp32.py`, which reads one tensor parallel rank and needs all of the memory.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.files import write_text
from internlm_lib.weights.checkpoint import Checkpoint
from internlm_lib.weights.classic import (
    Rank,
    allowed_in_training,
    canonical,
    nested,
    open_ranks,
)
from internlm_lib.weights.layout import classic_rules
from internlm_lib.weights.plan import PlannedFile, Target, rank_tensors
from internlm_lib.weights.storage import Run, StoredTensor
from internlm_lib.weights.torch_archive import create_archive, flatten, read_archive

_LATEST = "latest"
_MODEL_STATES = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIM_STATES = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")

_STAGE_THREE, _FLATTENED = "fp32_flat_groups", "single_partition_of_fp32_groups"


class _Unread:
    """Stands for DeepSpeed's own objects beside the tensors, which nobody reads."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


_DEEPSPEED_OBJECTS = [
    (_Unread, f"deepspeed.{name}")
    for name in (
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler",
        "runtime.zero.config.ZeroStageEnum",
        "utils.tensor_fragment.fragment_address",
    )
]


def is_deepspeed(path: Path) -> bool:
    return (path / _LATEST).is_file() or any(path.glob("*mp_rank_*_model_states.pt"))


def open_deepspeed(path: Path, model: ModelSection | None = None) -> Checkpoint:
    """The weights in a folder with `latest`, or in one of its tags.

    Args:
        model: what the checkpoint must hold; by default the preset of its shape.
    Raises:
        InputError: listing everything in which it is not the model, or naming what is damaged.
    """
    folder = _tag_folder(path)
    if folder is None or not folder.is_dir():
        raise InputError(f"{path / _LATEST} must hold the name of a folder beside it")
    states = _by_rank(folder, _MODEL_STATES)
    optimizers = _by_rank(folder, _OPTIM_STATES)
    sizes = sorted(states)
    if sizes != list(range(len(sizes))):
        raise InputError(f"{folder} has the model parallel ranks {sizes}: one is missing")
    ranks = [
        _main_weights(states[mp][0], optimizers.get(mp, [])) if optimizers else
        _module(states[mp][0])
        for mp in sizes
    ]  # fmt: skip
    # The first pipeline stage has the embedding: as many files as there are tensor parallel ranks.
    tensor_parallel = sum(any("word_embeddings" in name for name in rank) for rank in ranks)
    if not tensor_parallel or len(ranks) % tensor_parallel:
        raise InputError(f"{folder}: {tensor_parallel} of {len(ranks)} files have an embedding")
    return open_ranks(path, "deepspeed", ranks, tensor_parallel, model)


def plan_deepspeed(target: Target) -> list[PlannedFile]:
    """One file per model parallel rank, the ranks of a later stage after those of an earlier one.

    AscendSpeed's converter gave the stages one name, so that later ones overwrote earlier ones.
    """
    table, split = classic_rules(target.model, target.merge_mlp), target.split
    size = split.tensor_parallel
    return [
        PlannedFile(
            f"release/mp_rank_{rank:02}_model_states.pt",
            rank_tensors(table, split, rank % size, rank // size),
        )
        for rank in range(size * split.pipeline_parallel)
    ]


def create_deepspeed(folder: Path, file: PlannedFile, target: Target) -> None:
    """Write one rank's file, with holes for the tensors, and every key that DeepSpeed asks for.

    AscendSpeed's converter wrote a `dp_world_size` of 0, which DeepSpeed cannot load.
    """
    (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
    ranks = target.split.tensor_parallel * target.split.pipeline_parallel
    bookkeeping = {"dp_world_size": 1, "mp_world_size": ranks, "global_steps": 0,
                   "skipped_steps": 0, "lr_scheduler": None}  # fmt: skip
    tree = {"checkpoint_version": 3.0, "module": nested(file, target), **bookkeeping}
    create_archive(folder / file.path, tree)


def locate_deepspeed(folder: Path, file: PlannedFile, target: Target) -> Rank:
    return _module(folder / file.path)


def finish_deepspeed(folder: Path, files: Sequence[PlannedFile], target: Target) -> None:
    write_text(folder / _LATEST, "release")


def _tag_folder(path: Path) -> Path | None:
    latest = path / _LATEST
    if not latest.is_file():
        return path
    name = latest.read_text(errors="replace").strip()
    return path / name if re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,199}", name) else None


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> dict[int, list[Path]]:
    """Model parallel rank → its files, by data parallel rank."""
    found: dict[int, dict[int, Path]] = {}
    for file in folder.glob("*_states.pt"):
        if match := pattern.fullmatch(file.name):
            found.setdefault(int(match[2]), {})[int(match[1] or 0)] = file
    return {mp: [files[dp] for dp in sorted(files)] for mp, files in found.items()}


def _module(file: Path) -> Rank:
    content = _read(file)
    if not isinstance(content.get("module"), dict):
        raise InputError(f"{file} has no 'module' with a rank's weights")
    return canonical(flatten(content["module"], file))


def _main_weights(states: Path, optimizers: Sequence[Path]) -> Rank:
    """The fp32 main weights of a model parallel rank, gathered from its data parallel ranks."""
    partitions = [_read(file).get("optimizer_state_dict", {}) for file in optimizers]
    if not partitions or not {_STAGE_THREE, _FLATTENED} & partitions[0].keys():
        raise InputError(f"{states}: its optimizer states hold no ZeRO partition")
    count = partitions[0]["partition_count"]
    world = max(count) if isinstance(count, list) else count
    if world != len(partitions):
        raise InputError(
            f"{states.parent} has {len(partitions)} optimizer files of {states.name}, of which "
            f"there were {world}: the checkpoint is incomplete"
        )
    shapes: list[Mapping[str, Sequence[int]]] = _read(states)["param_shapes"]
    if _STAGE_THREE in partitions[0]:
        flat = [partition[_STAGE_THREE] for partition in partitions]
        return canonical(_stage_three(flat, {k: v for group in shapes for k, v in group.items()}))
    flat = [partition[_FLATTENED] for partition in partitions]
    paddings = partitions[0].get("param_alignment_paddings")
    rank: Rank = {}
    for number, group in enumerate(shapes):
        parts = [groups[number] for groups in flat]
        rank |= _flattened(parts, group, paddings[number] if paddings else None)
    return canonical(rank)


def _flattened(
    parts: Sequence[StoredTensor],
    shapes: Mapping[str, Sequence[int]],
    paddings: Sequence[int] | None,
) -> Rank:
    """ZeRO 1 and 2: the parameters of a group one after the other, cut into equal parts."""
    rank, offset = {}, 0
    for number, (name, shape) in enumerate(shapes.items()):
        size = math.prod(shape)
        runs = _cut(parts, offset, offset + size)
        rank[name] = StoredTensor(tuple(shape), parts[0].dtype, tuple(runs))
        offset += size + (paddings[number] if paddings else 0)
    return rank


def _stage_three(
    flat: Sequence[Sequence[StoredTensor]], shapes: Mapping[str, Sequence[int]]
) -> Rank:
    """ZeRO 3: every parameter cut into equal parts, each rank's parts one after the other."""
    rank, offset = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        share = math.ceil(size / len(flat))
        runs: list[Run] = []
        for number, groups in enumerate(flat):
            start = number * share
            stop = min(start + share, size)
            if start < stop:
                own = _cut(groups, offset, offset + stop - start)
                runs += [Run(start + r.start, start + r.stop, r.file, r.offset) for r in own]
        rank[name] = StoredTensor(tuple(shape), flat[0][0].dtype, tuple(runs))
        offset += share
    return rank


def _cut(parts: Sequence[StoredTensor], start: int, stop: int) -> list[Run]:
    """Runs of elements [start, stop) of one-dimensional tensors laid end to end, counted from 0."""
    runs, begin = [], 0
    for part in parts:
        low, high = max(start, begin), min(stop, begin + part.shape[0])
        if low < high:
            byte = part.runs[0].offset + (low - begin) * part.dtype.itemsize
            runs.append(Run(low - start, high - start, part.runs[0].file, byte))
        begin += part.shape[0]
    return runs


def _read(file: Path) -> dict[str, Any]:
    content = read_archive(file, [*_DEEPSPEED_OBJECTS, *allowed_in_training()])
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, not DeepSpeed's dict")
    return content
