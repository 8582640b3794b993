"""Tokenizers for tests: a small one trained with InternLM's conventions, and where the real one is.

The small one has chat markers behind its other pieces, as InternLM's has, and none of its size.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from internlm_lib.data.sentencepiece_model import append_markers, read_model
from internlm_lib.data.tokenizer import Tokenizer, train_tokenizer

TEXTS = [f"Question: What is {n} plus {n}?\nAnswer: {2 * n}" for n in range(60)] + [
    f"The {colour} {animal} sleeps in the {home}."
    for colour in ("red", "green", "yellow", "brown")
    for animal in ("tiger", "rabbit", "horse", "elephant")
    for home in ("forest", "meadow", "mountain", "desert")
]
MARKERS = ("<eoh>", "<eoa>", "<TOKENS_UNUSED_139>", "<TOKENS_UNUSED_140>")
INTERNLM2_MARKERS = ("<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 340

_REPOSITORY = Path(__file__).resolve().parents[3]
_PLACES = (
    Path(os.environ.get("INTERNLM_TOKENIZER", "") or "nowhere"),
    _REPOSITORY / "models" / "internlm-7b" / "tokenizer.model",
    _REPOSITORY.parent / "shared" / "data" / "tokenizer" / "V7_sft.model",
)
REAL = next((place for place in _PLACES if place.is_file()), None)
"""InternLM's own: named by a variable, where the README says to put it, or beside the checkout."""
needs_real = pytest.mark.skipif(REAL is None, reason=f"none of {', '.join(map(str, _PLACES))}")


def trained(folder: Path, markers: Sequence[str] = MARKERS) -> Tokenizer:
    return train_tokenizer(TEXTS, VOCAB_SIZE, folder / "tokenizer.model", markers=markers)


def filled_up(tokenizer: Tokenizer, pieces: int, path: Path) -> Path:
    """A copy with as many pieces as another tokenizer, by markers that no text holds."""
    model = read_model(tokenizer.path)
    missing = pieces - len(model.pieces)
    append_markers(model, [f"[UNUSED_TOKEN_{number}]" for number in range(missing)])
    path.write_bytes(model.SerializeToString())
    return path
