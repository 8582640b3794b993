"""InternLM weights as Hugging Face stores them: safetensors or torch files, and a config.json."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.files import read_json, write_json
from internlm_lib.weights.checkpoint import Checkpoint, assemble, check_tensors
from internlm_lib.weights.layout import Piece, huggingface_shapes
from internlm_lib.weights.model_config import CONFIG, differences, read_model
from internlm_lib.weights.plan import PlannedFile, PlannedTensor, Target
from internlm_lib.weights.storage import Run, StoredTensor
from internlm_lib.weights.torch_archive import flatten, read_archive

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SHARD_BYTES = 2 * 10**9
_SAFETENSORS, _TORCH = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"
_NO_WEIGHT = "rotary_emb.inv_freq"
_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8


def is_huggingface(path: Path) -> bool:
    names = (_SAFETENSORS, _SAFETENSORS + _INDEX, _TORCH, _TORCH + _INDEX)
    return any((path / name).is_file() for name in names)


def open_huggingface(path: Path, model: ModelSection | None = None) -> Checkpoint:
    """The weights in a Hugging Face folder.

    Args:
        model: what the folder must hold, instead of what its config.json says.
    Raises:
        InputError: listing everything in which the folder is not the model, or saying which file is
            missing or damaged.
    """
    if not (path / CONFIG).is_file():
        raise InputError(
            f"{path}: {CONFIG} is missing; give a Hugging Face folder with {CONFIG} and "
            f"{_SAFETENSORS} or {_TORCH} (or their .index.json and its files)"
        )
    own = read_model(path / CONFIG)
    stored: dict[str, StoredTensor] = {}
    files, places = _weight_files(path)
    for file in files:
        found = safetensors_file(file) if file.suffix == ".safetensors" else _torch_file(file)
        for name, tensor in found.items():
            # InternLM's early checkpoints store the rotary frequencies, which are no weights.
            if places.get(name, file.name) == file.name and not name.endswith(_NO_WEIGHT):
                stored[name] = tensor
    expected = huggingface_shapes(model or own)
    problems = differences(own, model) if model else ()
    check_tensors(path, expected, {name: tensor.shape for name, tensor in stored.items()}, problems)
    planned = ((_planned(name, shape), stored[name]) for name, shape in expected.items())
    return Checkpoint(
        path, "huggingface", "whole", model or own, assemble(expected, planned), files
    )


def plan_huggingface(target: Target) -> list[PlannedFile]:
    """Files of at most 2 GB, or of one tensor, in the order the tensors are computed with."""
    groups: list[list[PlannedTensor]] = [[]]
    room = SHARD_BYTES
    for name, shape in huggingface_shapes(target.model).items():
        size = torch.Size(shape).numel() * target.dtypes[name].itemsize
        if groups[-1] and size > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(_planned(name, shape))
        room -= size
    if len(groups) == 1:
        return [PlannedFile(_SAFETENSORS, tuple(groups[0]))]
    return [
        PlannedFile(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    ]


def create_huggingface(folder: Path, file: PlannedFile, target: Target) -> None:
    """Write a safetensors file with a hole in the place of every tensor's bytes.

    Source of the format: 8 bytes of header length, little-endian, a JSON header, the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in file.tensors:
        dtype = target.dtype(tensor)
        begin, end = end, end + torch.Size(tensor.shape).numel() * dtype.itemsize
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with (folder / file.path).open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def locate_huggingface(folder: Path, file: PlannedFile, target: Target) -> dict[str, StoredTensor]:
    return safetensors_file(folder / file.path)


def finish_huggingface(folder: Path, files: Sequence[PlannedFile], target: Target) -> None:
    """Write the index, where there is more than one file."""
    if len(files) > 1:
        weight_map = {tensor.name: file.path for file in files for tensor in file.tensors}
        total = sum(target.nbytes(file) for file in files)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / (_SAFETENSORS + _INDEX), index)


def transformers_model(weights: Checkpoint) -> "LlamaForCausalLM":
    """transformers' LLaMA with these weights in fp32; it shares no code with this kit's model.

    Source of the equivalence: InternLM's own `modeling_internlm.py` is LLaMA with these biases.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    model = weights.model
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(model.rotary_base)},
        attention_bias=model.attention_bias,
        mlp_bias=False,
        tie_word_embeddings=False,
    )
    llama = LlamaForCausalLM(config).float()
    llama.load_state_dict({name: weights.read(name) for name in weights.names()}, strict=True)
    return llama


def transformers_logits(weights: Checkpoint, tokens: Tensor) -> Tensor:
    """Logits [b, s, V] in fp32 of `transformers_model`, on the tokens' device."""
    llama: Any = transformers_model(weights)
    llama.to(tokens.device).eval()
    with torch.no_grad():
        logits: Tensor = llama(tokens, use_cache=False).logits
    return logits


def _planned(name: str, shape: tuple[int, ...]) -> PlannedTensor:
    return PlannedTensor(name, shape, (Piece(name, slice(0, shape[0]), slice(None), 0),))


def _weight_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files an index names, and which of them holds a tensor; or the single one."""
    for single in (_SAFETENSORS, _TORCH):
        index = path / (single + _INDEX)
        if index.is_file():
            places = _weight_map(index)
            names = sorted(set(places.values()))
            if absent := [name for name in names if not (path / name).is_file()]:
                raise InputError(
                    f"{index} names {len(names)} files, of which are missing: {', '.join(absent)}; "
                    "copy or download them"
                )
            return [path / name for name in names], places
        if (path / single).is_file():
            return [path / single], {}
    raise InputError(
        f"{path}: {_SAFETENSORS} is missing; give a Hugging Face folder with {_SAFETENSORS} or "
        f"{_TORCH}, or their .index.json and its files"
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        names: dict[str, str] = read_json(index)["weight_map"]
        if not names or any("/" in file or file.startswith(".") for file in names.values()):
            raise ValueError("its weight_map must name files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index} is damaged: {type(error).__name__}: {error}; copy or download it again"
        ) from error
    return names


def safetensors_file(file: Path) -> dict[str, StoredTensor]:
    """Where each tensor lies; safetensors itself checks the header against the file's size."""
    try:
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(
            f"{file} cannot be read: {error}; it is truncated or damaged; copy or download it again"
        ) from error
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise InputError(
                f"{file}: {name} has the type {entry['dtype']}; {', '.join(_DTYPES)} are understood"
            )
        elements = torch.Size(entry["shape"]).numel()
        run = Run(0, elements, file, 8 + length + entry["data_offsets"][0])
        stored[name] = StoredTensor(tuple(entry["shape"]), _DTYPES[entry["dtype"]], (run,))
    return stored


def _torch_file(file: Path) -> dict[str, StoredTensor]:
    content = read_archive(file)
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, not a dict of tensors")
    return flatten(content, file)
