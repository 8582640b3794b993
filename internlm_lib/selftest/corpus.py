"""What the selftest trains on and from: the pocket world in bytes, and weights none of which is 0.

InternLM's vocabulary has every byte b as id b + 3: a model of these rows alone needs no tokenizer.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from internlm_lib.data.indexed import indexed_writer
from internlm_lib.data.pocket import make_pocket_world
from internlm_lib.data.prompts import TEMPLATES

if TYPE_CHECKING:
    from internlm_lib.experiment.schema import ModelSection

VOCABULARY = 3 + 256
_BOS, _EOS = 1, 2


def write_corpus(prefix: Path, seed: int) -> None:
    """The pocket world's documents as token files at `prefix`."""
    form = TEMPLATES["question_answer"]
    with indexed_writer(prefix, VOCABULARY) as writer:
        for record in make_pocket_world(seed).records:
            body = [byte + 3 for byte in form.document(record).encode()]
            writer.add_document([_BOS, *body, _EOS])


def write_weights(folder: Path, model: "ModelSection", seed: int) -> None:
    """Random weights as a Hugging Face folder; biases and norms are drawn, too: a bias of zero
    would hide where it is added."""
    import torch
    from safetensors.torch import load_file, save_file

    from internlm_lib.weights.initial import write_random

    write_random(folder, model, seed, "fp32")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(11)
    for name in sorted(tensors):
        if tensors[name].dim() == 1:
            tensors[name] += 0.1 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})
