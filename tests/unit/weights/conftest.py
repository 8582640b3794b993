"""A tiny model whose every number is drawn, and what the tests of formats share.

Names, shapes and files are written out here, not taken from the package under test.
"""

import json
import resource
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from internlm_lib.experiment.presets import PRESETS
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.weights.convert import Order, convert, plan_conversion
from internlm_lib.weights.formats import open_checkpoint
from internlm_lib.weights.layout import Piece

Tensors = dict[str, Tensor]

LAYERS, HIDDEN, FFN, HEADS, VOCAB = 4, 16, 24, 4, 50
"""Four layers for PP4 and an uneven pipeline; 50 rows, so that TP4 pads two."""


def small(**changes: Any) -> ModelSection:
    sizes = {"num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN,
             "num_attention_heads": HEADS, "vocab_size": VOCAB,
             "max_position_embeddings": 64}  # fmt: skip
    return ModelSection(**{**PRESETS["internlm-tiny"], "preset": "small", **sizes, **changes})


def drawn(model: ModelSection, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """Every tensor of a model, biases and norms drawn too."""
    h, f = model.hidden_size, model.ffn_hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, h)}
    for layer in range(model.num_layers):
        at = f"model.layers.{layer}"
        for name in "qkvo":
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (h, h)
            if model.attention_bias:
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (h,)
        shapes |= {
            f"{at}.mlp.gate_proj.weight": (f, h),
            f"{at}.mlp.up_proj.weight": (f, h),
            f"{at}.mlp.down_proj.weight": (h, f),
            f"{at}.input_layernorm.weight": (h,),
            f"{at}.post_attention_layernorm.weight": (h,),
        }
    shapes |= {"model.norm.weight": (h,), "lm_head.weight": (model.vocab_size, h)}
    generator = torch.Generator().manual_seed(seed)
    return {
        name: ("norm" in name) + 0.2 * torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }


def internlm_config(model: ModelSection, **changes: Any) -> dict[str, Any]:
    """InternLM's own config.json of November 2023; a change to None leaves the key out."""
    config = {
        "architectures": ["InternLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_internlm.InternLMConfig"},
        "bias": model.attention_bias,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "model_type": "internlm",
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "pad_token_id": 2,
        "rms_norm_eps": model.layernorm_epsilon,
        "rotary": {"base": model.rotary_base, "type": "dynamic"},
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": model.vocab_size,
    }
    return {key: value for key, value in {**config, **changes}.items() if value is not None}


def write_config(folder: Path, model: ModelSection, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(internlm_config(model, **changes)))


def write_source(folder: Path, model: ModelSection, tensors: Mapping[str, Tensor]) -> Path:
    """A Hugging Face folder written by safetensors itself."""
    folder.mkdir(parents=True)
    write_config(folder, model)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read_all(path: Path, model: ModelSection | None = None) -> Tensors:
    """Every tensor of a checkpoint of any format."""
    with open_checkpoint(path, model) as weights:
        return {name: weights.read(name) for name in weights.names()}


def converted(source: Path, target: Path, to: str, **order: Any) -> dict[str, Any]:
    """Convert without further wishes; returns the account of it."""
    return convert(plan_conversion(source, target, Order(to, **order)))


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_covered(shape: tuple[int, ...], pieces: Iterable[Piece]) -> None:
    """The pieces are a grid over a tensor of that shape: every element is in exactly one."""
    by_columns: dict[tuple[int, int], list[tuple[int, int]]] = {}
    width = shape[1] if len(shape) > 1 else 1
    for piece in pieces:
        start, stop, _ = piece.columns.indices(width)
        by_columns.setdefault((start, stop), []).append((piece.rows.start, piece.rows.stop))
    assert_line(by_columns, width)
    for rows in by_columns.values():
        assert_line(rows, shape[0])


def assert_line(ranges: Iterable[tuple[int, int]], length: int) -> None:
    """The ranges, sorted, follow on one another from 0 to `length`."""
    end = 0
    for start, stop in sorted(ranges):
        assert start == end < stop
        end = stop
    assert end == length


@pytest.fixture(scope="session")
def weights32() -> Tensors:
    return drawn(small())


@pytest.fixture(scope="session")
def weights16() -> Tensors:
    return drawn(small(), torch.float16)


@pytest.fixture(scope="session")
def source32(tmp_path_factory: pytest.TempPathFactory, weights32: Tensors) -> Path:
    """A Hugging Face folder of `weights32`; only to be read."""
    return write_source(tmp_path_factory.mktemp("source") / "fp32", small(), weights32)


@pytest.fixture(scope="session")
def source16(tmp_path_factory: pytest.TempPathFactory, weights16: Tensors) -> Path:
    """A Hugging Face folder of `weights16`; only to be read."""
    return write_source(tmp_path_factory.mktemp("source") / "fp16", small(), weights16)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """4 GB more than now: what a damaged length asks for must not take all of the machine's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
