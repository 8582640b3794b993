"""Megatron's distributed checkpoint (`torch_dist`) on disk, read and written without ranks.

It is torch's own distributed checkpoint: `.metadata` says which chunk of which tensor lies in which
`.distcp` file, each chunk as torch.save writes it. All layers of a kind make one tensor with the
layer as first dimension. Source: torch 2.13 `distributed/checkpoint`, megatron-core 0.16.1
`dist_checkpointing`.
"""

import io
import math
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.files import atomic_path, write_json
from internlm_lib.weights.checkpoint import Checkpoint, LogicalTensor, assemble, check_tensors
from internlm_lib.weights.layout import (
    LAYER,
    Piece,
    TensorRule,
    distributed_key,
    huggingface_shapes,
    local_shape,
    pieces,
    rules,
)
from internlm_lib.weights.model_config import preset_of
from internlm_lib.weights.plan import PlannedFile, PlannedTensor, Target
from internlm_lib.weights.storage import Run, StoredTensor
from internlm_lib.weights.torch_archive import create_archive, read_archive

_METADATA = ".metadata"
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
           "common_backend": "torch", "common_backend_version": 1}  # fmt: skip
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
"""What the keys of weights begin with; beside them lie optimizer states."""
_STATELESS = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1",
              "mlp.linear_fc2")  # fmt: skip
"""Modules for which megatron-core also saves an (empty) extra state per layer, and asks for it."""


def is_torch_dist(path: Path) -> bool:
    return (path / _METADATA).is_file()


def open_torch_dist(path: Path, model: ModelSection | None = None) -> Checkpoint:
    """The weights in a distributed checkpoint that was saved at any TP, PP and DP.

    Args:
        model: what the checkpoint must hold; by default the preset of its shape.
    Raises:
        InputError: listing everything in which it is not the model, or naming what is damaged.
    """
    metadata = read_metadata(path)
    try:
        return _opened(path, metadata, model)
    except (TypeError, ValueError, IndexError, AttributeError, MemoryError, OverflowError) as error:
        raise InputError(f"{path / _METADATA} is damaged: {error}; copy it again") from error


def _opened(path: Path, metadata: Metadata, model: ModelSection | None) -> Checkpoint:
    entries: dict[str, TensorStorageMetadata] = {
        key: entry
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and key.startswith(_MODEL_KEYS)
    }
    model = model or _preset(entries)
    table = _by_key(model)
    expected = {key: _whole_shape(layers) for key, layers in table.items()}
    found = {key: tuple(entry.size) for key, entry in entries.items()}
    padded = {r.name: found[r.name][0] for r in rules(model) if r.split == "vocabulary"
              and r.name in found and found[r.name][0] >= model.vocab_size}  # fmt: skip
    for name, rows in padded.items():
        expected[name] = (rows, model.hidden_size)
    check_tensors(path, expected, found)
    stored = [
        _held(table[key], offsets, tensor, padded)
        for key, offsets, tensor in _chunks(path, metadata, entries)
    ]
    tensors = assemble(huggingface_shapes(model), stored)
    _check_whole(path, tensors, huggingface_shapes(model))
    files = {file for _, tensor in stored for file in tensor.files}
    return Checkpoint(path, "megatron", "distributed", model, tensors, files)


def read_metadata(path: Path) -> Metadata:
    """A checkpoint's `.metadata`, unpickled with nothing but the classes that belong there.

    Objects beside the tensors (random states, for one) are never opened. Raises InputError for
    anything else, and if a file is missing or too short.
    """
    file = path / _METADATA
    try:
        # From memory: a damaged length would make a file's read() reserve as much.
        metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
        if not isinstance(metadata, Metadata) or not metadata.storage_data:
            raise ValueError("it is no Metadata")
        for index, info in metadata.storage_data.items():
            _check_place(path, index.fqn, info)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} is refused: it is not torch's metadata, and opening it could run code: {error}"
        ) from error
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{file} is damaged: {error}; copy it again") from error
    return metadata


def _check_place(path: Path, key: str, info: _StorageInfo) -> None:
    target, end = path / info.relative_path, info.offset + info.length
    size = target.stat().st_size if target.is_file() else 0
    if target.parent != path or min(info.offset, info.length) < 0 or size < end:
        raise InputError(
            f"{target} is missing, or truncated: {key} lies up to byte {end:,}, found are "
            f"{size:,}; copy it again"
        )


