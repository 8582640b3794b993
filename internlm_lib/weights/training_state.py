"""The state of a training: fp32 main weights and Adam's moments, of any engine and layout.

The kit's own format, because neither engine can read the other's, and DeepSpeed's depends on the
number of ranks. Every rank writes one safetensors file, `rank-00003.safetensors`, with the elements
that it alone keeps: `<kind>/<parameter>` is one-dimensional float32, a run of elements of that
parameter's tensor parallel part in row-major order. The file's `__metadata__` says which part and
where the run begins. So the state is read like weights: as slices, for any other layout.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.weights.checkpoint import Checkpoint, assemble, check_tensors
from internlm_lib.weights.huggingface import safetensors_file
from internlm_lib.weights.layout import huggingface_shapes, local_shape, pieces, rules
from internlm_lib.weights.plan import PlannedTensor
from internlm_lib.weights.storage import Run, StoredTensor

Kind = Literal["main", "exp_avg", "exp_avg_sq"]
"""The fp32 weight that the optimizer updates, and Adam's two moments of it."""
KINDS: tuple[Kind, ...] = get_args(Kind)

STATE = "state.json"
_RANK_FILE = re.compile(r"rank-\d{5}\.safetensors")
_PLACES = "places"
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Place:
    """Where a rank's elements of a parameter belong."""

    tp_rank: int
    tp_size: int
    local_shape: tuple[int, ...]
    """Of the tensor parallel part, padded vocabulary included."""
    start: int
    """First element in that part."""


def rank_file(rank: int) -> str:
    return f"rank-{rank:05}.safetensors"


def write_rank(path: Path, tensors: Mapping[str, Tensor], places: Mapping[str, Place]) -> None:
    """Write one rank's elements.

    Args:
        tensors: `<kind>/<parameter>` → float32 [n], on the CPU.
        places: by parameter.
    """
    save_file(dict(tensors), path, {_PLACES: json.dumps({k: vars(v) for k, v in places.items()})})


def is_training_state(path: Path) -> bool:
    return (path / STATE).is_file() and (path / rank_file(0)).is_file()


def open_training_state(
    path: Path, model: ModelSection | None = None, kind: Kind = "main"
) -> Checkpoint:
    """One kind of the state, as logical tensors; "main" is the weights.

    Args:
        model: what the state must be of; by default the model of the config.json beside it.
    Raises:
        InputError: listing everything in which it is not, or naming the file that is damaged.
    """
    if model is None:
        raise InputError(f"{path}: config.json is missing, which says what model this is")
    parts: dict[tuple[str, int], list[tuple[Place, StoredTensor]]] = {}
    files = sorted(f for f in path.iterdir() if _RANK_FILE.fullmatch(f.name))
    for file in files:
        places = _places(file)
        for key, stored in safetensors_file(file).items():
            own, _, name = key.partition("/")
            if own == kind:
                parts.setdefault((name, places[name].tp_rank), []).append((places[name], stored))
    tensors = {key: _joined(found) for key, found in parts.items()}
    sizes = {place.tp_size for found in parts.values() for place, _ in found}
    if len(sizes) != 1:
        raise InputError(f"{path}: its files name the tensor parallel sizes {sorted(sizes)}")
    (size,) = sizes
    return _checkpoint(path, model, tensors, size, files)


def _checkpoint(
    path: Path,
    model: ModelSection,
    tensors: Mapping[tuple[str, int], StoredTensor],
    tp_size: int,
    files: Iterable[Path],
) -> Checkpoint:
    padded = model.vocab_size
    if (_EMBEDDING, 0) in tensors:
        padded = tensors[_EMBEDDING, 0].shape[0] * tp_size
    expected, stored = {}, []
    for rule in rules(model):
        # What every tensor parallel rank holds alike, only the first one writes.
        for tp_rank in range(1 if rule.split == "replicated" else tp_size):
            shape = local_shape(rule, tp_size, padded)
            expected[f"{rule.name} of tensor parallel rank {tp_rank}"] = shape
            if (rule.name, tp_rank) in tensors:
                planned = PlannedTensor(
                    rule.name, shape, tuple(pieces(rule, tp_rank, tp_size, padded))
                )
                stored.append((planned, tensors[rule.name, tp_rank]))
    found = {
        f"{name} of tensor parallel rank {tp_rank}": tensor.shape
        for (name, tp_rank), tensor in tensors.items()
    }
    check_tensors(path, expected, found, _holes(tensors))
    logical = assemble(huggingface_shapes(model), stored)
    return Checkpoint(path, "training", f"TP{tp_size}", model, logical, files)


def _joined(found: Iterable[tuple[Place, StoredTensor]]) -> StoredTensor:
    """The elements of one tensor parallel part, from the ranks that share it."""
    ordered = sorted(found, key=lambda pair: pair[0].start)
    runs = tuple(
        Run(place.start, place.start + stored.shape[0], run.file, run.offset)
        for place, stored in ordered
        for run in stored.runs
    )
    return StoredTensor(ordered[0][0].local_shape, torch.float32, runs)


def _holes(tensors: Mapping[tuple[str, int], StoredTensor]) -> Iterable[str]:
    """Tensors whose elements do not lie end to end: a rank's file is missing, or twice there."""
    for (name, tp_rank), tensor in tensors.items():
        ends = [0, *(run.stop for run in tensor.runs)]
        starts = [*(run.start for run in tensor.runs), torch.Size(tensor.shape).numel()]
        if ends != starts:
            yield f"{name} of tensor parallel rank {tp_rank}: not every element once"


def _places(file: Path) -> dict[str, Place]:
    try:
        with safe_open(file, framework="pt") as content:
            described: dict[str, Any] = json.loads(content.metadata()[_PLACES])
        return {
            name: Place(**{**place, "local_shape": tuple(place["local_shape"])})
            for name, place in described.items()
        }
    except Exception as error:  # safetensors' own, OSError, JSON, KeyError: all mean damage
        raise InputError(f"{file} cannot be read: {error}; it is truncated or damaged") from error
