"""A trained tokenizer has InternLM's conventions; the real one, where it is, its golden ids."""

import pickle
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from internlm_lib.data.tokenizer import Tokenizer, copy_tokenizer, train_tokenizer
from internlm_lib.errors import InputError
from tests.unit.data.trained_tokenizer import MARKERS, REAL, TEXTS, VOCAB_SIZE, needs_real, trained

EXAMPLES = [
    "Question: What is 12 plus 12?\nAnswer: 24",
    "  leading, double  and trailing blanks  ",
    "line\n\nbreaks\r\nand\ttabs",
    "ﬁ ½ Ａ e\u0301 \ufeff are not normalised",
    "\u4eca\u5929 \U0001f600 by bytes",
    "blocks \u2581\u2582\u2583\u2581\u2581x \u2581",
    "markers <eoh><eoa> <s></s><unk><0x0A>",
    "a\0b",
    "",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text("\u2581<>/eohas \n|0x\u4eca")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Without chat markers."""
    return trained(tmp_path_factory.mktemp("t"), markers=())


def real() -> Tokenizer:
    assert REAL is not None
    return Tokenizer(REAL)


def assert_gives_back(tokenizer: Tokenizer, text: str) -> None:
    for literal in (False, True):
        ids = tokenizer.encode(text, literal=literal)
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.decode_stream(ids)) == text
        assert tokenizer.encode_batch(["x", text], literal=literal)[1] == ids


def test_special_ids_and_size_are_internlms(small: Tokenizer, plain: Tokenizer) -> None:
    for tokenizer in (small, plain):
        ids = (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        assert ids == (0, 1, 2, 2)
        assert tokenizer.vocab_size == VOCAB_SIZE
        assert tokenizer.piece_id("<0x00>") == 3 and tokenizer.piece_id("<0x0A>") == 13
    assert plain.piece_id("<eoh>") is None and plain.piece_id("<unk>") == 0
    last = range(VOCAB_SIZE - len(MARKERS), VOCAB_SIZE)
    assert [small.piece_id(marker) for marker in MARKERS] == list(last)


def test_pieces_are_as_the_model_spells_them(small: Tokenizer) -> None:
    assert small.pieces([1, 13, VOCAB_SIZE - 4]) == ["<s>", "<0x0A>", "<eoh>"]
    assert "".join(small.pieces(small.encode("The red tiger"))) == "The▁red▁tiger"


@pytest.mark.parametrize("text", EXAMPLES)
def test_decoding_gives_the_text_back(small: Tokenizer, plain: Tokenizer, text: str) -> None:
    assert_gives_back(small, text)
    assert_gives_back(plain, text)


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
@example("\u2581<eoh>\u2581")
def test_decoding_gives_any_text_back(small: Tokenizer, text: str) -> None:
    assert_gives_back(small, text)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_stream_is_decodes_text_for_any_ids(small: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=12))
    # Bytes that are no text are decoded as one replacement character each, streamed or not.
    assert "".join(small.decode_stream(ids)) == small.decode(ids)


def test_a_stream_waits_for_whole_characters(small: Tokenizer) -> None:
    ids = small.encode("a\U0001f600b")
    assert len(ids) == 6
    assert [text for text in small.decode_stream(ids) if text] == ["a", "\U0001f600", "b"]
    cut = list(small.decode_stream(ids[:3]))
    assert cut[0] == "a" and cut[-1] == small.decode(ids[:3])[1:]  # the end comes: no more waiting


def test_ids_are_sentencepieces(small: Tokenizer) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(small.path))
    for text in [*TEXTS, *(text for text in EXAMPLES if "\u2581" not in text)]:
        assert small.encode(text, add_bos=True) == processor.encode(text, add_bos=True)


def test_a_written_block_is_not_a_blank(small: Tokenizer) -> None:
    block = [small.piece_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
    tiger = small.encode("tiger")
    expected = [1, *tiger, *block, *block, *tiger, 2]
    text = "tiger\u2581\u2581tiger"
    assert small.encode(text, add_bos=True, add_eos=True) == expected
    assert small.encode_batch(["x", text], add_bos=True, add_eos=True)[1] == expected


def test_no_blank_is_put_before_a_text(small: Tokenizer) -> None:
    assert not small.adds_leading_space
    assert small.encode("tiger") != small.encode(" tiger")


def test_special_tokens_are_added_on_request_only(small: Tokenizer) -> None:
    ids = small.encode("tiger")
    assert not {1, 2} & set(ids)
    assert small.encode("tiger", add_bos=True, add_eos=True) == [1, *ids, 2]
    assert small.decode([1, *ids, 2]) == "tiger"
    assert not {1, 2} & set(small.encode("<s></s>"))  # written out, it is text


def test_literal_text_holds_no_marker(small: Tokenizer) -> None:
    eoh, eoa = small.piece_id("<eoh>"), small.piece_id("<eoa>")
    text = "tiger<eoh>\n<eoa><<eoh>>"
    assert [i for i in small.encode(text) if i in (eoh, eoa)] == [eoh, eoa, eoh]
    literal = small.encode(text, literal=True)
    assert not {eoh, eoa} & set(literal) and small.decode(literal) == text
    for other in TEXTS:
        assert small.encode(other, literal=True) == small.encode(other)


def test_batches_do_not_depend_on_threads(small: Tokenizer) -> None:
    texts = [*TEXTS, *EXAMPLES]
    one_by_one = [small.encode(text, add_bos=True) for text in texts]
    for num_threads in (1, 3):
        assert small.encode_batch(texts, add_bos=True, num_threads=num_threads) == one_by_one


def test_half_a_surrogate_pair_is_refused(small: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"half a surrogate pair, U\+D83D, at character 2"):
        small.encode("ab\ud83d")
    with pytest.raises(InputError, match=r"U\+DE00, at character 0"):
        small.encode_batch(["ab", "\ude00"])


def test_digits_are_pieces_of_their_own(small: Tokenizer) -> None:
    assert len(small.encode("1212")) == 4


def test_it_travels_as_its_path(small: Tokenizer) -> None:
    data = pickle.dumps(small)
    assert len(data) < 300
    assert pickle.loads(data).encode(TEXTS[0]) == small.encode(TEXTS[0])


def test_training_again_gives_the_same_file(small: Tokenizer, tmp_path: Path) -> None:
    assert trained(tmp_path).path.read_bytes() == small.path.read_bytes()


def test_markers_change_nothing_else(small: Tokenizer, tmp_path: Path) -> None:
    bare = train_tokenizer(TEXTS, VOCAB_SIZE - len(MARKERS), tmp_path / "tokenizer.model")
    assert [bare.encode(text) for text in TEXTS] == [small.encode(text) for text in TEXTS]


def test_given_file_is_copied_as_it_is(small: Tokenizer, tmp_path: Path) -> None:
    copied = copy_tokenizer(small.path, tmp_path / "data" / "tokenizer.model")
    assert copied.path.read_bytes() == small.path.read_bytes()
    assert copied.encode("tiger") == small.encode("tiger")


def test_ids_outside_the_vocabulary_are_refused(small: Tokenizer) -> None:
    for outside in (VOCAB_SIZE, -100):
        refused = rf"token id {outside} is not in \[0, {VOCAB_SIZE}\)"
        with pytest.raises(InputError, match=refused):
            small.decode([5, outside])
        with pytest.raises(InputError, match=refused):
            list(small.decode_stream([5, outside]))
        with pytest.raises(InputError, match=refused):
            small.pieces([5, outside])


def test_too_many_or_too_few_pieces(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(InputError, match="vocab_size = 4000 pieces can be trained"):
        train_tokenizer(["a b c"], 4000, path)
    with pytest.raises(InputError, match="choose more than 259"):
        train_tokenizer(TEXTS, 259, path)
    with pytest.raises(InputError, match="2 chat markers, so choose more than 261"):
        train_tokenizer(TEXTS, 261, path, markers=("<eoh>", "<eoa>"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aab622d9\nsize 1\n", "LFS point"),
        (b"\n<!DOCTYPE html>\n<html><body>401</body></html>", "a web page"),
        (b'{"error": "Repository not found"}', "JSON"),
        (b"", "0 bytes of something else"),
        (b"\x93NUMPY" * 99, "594 bytes of something else, or a damaged file"),
    ],
)
def test_files_that_are_no_tokenizer(content: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"not a sentencepiece model, but .*{what}"):
        Tokenizer(path)
    with pytest.raises(InputError, match="not a sentencepiece model"):
        copy_tokenizer(path, tmp_path / "copy.model")
    assert not (tmp_path / "copy.model").exists()


def test_files_that_are_cut_off_or_not_there(small: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such tokenizer.model"):
        Tokenizer(tmp_path / "other.model")
    path, whole = tmp_path / "tokenizer.model", small.path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a sentencepiece model, but .* a damaged file"):
        Tokenizer(path)


GOLDEN = {
    "Hello world": [9843, 2028],
    " Hello world": [22190, 2028],
    "\n": [364],
    "\n\n": [402],
    "\t": [363],
    "\r\n": [450],
    " ": [262],
    "  ": [387],
    "A": [290],
    "B": [309],
    "C": [289],
    "D": [302],
    " A": [493],
    " B": [556],
    " C": [487],
    " D": [553],
    "Answer: A": [16272, 334, 493],
    "Answer: A\n\n": [16272, 334, 493, 402],
    "今天天气晴朗适合出门散步": [67577, 69095, 63010, 61770, 67783, 69301, 74732],
    "<|User|>:": [333, 352, 1621, 352, 27232],
    "<|Bot|>:": [333, 352, 23845, 352, 27232],
    "<eoh>": [103027],
    "<eoa>": [103028],
    "</s>": [654, 269, 330],
    " yes": [9970],
    " no": [1038],
    "Yes": [9583],
    " Yes": [7560],
    "答案：A": [68208, 98750, 290],
    "答案： A": [68208, 98750, 493],
    "\u3000x": [230, 131, 131, 274],
    "12345": [4575, 1889],
}


@needs_real
@pytest.mark.parametrize(("text", "ids"), GOLDEN.items())
def test_golden_ids_of_the_real_tokenizer(text: str, ids: list[int]) -> None:
    tokenizer = real()
    assert tokenizer.encode(text) == ids
    assert tokenizer.encode_batch([text], add_bos=True)[0] == [1, *ids]
    assert_gives_back(tokenizer, text)


@needs_real
def test_special_ids_of_the_real_tokenizer() -> None:
    tokenizer = real()
    assert tokenizer.vocab_size == 103168 and not tokenizer.adds_leading_space
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 2)
    assert tokenizer.encode("bug", add_bos=True) == [1, 2463]
    assert [tokenizer.piece_id(f"<0x{byte:02X}>") for byte in range(256)] == list(range(3, 259))
    last = tokenizer.pieces([103027, 103028, 103029, 103167])
    assert last == ["<eoh>", "<eoa>", "<TOKENS_UNUSED_2>", "<TOKENS_UNUSED_140>"]


@needs_real
def test_the_real_tokenizer_gives_any_text_back() -> None:
    tokenizer = real()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(REAL))

    @settings(max_examples=300, deadline=None)
    @given(text=TEXT)
    def check(text: str) -> None:
        assert_gives_back(tokenizer, text)
        if "\u2581" not in text:
            assert tokenizer.encode(text) == processor.encode(text)

    check()
    for text in EXAMPLES:
        assert_gives_back(tokenizer, text)
    assert not [i for i in tokenizer.encode("<eoh><TOKENS_UNUSED_9>", literal=True) if i > 103026]
