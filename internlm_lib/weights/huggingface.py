"""InternLM weights as Hugging Face stores them: a folder of safetensors and a config.json."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.files import atomic_path, read_json, sha256_of, write_json
from internlm_lib.model.precision import DTYPES
from internlm_lib.weights.layout import huggingface_shapes

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 2 * 10**9
_LISTED = 5

_RESIDUAL = ("o_proj.weight", "down_proj.weight")
"""Outputs onto the residual stream, which Megatron draws with std / √(2 × layers)."""


class HuggingFaceFolder:
    """Weights read slice by slice; nothing is held in memory.

    Raises InputError if the folder has no safetensors files or no config.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        for needed in ("config.json", _INDEX if (path / _INDEX).exists() else _SINGLE):
            if not (path / needed).is_file():
                raise InputError(
                    f"model.weights = {str(path)!r}: {needed} is missing; give a Hugging Face "
                    f"folder with config.json and {_SINGLE} (or {_INDEX} and its files), or null "
                    "for random weights; convert *.bin files to safetensors first"
                )
        self.config: dict[str, Any] = read_json(path / "config.json")
        self._files = ExitStack()
        self._where: dict[str, Any] = {}
        for file in self.files:
            opened = self._open(file)
            # InternLM's early checkpoints store the rotary frequencies, which are no weights.
            names = (name for name in opened.keys() if not name.endswith("rotary_emb.inv_freq"))
            self._where |= dict.fromkeys(names, opened)

    @property
    def files(self) -> list[Path]:
        """The safetensors files, in the order of their names."""
        if not (self.path / _INDEX).exists():
            return [self.path / _SINGLE]
        names = set(read_json(self.path / _INDEX)["weight_map"].values())
        return [self.path / name for name in sorted(names)]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the hashes of the weight files; the folder's other files do not count."""
        hashes = "".join(sha256_of(file) for file in self.files)
        return hashlib.sha256(hashes.encode()).hexdigest()

    def names(self) -> list[str]:
        return sorted(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """A part of a tensor, in its stored dtype; one-dimensional tensors have rows only."""
        part = self._where[name].get_slice(name)
        two_dimensional = len(part.get_shape()) > 1
        values: Tensor = part[rows, columns] if two_dimensional else part[rows]
        return values

    def check_shape(self, model: ModelSection) -> None:
        """Raises InputError listing everything in which the folder is not this model's."""
        problems = [*_config_problems(self.config, model), *self._tensor_problems(model)]
        if problems:
            raise InputError(
                "\n  - ".join(
                    [f"{self.path} does not hold the model of this experiment:", *problems]
                )
                + "\nSet the keys of `model` to what the folder holds, or give other weights."
            )

    def _open(self, file: Path) -> Any:
        try:
            return self._files.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{file} cannot be read: {error}; copy or download it again"
            ) from error

    def _tensor_problems(self, model: ModelSection) -> Iterator[str]:
        expected, found = huggingface_shapes(model), set(self._where)
        missing, unexpected = sorted(expected.keys() - found), sorted(found - expected.keys())
        if missing:
            yield f"{len(missing)} tensors are missing: {_some(missing)}"
        if unexpected:
            yield f"{len(unexpected)} tensors are unexpected: {_some(unexpected)}"
        for name in sorted(expected.keys() & found):
            if self.shape(name) != expected[name]:
                yield f"{name} has the shape {self.shape(name)}, expected is {expected[name]}"