def plan_torch_dist(target: Target) -> list[PlannedFile]:
    """One file per layer, and one each for the embedding and for the end."""
    model = target.model
    files: dict[str, list[PlannedTensor]] = {}
    for rule in rules(model):
        end = 0 if "embedding" in rule.name else model.num_layers + 1
        layer = LAYER.search(rule.name)
        place = int(layer[0]) + 1 if layer else end
        whole = tuple(pieces(rule, 0, 1, model.vocab_size))
        shape = local_shape(rule, 1, model.vocab_size)
        files.setdefault(f"__0_{place}.distcp", []).append(PlannedTensor(rule.name, shape, whole))
    return [PlannedFile(path, tuple(tensors)) for path, tensors in files.items()]


def create_torch_dist(folder: Path, file: PlannedFile, target: Target) -> None:
    """Write a `.distcp` file: the archives of its chunks end to end, with holes for the tensors."""
    with (folder / file.path).open("wb") as stream:
        for tensor in file.tensors:
            head, nbytes, tail = _frame_of(tensor, target)
            stream.write(head)
            stream.seek(nbytes, io.SEEK_CUR)
            stream.write(tail)


def locate_torch_dist(folder: Path, file: PlannedFile, target: Target) -> dict[str, StoredTensor]:
    located, begin = {}, 0
    for tensor in file.tensors:
        head, nbytes, tail = _frame_of(tensor, target)
        run = Run(0, math.prod(tensor.shape), folder / file.path, begin + len(head))
        located[tensor.name] = StoredTensor(tensor.shape, target.dtype(tensor), (run,))
        begin += len(head) + nbytes + len(tail)
    return located


def finish_torch_dist(folder: Path, files: Sequence[PlannedFile], target: Target) -> None:
    """Write what megatron-core asks for beside tensors: metadata, extra and common states."""
    metadata = Metadata(state_dict_metadata={}, planner_data=None, storage_data={})
    for file in files:
        begin = 0
        for tensor in file.tensors:
            head, nbytes, tail = _frame_of(tensor, target)
            length = len(head) + nbytes + len(tail)
            _describe(metadata, tensor, target, _StorageInfo(file.path, begin, length))
            begin += length
    _write_extra_states(folder, target.model.num_layers, metadata)
    with atomic_path(folder / "common.pt") as temporary:
        torch.save({}, temporary)
    with atomic_path(folder / _METADATA) as temporary:
        temporary.write_bytes(pickle.dumps(metadata))
    write_json(folder / "metadata.json", _FORMAT)


class _MetadataUnpickler(pickle._Unpickler):
    """Knows the classes of torch's and megatron-core's checkpoint metadata, and no others.

    Python's own unpickler: in the one written in C, one flipped bit of a memo's index or of a
    length reserves gigabytes before anything is read.
    """

    dispatch = {
        opcode: load
        for opcode, load in pickle._Unpickler.dispatch.items()
        if opcode != pickle.BYTEARRAY8[0]
    }

    _DCP = "torch.distributed.checkpoint"
    _KNOWN = {
        f"{_DCP}.metadata": {
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
            "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
        f"{_DCP}.planner": {
            "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
        },
        f"{_DCP}.filesystem": {"StorageMeta", "_StorageInfo", "_StoragePrefix"},
        "torch": {"Size", "device", "strided"},
        "torch.serialization": {"_get_layout"},
        "collections": {"OrderedDict"},
        "pathlib": {"Path", "PosixPath"},
    }  # fmt: skip
    _MCORE = "megatron.core.dist_checkpointing.strategies.torch"
    _STAND_INS = {"MCoreSavePlan", "MCoreMetadata"}

    def find_class(self, module: str, name: str) -> Any:
        if name in self._KNOWN.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == self._MCORE and name in self._STAND_INS:
            return super().find_class(f"{self._DCP}.planner", "SavePlan")
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _describe(
    metadata: Metadata, tensor: PlannedTensor, target: Target, where: _StorageInfo
) -> None:
    """Add one chunk, a whole tensor of one layer, to the metadata."""
    key, layer = distributed_key(tensor.name)
    prefix = [] if layer is None else [layer, 1, target.model.num_layers]
    offsets = torch.Size([*prefix[:1], *(0 for _ in tensor.shape)])
    entry = metadata.state_dict_metadata.get(key)
    if not isinstance(entry, TensorStorageMetadata):
        whole = torch.Size([*prefix[2:], *tensor.shape])
        entry = TensorStorageMetadata(TensorProperties(target.dtype(tensor)), whole, [])
        metadata.state_dict_metadata[key] = entry
    entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size([*prefix[1:2], *tensor.shape])))
    metadata.storage_data[MetadataIndex(key, offsets)] = where


