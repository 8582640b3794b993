"""Token files hold what megatron-core reads back: one document per record, in order."""

from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

from internlm_lib.data.indexed import indexed_writer, read_documents, token_files
from internlm_lib.data.preprocess import Corpus, preprocess
from internlm_lib.data.prompts import template
from internlm_lib.data.records import Record
from internlm_lib.data.tokenizer import Tokenizer, train_tokenizer
from internlm_lib.errors import InputError

RECORDS = [Record(f"What is {n} plus {n}?", "", str(2 * n)) for n in range(1, 1400)] + [
    Record("Add the numbers.", f"{n} and 1", str(n + 1)) for n in range(100)
]
TEMPLATE = template("question_answer")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("t") / "tokenizer.model"
    return train_tokenizer(map(TEMPLATE.document, RECORDS), 300, path)


@pytest.fixture
def corpus(tokenizer: Tokenizer, tmp_path: Path) -> Corpus:
    return preprocess(RECORDS, tokenizer, tmp_path / "corpus", template=TEMPLATE)


def test_documents_are_bos_text_eos_in_order(corpus: Corpus, tokenizer: Tokenizer) -> None:
    documents = read_documents(corpus.prefix, range(len(RECORDS)))
    for record, ids in zip(RECORDS, documents, strict=True):
        assert (ids[0], ids[-1]) == (1, 2)
        assert tokenizer.decode(ids[1:-1]) == TEMPLATE.document(record)


def test_counts_are_those_of_the_files(corpus: Corpus) -> None:
    documents = read_documents(corpus.prefix, range(corpus.documents))
    assert corpus.documents == len(RECORDS)
    assert list(corpus.lengths) == [len(ids) for ids in documents]
    bin_path, _ = token_files(corpus.prefix)
    assert bin_path.stat().st_size == 2 * corpus.tokens  # 300 ids fit 16 bits
    assert corpus.mean_length == pytest.approx(numpy.mean(corpus.lengths))


def test_samples_need_one_token_more(corpus: Corpus) -> None:
    assert Corpus(corpus.prefix, (8, 9)).samples(16) == 1
    assert Corpus(corpus.prefix, (8, 8)).samples(16) == 0


def test_append_eod_is_what_closes_a_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prefix = tmp_path / "open"
    preprocess(RECORDS[:3], tokenizer, prefix, template=TEMPLATE, append_eod=False)
    closed = [
        tokenizer.encode(TEMPLATE.document(r), add_bos=True, add_eos=True) for r in RECORDS[:3]
    ]
    assert read_documents(prefix, range(3)) == [ids[:-1] for ids in closed]


def test_files_do_not_depend_on_workers(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = preprocess(RECORDS, tokenizer, tmp_path / "again", template=TEMPLATE, workers=3)
    for first, second in zip(token_files(corpus.prefix), token_files(other.prefix), strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_prefix_may_hold_dots(tokenizer: Tokenizer, tmp_path: Path) -> None:
    preprocess(RECORDS[:1], tokenizer, tmp_path / "alpaca.v1.2", template=TEMPLATE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alpaca.v1.2.bin", "alpaca.v1.2.idx"]


def test_large_vocabularies_take_32_bits(tmp_path: Path) -> None:
    ids = [1, 103167, 2]
    with indexed_writer(tmp_path / "large", vocab_size=103168) as writer:
        writer.add_document(ids)
    assert read_documents(tmp_path / "large", [0]) == [ids]
    assert (tmp_path / "large.bin").stat().st_size == 3 * 4


def test_an_error_leaves_the_earlier_files_alone(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    before = [path.read_bytes() for path in token_files(corpus.prefix)]

    def broken() -> Iterator[Record]:
        yield from RECORDS[:5]
        raise InputError("row 5 is bad")

    with pytest.raises(InputError, match="row 5 is bad"):
        preprocess(broken(), tokenizer, corpus.prefix, template=TEMPLATE)
    assert [path.read_bytes() for path in token_files(corpus.prefix)] == before
    assert len(list(tmp_path.iterdir())) == 2


def test_no_records_is_an_error_and_leaves_no_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no records"):
        preprocess([], tokenizer, tmp_path / "none", template=TEMPLATE)
    assert not any(tmp_path.iterdir())