def write_random(folder: Path, model: ModelSection, seed: int, precision: str) -> Path:
    """Write randomly drawn weights as a Hugging Face folder; returns `folder`.

    Each tensor has a generator of its own, seeded by `seed` and its name: the weights depend
    neither on the order of writing nor on a layout. Norms are 1, biases 0.

    Args:
        precision: "fp32" or "bf16", which the tensors are stored in.
    """
    dtype = DTYPES[precision]
    shards = _shards(huggingface_shapes(model), dtype.itemsize)
    weight_map: dict[str, str] = {}
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for number, shapes in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = _SINGLE if len(shards) == 1 else file
            tensors = {
                name: _draw(name, shape, model, seed).to(dtype) for name, shape in shapes.items()
            }
            save_file(tensors, temporary / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shapes, file)
        if len(shards) > 1:
            total = sum(map(math.prod, huggingface_shapes(model).values())) * dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(temporary / _INDEX, index)
        write_json(temporary / "config.json", _config(model, precision))
    return folder


def transformers_model(folder: HuggingFaceFolder, model: ModelSection) -> "LlamaForCausalLM":
    """transformers' LLaMA with these weights in fp32; it shares no code with this kit's model.

    Source of the equivalence: InternLM's own `modeling_internlm.py` is LLaMA with these biases.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

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
    llama.load_state_dict({name: folder.read(name) for name in folder.names()}, strict=True)
    return llama


def transformers_logits(folder: HuggingFaceFolder, model: ModelSection, tokens: Tensor) -> Tensor:
    """Logits [b, s, V] in fp32 of `transformers_model`, on the tokens' device."""
    llama: Any = transformers_model(folder, model)
    llama.to(tokens.device).eval()
    with torch.no_grad():
        logits: Tensor = llama(tokens, use_cache=False).logits
    return logits


def _shards(shapes: dict[str, tuple[int, ...]], itemsize: int) -> list[dict[str, tuple[int, ...]]]:
    """Split into groups of at most 2 GB, or of one tensor, in order."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = _SHARD_BYTES
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if shards[-1] and size > room:
            shards.append({})
            room = _SHARD_BYTES
        shards[-1][name] = shape
        room -= size
    return shards


def _draw(name: str, shape: tuple[int, ...], model: ModelSection, seed: int) -> Tensor:
    """One tensor in fp32."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    std = model.init_method_std
    if name.endswith(_RESIDUAL):
        std /= math.sqrt(2 * model.num_layers)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _config(model: ModelSection, precision: str) -> dict[str, Any]:
    """config.json as InternLM's own code reads it."""
    return {
        "architectures": ["InternLMForCausalLM"],
        "model_type": "internlm",
        "bias": model.attention_bias,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_attention_heads,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": False,
        "torch_dtype": str(DTYPES[precision]).removeprefix("torch."),
        "vocab_size": model.vocab_size,
    }


def _config_problems(config: dict[str, Any], model: ModelSection) -> Iterator[str]:
    """Keys that InternLM's config.json has under several names, or not at all, are optional."""
    expected = {
        "hidden_size": ("hidden_size", model.hidden_size),
        "num_hidden_layers": ("num_layers", model.num_layers),
        "intermediate_size": ("ffn_hidden_size", model.ffn_hidden_size),
        "num_attention_heads": ("num_attention_heads", model.num_attention_heads),
        "num_key_value_heads": ("num_attention_heads", model.num_attention_heads),
        "vocab_size": ("vocab_size", model.vocab_size),
        "rms_norm_eps": ("layernorm_epsilon", model.layernorm_epsilon),
        "rope_theta": ("rotary_base", model.rotary_base),
        "bias": ("attention_bias", model.attention_bias),
        "attention_bias": ("attention_bias", model.attention_bias),
    }
    rope = config.get("rope_parameters") or config.get("rotary") or {}
    theta = rope.get("rope_theta", rope.get("base"))
    values = {**({"rope_theta": theta} if theta is not None else {}), **config}
    for key, (ours, value) in expected.items():
        if values.get(key, value) != value:
            found = json.dumps(values[key])
            yield f"config.json: {key} = {found}, but model.{ours} = {json.dumps(value)}"
    if config.get("tie_word_embeddings"):
        yield "config.json: tie_word_embeddings = true; InternLM's output layer has its own weights"


def _some(names: list[str]) -> str:
    more = f" … and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
