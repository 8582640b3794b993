"""The formats of AscendSpeed and the old Megatron-LM: one torch file per rank.

Source: AscendSpeed, `tools/ckpt_convert/llama` (layout of the folders and of query_key_value,
padding of the vocabulary) and `ascendspeed/checkpointing.py` (what training adds).
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.files import write_text
from internlm_lib.weights.checkpoint import Checkpoint, assemble, check_tensors
from internlm_lib.weights.layout import LAYER, TensorRule, classic_rules, huggingface_shapes, rules
from internlm_lib.weights.model_config import preset_of
from internlm_lib.weights.plan import Partition, PlannedFile, Target, indivisible, rank_tensors
from internlm_lib.weights.storage import StoredTensor
from internlm_lib.weights.torch_archive import create_archive, flatten, read_archive

_TRACKER = "latest_checkpointed_iteration.txt"
_RANK_FILE = "model_optim_rng.pt"
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_EMBEDDING, _FINAL_NORM = "embedding.word_embeddings.weight", "encoder.final_layernorm.weight"
_NO_WEIGHTS = ("inv_freq", "_extra_state")

Rank = dict[str, StoredTensor]
"""Name → where it lies, of the weights of one rank."""


def is_classic(path: Path) -> bool:
    return (path / _TRACKER).is_file() or any(path.glob(f"mp_rank_*/{_RANK_FILE}"))


def open_classic(path: Path, model: ModelSection | None = None) -> Checkpoint:
    """The weights in a folder with `latest_checkpointed_iteration.txt`, or in an iteration's.

    Args:
        model: what the checkpoint must hold; by default the preset of its shape.
    Raises:
        InputError: listing everything in which it is not the model, or naming what is damaged.
    """
    folder = _iteration_folder(path)
    if folder is None or not folder.is_dir():
        raise InputError(
            f"{path / _TRACKER} names no folder beside it; it must hold 'release' or the number of "
            "an iteration"
        )
    grid: dict[tuple[int, int], Path] = {}
    for file in folder.glob(f"mp_rank_*/{_RANK_FILE}"):
        if match := _RANK_FOLDER.fullmatch(file.parent.name):
            grid[int(match[2] or 0), int(match[1])] = file
    stages, size = (max((key[i] for key in grid), default=-1) + 1 for i in (0, 1))
    if absent := [at for at in _grid(stages, size) if at not in grid]:
        names = ", ".join(_rank_folder(tp, stage, stages) for stage, tp in absent)
        raise InputError(f"{folder} has {len(grid)} ranks of TP{size} PP{stages}; missing: {names}")
    ranks = [_weights(grid[at], read_rank(grid[at]), "model") for at in _grid(stages, size)]
    return open_ranks(path, "classic", ranks, size, model)


def plan_classic(target: Target) -> list[PlannedFile]:
    table, split = classic_rules(target.model, target.merge_mlp), target.split
    stages = split.pipeline_parallel
    return [
        PlannedFile(
            f"release/{_rank_folder(tp, stage, stages)}/{_RANK_FILE}",
            rank_tensors(table, split, tp, stage),
        )
        for stage, tp in _grid(stages, split.tensor_parallel)
    ]


def create_classic(folder: Path, file: PlannedFile, target: Target) -> None:
    """Write one rank's file, with holes for the tensors."""
    (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
    tree = {"checkpoint_version": 3.0, "model": nested(file, target)}
    create_archive(folder / file.path, tree)


def locate_classic(folder: Path, file: PlannedFile, target: Target) -> Rank:
    return _weights(folder / file.path, read_archive(folder / file.path), "model")


def finish_classic(folder: Path, files: Sequence[PlannedFile], target: Target) -> None:
    write_text(folder / _TRACKER, "release")


def open_ranks(
    path: Path,
    format_name: str,
    ranks: Sequence[Rank],
    tensor_parallel: int,
    model: ModelSection | None,
) -> Checkpoint:
    """A checkpoint of ranks that each hold their own part under classic or GPTModel's names.

    Args:
        ranks: all tensor parallel ranks of the first pipeline stage, then those of the next.
    Raises:
        InputError: listing everything in which it is not the model.
    """
    stages = [ranks[i] for i in range(0, len(ranks), tensor_parallel)]
    shapes = {name: t.shape for rank in stages for name, t in rank.items()}
    model = model or _preset(shapes, stages, tensor_parallel)
    if problems := indivisible(model, tensor_parallel):
        raise InputError("\n  - ".join([f"{path} cannot be this model:", *problems]))
    padded = shapes.get(_EMBEDDING, (model.vocab_size // tensor_parallel,))[0] * tensor_parallel
    split = Partition(tensor_parallel, tuple(_layers(rank) for rank in stages), padded)
    table = _table(shapes, model)
    expected: dict[str, tuple[int, ...]] = {}
    found: dict[str, tuple[int, ...]] = {}
    stored = []
    for number, (stage, tp) in enumerate(_grid(len(stages), tensor_parallel)):
        rank = ranks[number]
        label = _rank_folder(tp, stage, len(stages))
        found |= {f"{label}: {name}": tensor.shape for name, tensor in rank.items()}
        for planned in rank_tensors(table, split, tp, stage):
            expected[f"{label}: {planned.name}"] = planned.shape
            if planned.name in rank:
                stored.append((planned, rank[planned.name]))
    problems = []
    if sum(split.layers_per_stage) != model.num_layers:
        problems.append(f"{sum(split.layers_per_stage)} layers, but model.num_layers = "
                        f"{model.num_layers}")  # fmt: skip
    if padded < model.vocab_size:
        problems.append(f"{padded} rows of embedding, but model.vocab_size = {model.vocab_size}")
    check_tensors(path, expected, found, problems)
    files = {file for rank in ranks for tensor in rank.values() for file in tensor.files}
    tensors = assemble(huggingface_shapes(model), stored)
    return Checkpoint(path, format_name, split.label, model, tensors, files)


def read_rank(file: Path) -> Any:
    """A rank's file; training saves its arguments and random states beside the weights."""
    return read_archive(file, allowed_in_training())


def canonical(rank: Rank) -> Rank:
    """A rank's weights under the names of `layout`, whichever of their variants they have.

    Raises InputError if two of them are the same tensor's.
    """
    named: Rank = {}
    for theirs, tensor in rank.items():
        if (name := _canonical(theirs)) in named:
            raise InputError(f"{tensor.runs[0].file} has {name} twice, once as {theirs}")
        if not name.endswith(_NO_WEIGHTS):
            named[name] = tensor
    if any(".mlp.gate_proj." in name for name in named):
        return named
    # Megatron-LM's --swiglu keeps gate and up in dense_h_to_4h.
    return {n.replace("mlp.dense_h_to_4h", "mlp.proj"): tensor for n, tensor in named.items()}


def nested(file: PlannedFile, target: Target) -> dict[str, Any]:
    """The planned tensors in the nested dicts of `state_dict_for_save_checkpoint`."""
    language_model: dict[str, Any] = {}
    for tensor in file.tensors:
        part, _, rest = tensor.name.partition(".")
        place = language_model.setdefault(part, {})
        for name in rest.split(".")[:-1] if part != "encoder" else []:
            place = place.setdefault(name, {})
        leaf = rest if part == "encoder" else rest.split(".")[-1]
        place[leaf] = (tensor.shape, target.dtype(tensor))
    return {"language_model": language_model}


def _iteration_folder(path: Path) -> Path | None:
    """The folder of ranks: what the tracker names, or `path` itself."""
    tracker = path / _TRACKER
    if not tracker.is_file():
        return path
    name = tracker.read_text(errors="replace").strip()
    if re.fullmatch(r"[0-9]{1,15}", name):
        name = f"iter_{int(name):07}"
    return path / name if re.fullmatch(r"release|iter_[0-9]{7,15}", name) else None


def _grid(stages: int, size: int) -> list[tuple[int, int]]:
    return [(stage, tp) for stage in range(stages) for tp in range(size)]


def _rank_folder(tp: int, stage: int, stages: int) -> str:
    return f"mp_rank_{tp:02}" if stages == 1 else f"mp_rank_{tp:02}_{stage:03}"


def _weights(file: Path, content: Any, key: str) -> Rank:
    if not isinstance(content, dict) or not isinstance(content.get(key), dict):
        raise InputError(f"{file} has no {key!r} with a rank's weights")
    return canonical(flatten(content[key], file))


def _canonical(name: str) -> str:
    if name.endswith("word_embeddings.weight"):
        return _EMBEDDING
    if "decoder." in name:  # megatron-core's
        return name[name.index("decoder.") :]
    if name.endswith("final_layernorm.weight"):
        return _FINAL_NORM
    if name.split(".")[0] == "lm_head" or name.endswith("output_layer.weight"):
        return "output_layer.weight"
    _, found, rest = name.partition("layers.")
    for theirs, ours in ((".attention.", ".self_attention."), ("up_proj", "dense_h_to_4h"),
                         ("down_proj", "dense_4h_to_h")):  # fmt: skip
        rest = rest.replace(theirs, ours)
    return f"encoder.layers.{rest}" if found else name


def _table(shapes: Mapping[str, tuple[int, ...]], model: ModelSection) -> list[TensorRule]:
    """The rules of the names at hand."""
    if any(".linear_qkv." in name for name in shapes):
        return rules(model)
    return classic_rules(model, any(name.endswith("mlp.proj.weight") for name in shapes))


def _layers(rank: Rank) -> int:
    numbers = {int(found[0]) for name in rank if (found := LAYER.search(name))}
    return max(numbers, default=-1) + 1


def _preset(
    shapes: Mapping[str, tuple[int, ...]], stages: Sequence[Rank], tensor_parallel: int
) -> ModelSection:
    first = {name.split("layers.0.")[1]: shape for name, shape in shapes.items()
             if "layers.0." in name}  # fmt: skip
    gate_rows = first.get("mlp.gate_proj.weight", (0,))[0]
    both_rows = first.get("mlp.proj.weight", first.get("mlp.linear_fc1.weight", (0,)))[0]
    return preset_of(
        num_layers=sum(_layers(rank) for rank in stages),
        hidden_size=first.get("input_layernorm.weight", (0,))[0],
        ffn_hidden_size=(gate_rows or both_rows // 2) * tensor_parallel,
        bias=any(name.endswith(".bias") for name in first),
    )


def allowed_in_training() -> list[Any]:
    """What AscendSpeed and Megatron-LM save beside tensors: arguments and numpy's random state."""
    import numpy

    reconstruct = numpy.empty(0).__reduce__()[0]
    return [
        argparse.Namespace,
        numpy.ndarray,
        numpy.dtype,
        type(numpy.dtype("uint32")),
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
    ]
