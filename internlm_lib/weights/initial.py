"""Randomly drawn weights to start from."""

import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor

from internlm_lib.experiment.schema import ModelSection
from internlm_lib.files import atomic_path
from internlm_lib.model.precision import DTYPES
from internlm_lib.weights.formats import FORMATS, open_for_writing
from internlm_lib.weights.layout import huggingface_shapes
from internlm_lib.weights.model_config import write_model
from internlm_lib.weights.plan import Target, partition

_RESIDUAL = ("o_proj.weight", "down_proj.weight")
"""Outputs onto the residual stream, which Megatron draws with std / √(2 × layers)."""


def write_random(folder: Path, model: ModelSection, seed: int, precision: str) -> Path:
    """Write randomly drawn weights as a Hugging Face folder; returns `folder`.

    Each tensor has a generator of its own, seeded by `seed` and its name: the weights depend
    neither on the order of writing nor on a layout. Norms are 1, biases 0.

    Args:
        precision: "fp32", "bf16" or "fp16", which the tensors are stored in.
    """
    dtype, shapes, kind = DTYPES[precision], huggingface_shapes(model), FORMATS["huggingface"]
    target = Target(model, partition(model), dict.fromkeys(shapes, dtype))
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        files = kind.plan(target)
        for file in files:
            kind.create(temporary, file, target)
        with open_for_writing(temporary, "huggingface", files, target) as weights:
            for name, shape in shapes.items():
                weights.write(name, 0, _draw(name, shape, model, seed).to(dtype))
        kind.finish(temporary, files, target)
        write_model(temporary, model, str(dtype).removeprefix("torch."))
    return folder


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
