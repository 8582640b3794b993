"""A trained tokenizer has InternLM's conventions; the real one, where it is, its golden ids."""

from pathlib import Path

import pytest

from internlm_lib.data.tokenizer import Tokenizer, copy_tokenizer, train_tokenizer
from internlm_lib.errors import InputError

TEXTS = [f"Question: What is {n} plus {n}?\nAnswer: {2 * n}" for n in range(60)] + [
    f"The {colour} {animal} sleeps in the {home}."
    for colour in ("red", "green", "yellow", "brown")
    for animal in ("tiger", "rabbit", "horse", "elephant")
    for home in ("forest", "meadow", "mountain", "desert")
]
VOCAB_SIZE = 330
REAL = Path(__file__).resolve().parents[3] / "models" / "internlm-7b" / "tokenizer.model"
"""Where the README says to put InternLM's own."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, VOCAB_SIZE, tmp_path_factory.mktemp("t") / "tokenizer.model")


def test_special_ids_and_size_are_internlms(trained: Tokenizer) -> None:
    assert (trained.bos_id, trained.eos_id, trained.vocab_size) == (1, 2, VOCAB_SIZE)


@pytest.mark.parametrize(
    "text",
    [
        "Question: What is 12 plus 12?\nAnswer: 24",
        "  leading, double  and trailing blanks  ",
        "line\n\nbreaks\r\nand\ttabs",
        "ﬁ ½ Ａ e\u0301 are not normalised",
        "\u4eca\u5929 \U0001f600 by bytes",
        "",
    ],
)
def test_decoding_gives_the_text_back(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_no_blank_is_put_before_a_text(trained: Tokenizer) -> None:
    assert trained.encode("tiger") != trained.encode(" tiger")


def test_special_tokens_are_added_on_request_only(trained: Tokenizer) -> None:
    ids = trained.encode("tiger")
    assert not {1, 2} & set(ids)
    assert trained.encode("tiger", add_bos=True, add_eos=True) == [1, *ids, 2]
    assert trained.decode([1, *ids, 2]) == "tiger"
    assert 2 not in trained.encode("</s>")  # written out, it is text


def test_batches_do_not_depend_on_threads(trained: Tokenizer) -> None:
    one_by_one = [trained.encode(text, add_bos=True) for text in TEXTS]
    for num_threads in (1, 3):
        assert trained.encode_batch(TEXTS, add_bos=True, num_threads=num_threads) == one_by_one


def test_digits_are_pieces_of_their_own(trained: Tokenizer) -> None:
    assert len(trained.encode("1212")) == 4


def test_training_again_gives_the_same_file(trained: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(TEXTS, VOCAB_SIZE, tmp_path / "tokenizer.model")
    assert again.path.read_bytes() == trained.path.read_bytes()


def test_given_file_is_copied_as_it_is(trained: Tokenizer, tmp_path: Path) -> None:
    copied = copy_tokenizer(trained.path, tmp_path / "data" / "tokenizer.model")
    assert copied.path.read_bytes() == trained.path.read_bytes()
    assert copied.encode("tiger") == trained.encode("tiger")


def test_ids_outside_the_vocabulary_are_refused(trained: Tokenizer) -> None:
    for outside in (VOCAB_SIZE, -100):
        with pytest.raises(InputError, match=rf"token id {outside} is not in \[0, {VOCAB_SIZE}\)"):
            trained.decode([5, outside])


def test_too_many_or_too_few_pieces(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(InputError, match="vocab_size = 4000 pieces can be trained"):
        train_tokenizer(["a b c"], 4000, path)
    with pytest.raises(InputError, match="choose more than 259"):
        train_tokenizer(TEXTS, 259, path)
    assert not any(tmp_path.iterdir())


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    pointer = tmp_path / "tokenizer.model"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="not a sentencepiece model"):
        Tokenizer(pointer)
    with pytest.raises(InputError, match="no such tokenizer.model"):
        Tokenizer(tmp_path / "other.model")
    with pytest.raises(InputError, match="not a sentencepiece model"):
        copy_tokenizer(pointer, tmp_path / "copy.model")
    assert not (tmp_path / "copy.model").exists()


@pytest.mark.skipif(not REAL.exists(), reason=f"no {REAL}")
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [9843, 2028]),
        (" Hello world", [22190, 2028]),
        ("\n", [364]),
        ("\n\n", [402]),
        ("Answer: A", [16272, 334, 493]),
        ("<eoh>", [103027]),
        ("</s>", [654, 269, 330]),
    ],
)
def test_golden_ids_of_the_real_tokenizer(text: str, ids: list[int]) -> None:
    tokenizer = Tokenizer(REAL)
    assert tokenizer.vocab_size == 103168
    assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
