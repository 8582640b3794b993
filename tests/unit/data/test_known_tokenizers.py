"""A model gets its own tokenizer or none: size, special ids and encodings are looked at."""

from pathlib import Path

import pytest
import sentencepiece

from internlm_lib.data.known_tokenizers import INTERNLM, INTERNLM2, tokenizer_for
from internlm_lib.data.sentencepiece_model import read_model
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError
from internlm_lib.files import sha256_of
from tests.unit.data.trained_tokenizer import (
    REAL,
    TEXTS,
    VOCAB_SIZE,
    filled_up,
    needs_real,
    trained,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("t"))


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 512])
def test_a_trained_tokenizer_suits_a_small_model(small: Tokenizer, vocab_size: int) -> None:
    found = tokenizer_for(small.path, vocab_size=vocab_size, preset="internlm-tiny")
    assert found.encode(TEXTS[0]) == small.encode(TEXTS[0])


def test_too_many_pieces_are_refused(small: Tokenizer) -> None:
    with pytest.raises(InputError, match=f"has {VOCAB_SIZE} pieces, but the model's .* 300 rows"):
        tokenizer_for(small.path, vocab_size=300)


@pytest.mark.parametrize(
    ("vocab_size", "pieces", "needed"),
    [
        (103168, 32000, INTERNLM),  # LLaMA's for InternLM
        (103168, 92544, INTERNLM),  # InternLM2's for InternLM
        (92544, 32000, INTERNLM2),
    ],
)
def test_another_models_tokenizer_is_told_from_its_size(
    small: Tokenizer, vocab_size: int, pieces: int, needed: object, tmp_path: Path
) -> None:
    path = filled_up(small, pieces, tmp_path / "other.model")
    with pytest.raises(InputError) as refused:
        tokenizer_for(path, vocab_size=vocab_size, preset="internlm-7b")
    message = str(refused.value)
    assert f"has {pieces} pieces, not the {needed.pieces} of {needed.name}" in message
    assert f"unknown (SHA-256 {sha256_of(path)})" in message
    assert f"vocab_size = {vocab_size}, model.preset = internlm-7b) needs" in message
    assert f"SHA-256 {needed.sha256}" in message


@pytest.mark.parametrize("known", [INTERNLM, INTERNLM2])
def test_another_tokenizer_of_the_same_size_is_told_from_its_encodings(
    small: Tokenizer, known: object, tmp_path: Path
) -> None:
    path = filled_up(small, known.pieces, tmp_path / "same_size.model")
    with pytest.raises(InputError, match=f"encodes .*, {known.name} tokenizer as .*of the same"):
        tokenizer_for(path, vocab_size=known.pieces)


def test_other_ids_of_special_tokens_are_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "other"), vocab_size=300,
        model_type="bpe", byte_fallback=True, bos_id=0, eos_id=1, unk_id=2, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"have the ids \(2, 0, 1\), not \(0, 1, 2\)"):
        tokenizer_for(tmp_path / "other.model", vocab_size=512)


def test_internlm2s_placeholders_are_its_chat_markers(small: Tokenizer, tmp_path: Path) -> None:
    tokenizer = Tokenizer(filled_up(small, 92544, tmp_path / "2.model"))
    start, end = 92543, 92542
    user = small.encode("user\n")
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>") == [start, *user, end]
    assert tokenizer.decode([start, *user, end]) == "<|im_start|>user\n<|im_end|>"
    names = ["<|action_start|>", "<|action_end|>", "<|interpreter|>", "<|plugin|>"]
    assert [tokenizer.piece_id(name) for name in names] == [92541, 92540, 92539, 92538]
    for text in ("<|im_end|>", "<|plugin|>", "[UNUSED_TOKEN_9]"):
        ids = tokenizer.encode(text, literal=True)
        assert max(ids) < VOCAB_SIZE and tokenizer.decode(ids) == text


def test_a_placeholder_of_any_type_is_no_literal_text(small: Tokenizer, tmp_path: Path) -> None:
    """Also one that merges lead to, as they may in a file that has it as a normal piece."""
    placeholder = "[UNUSED_TOKEN_9]"
    model = read_model(small.path)
    for length in range(2, len(placeholder) + 1):
        model.pieces.add(piece=placeholder[:length], score=0.0, type=1)
    path = tmp_path / "merged.model"
    path.write_bytes(model.SerializeToString())
    tokenizer = Tokenizer(path)
    assert tokenizer.encode(placeholder) == [tokenizer.vocab_size - 1]
    literal = tokenizer.encode(placeholder, literal=True)
    assert len(literal) > 1 and tokenizer.decode(literal) == placeholder


def test_pieces_of_another_tokenizer_of_internlm2s_size_keep_their_names(
    small: Tokenizer, tmp_path: Path
) -> None:
    model = read_model(small.path)
    for number in range(92544 - VOCAB_SIZE):
        model.pieces.add(piece=f"word{number}", score=-1e6 - number, type=1)
    path = tmp_path / "own.model"
    path.write_bytes(model.SerializeToString())
    assert Tokenizer(path).pieces([92543]) == [f"word{92543 - VOCAB_SIZE}"]


@needs_real
def test_the_real_tokenizer_suits_internlm_and_no_other() -> None:
    assert REAL is not None
    assert sha256_of(REAL) == INTERNLM.sha256
    assert tokenizer_for(REAL, vocab_size=103168, preset="internlm-7b").vocab_size == 103168
    for vocab_size in (512, 32000, 92544):
        with pytest.raises(InputError, match="The file is InternLM's"):
            tokenizer_for(REAL, vocab_size=vocab_size)