def _by_key(model: ModelSection) -> dict[str, list[TensorRule]]:
    """Key of the checkpoint → its rules, one per layer."""
    found: dict[str, list[TensorRule]] = {}
    for rule in rules(model):
        found.setdefault(distributed_key(rule.name)[0], []).append(rule)
    return found


def _whole_shape(layers: list[TensorRule]) -> tuple[int, ...]:
    shape = local_shape(layers[0], 1, layers[0].shape[0])
    return (len(layers), *shape) if distributed_key(layers[0].name)[1] is not None else shape


def _chunks(
    path: Path, metadata: Metadata, entries: Mapping[str, TensorStorageMetadata]
) -> Iterator[tuple[str, tuple[int, ...], StoredTensor]]:
    """Key, offsets in the whole tensor, and where its bytes lie, of every chunk."""
    for index, info in metadata.storage_data.items():
        if index.fqn in entries:
            file = path / info.relative_path
            tensor = read_archive(file, start=info.offset, length=info.length)
            if not isinstance(tensor, StoredTensor) or index.offset is None:
                raise InputError(f"{file}: the chunk of {index.fqn} is no plain tensor")
            yield index.fqn, tuple(index.offset), tensor


def _held(
    layers: list[TensorRule],
    offsets: tuple[int, ...],
    tensor: StoredTensor,
    padded: Mapping[str, int],
) -> tuple[PlannedTensor, StoredTensor]:
    """What a chunk holds of its key's tensors, and the chunk without the dimension of layers."""
    rule = layers[0]
    if distributed_key(rule.name)[1] is not None:
        rule, offsets = layers[offsets[0]], offsets[1:]
        tensor = replace(tensor, shape=tensor.shape[1:])
    rows = padded.get(rule.name, rule.shape[0])
    columns = slice(None)
    if len(offsets) > 1 and tensor.shape[1] != local_shape(rule, 1, rows)[1]:
        columns = slice(offsets[1], offsets[1] + tensor.shape[1])
    held = []
    for piece in pieces(rule, 0, 1, rows):
        count = piece.rows.stop - piece.rows.start
        low = max(piece.start, offsets[0])
        high = min(piece.start + count, offsets[0] + tensor.shape[0])
        if low < high:
            first = piece.rows.start + low - piece.start
            own = slice(first, first + high - low)
            held.append(Piece(piece.name, own, columns, low - offsets[0], piece.role))
    return PlannedTensor(rule.name, tensor.shape, tuple(held)), tensor


def _check_whole(path: Path, tensors: Mapping[str, LogicalTensor], names: Iterable[str]) -> None:
    """Raises InputError if chunks are missing in the metadata, or overlap."""
    for name in names:
        if name not in tensors or not tensors[name].is_whole:
            raise InputError(f"{path / _METADATA}: its chunks do not make up the whole {name}")


def _preset(entries: Mapping[str, TensorStorageMetadata]) -> ModelSection:
    def size(key: str) -> tuple[int, ...]:
        return tuple(entries[key].size) if key in entries else (0, 0, 0)

    layers, both_rows, hidden = size("decoder.layers.mlp.linear_fc1.weight")
    bias = "decoder.layers.self_attention.linear_qkv.bias" in entries
    return preset_of(layers, hidden, both_rows // 2, bias)


def _frame_of(tensor: PlannedTensor, target: Target) -> tuple[bytes, int, bytes]:
    _, layer = distributed_key(tensor.name)
    return _frame(tensor.shape if layer is None else (1, *tensor.shape), target.dtype(tensor))


@lru_cache
def _frame(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, int, bytes]:
    """torch.save's bytes before a tensor's data, the data's length, and its bytes after it."""
    with TemporaryDirectory() as folder:
        probe = Path(folder) / "archive"
        stored: StoredTensor = create_archive(probe, (shape, dtype))
        offset, nbytes = stored.runs[0].offset, math.prod(shape) * dtype.itemsize
        with probe.open("rb") as stream:
            head = stream.read(offset)
            stream.seek(offset + nbytes)
            return head, nbytes, stream.read()


def _write_extra_states(folder: Path, layers: int, metadata: Metadata) -> None:
    empty = io.BytesIO()
    torch.save([None], empty)
    name = "__0_extra.distcp"
    states = [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
        for module in _STATELESS
        for layer in range(layers)
    ]
    (folder / name).write_bytes(empty.getvalue() * len(states))
    for number, state in enumerate(states):
        metadata.state_dict_metadata[state] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(state)] = _StorageInfo(
            name, number * len(empty.getvalue()), len(empty.getvalue())
        )
