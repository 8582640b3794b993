"""Token files hold what megatron-core reads back: the records in order, whoever encodes them."""

import json
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest

from internlm_lib.data import encoding
from internlm_lib.data import preprocess as module
from internlm_lib.data.documents import IGNORED, Span, encode_document
from internlm_lib.data.handlers import Handler, handler
from internlm_lib.data.indexed import corpus_files, field_prefix, packing_prefix, read_documents
from internlm_lib.data.inputs import Options
from internlm_lib.data.packing import PIECE_NUMBERS
from internlm_lib.data.preprocess import Corpus, Progress, preprocess
from internlm_lib.data.records import RecordError, Row, read_rows
from internlm_lib.data.tokenizer import Tokenizer, train_tokenizer
from internlm_lib.errors import InputError, WorkerError

RECORDS = [
    {"instruction": f"What is {n} plus {n}?", "output": str(2 * n)} for n in range(1, 700)
] + [{"instruction": "Count.", "input": f"to {n}", "output": str(range(n))} for n in range(100)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("t") / "tokenizer.model"
    return train_tokenizer((json.dumps(record) for record in RECORDS), 300, path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_records(tmp_path / "records.jsonl", RECORDS)


@pytest.fixture
def many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small corpora are cut into as many batches, for as many processes, as large ones."""
    monkeypatch.setattr(encoding, "_BATCH_ROWS", 50)
    monkeypatch.setattr(module, "_BYTES_PER_PROCESS", 1)
    monkeypatch.setattr("internlm_lib.data.corpus._PACKED_BATCHES", 3)


def write_records(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def spans_of(source: Path, made: Handler) -> list[Sequence[Span]]:
    return [made.document(row) for row in read_rows([source])]


def contents(corpus: Corpus) -> list[bytes]:
    kind = corpus.card.inputs.handler.kind
    return [path.read_bytes() for path in corpus_files(corpus.prefix, kind)]


def field(corpus: Corpus, name: str) -> list[list[int]]:
    prefix = field_prefix(corpus.prefix, "instruction", name)
    return read_documents(prefix, range(corpus.card.counts.rows))


# --- what the files hold -------------------------------------------------------------------------


def test_documents_are_the_records_in_order(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    made = handler("question_answer", tokenizer)
    corpus = preprocess([source], tmp_path / "c", made, tokenizer)
    documents = read_documents(corpus.prefix, range(len(RECORDS)))
    for spans, ids in zip(spans_of(source, made), documents, strict=True):
        assert (ids[0], ids[-1]) == (1, 2)
        assert tokenizer.decode(ids[1:-1]) == "".join(span.text for span in spans)
    card = corpus.card
    assert card.counts.documents == card.counts.rows == len(documents)
    assert card.counts.tokens == card.counts.trained_tokens == sum(map(len, documents))
    lengths = [len(ids) for ids in documents]
    assert (card.lengths.shortest, card.lengths.longest) == (min(lengths), max(lengths))
    assert card.lengths.mean == pytest.approx(numpy.mean(lengths))
    counts = numpy.bincount(numpy.concatenate(documents), minlength=300)
    most = sorted(counts[counts > 0].tolist(), reverse=True)[:50]
    assert [token.count for token in card.tokens.most_frequent] == most
    assert card.tokens.used == (counts > 0).sum()


@pytest.mark.parametrize(
    ("dtype", "size"), [("smallest", 2), ("int32", 4)], ids=["smallest", "int32"]
)
def test_the_dtype_is_a_choice(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, dtype: Any, size: int
) -> None:
    made = handler("alpaca", tokenizer)
    corpus = preprocess([source], tmp_path / "c", made, tokenizer, Options(dtype=dtype))
    assert (tmp_path / "c.bin").stat().st_size == size * corpus.card.counts.tokens
    spans = spans_of(source, made)[-1]
    last = encode_document(spans, tokenizer, append_eod=True)[0]
    assert read_documents(corpus.prefix, [len(RECORDS) - 1]) == [last]


def test_append_eod_is_what_closes_a_document(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    made = handler("alpaca", tokenizer)
    closed = preprocess([source], tmp_path / "c", made, tokenizer)
    open_ = preprocess([source], tmp_path / "o", made, tokenizer, Options(append_eod=False))
    numbers = range(len(RECORDS))
    both = (read_documents(corpus.prefix, numbers) for corpus in (closed, open_))
    assert all(long == [*short, 2] for long, short in zip(*both, strict=True))


@pytest.mark.usefixtures("many_batches")
@pytest.mark.parametrize("name", ["alpaca", "alpaca_instruction"])
def test_the_files_do_not_depend_on_workers(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    made = handler(name, tokenizer)
    options = Options(pack_to=60) if name == "alpaca_instruction" else Options(split_longer_than=60)
    alone, two, three = (
        preprocess([source], tmp_path / f"{n}", made, tokenizer, options, workers=n)
        for n in (1, 2, 3)
    )
    assert contents(alone) == contents(two) == contents(three)
    assert alone.card.counts == two.card.counts
    assert alone.card.counts.split > 0


@pytest.mark.usefixtures("many_batches")
def test_instruction_data_are_three_parallel_files(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    made = handler("alpaca_instruction", tokenizer)
    corpus = preprocess([source], tmp_path / "c", made, tokenizer)
    pairs = [encode_document(s, tokenizer, append_eod=True) for s in spans_of(source, made)]
    assert field(corpus, "input_ids") == [ids for ids, _ in pairs]
    assert field(corpus, "labels") == [labels for _, labels in pairs]
    assert field(corpus, "attention_mask") == [[1] * len(ids) for ids, _ in pairs]
    trained = sum(label != IGNORED for _, labels in pairs for label in labels)
    assert corpus.card.counts.trained_tokens == trained < corpus.card.counts.tokens
    sizes = [file.bytes / corpus.card.counts.tokens for file in corpus.card.files[::2]]
    assert sizes == [2, 1, 4]


@pytest.mark.usefixtures("many_batches")
def test_packed_rows_hold_the_documents_they_name(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    made = handler("alpaca_instruction", tokenizer)
    plain = preprocess([source], tmp_path / "c", made, tokenizer)
    corpus = preprocess([source], tmp_path / "p", made, tokenizer, Options(pack_to=300))
    rows, labels = field(corpus, "input_ids"), field(corpus, "labels")
    documents, document_labels = field(plain, "input_ids"), field(plain, "labels")
    named = read_documents(packing_prefix(corpus.prefix), range(len(rows)))
    seen = []
    for row, row_labels, numbers in zip(rows, labels, named, strict=True):
        pieces = numpy.array(numbers).reshape(-1, PIECE_NUMBERS).tolist()
        at = 0
        for number, start, length in pieces:
            assert row[at : at + length] == documents[number][start : start + length]
            expected = document_labels[number][start : start + length]
            assert row_labels[at : at + length] == [IGNORED, *expected[1:]]
            at += length
            seen.append(number)
        assert at == len(row) <= 301
    assert sorted(seen) == list(range(len(documents)))  # none is longer than a row
    packing = corpus.card.packing
    assert packing is not None and packing.pieces == len(documents) and packing.row_tokens == 301
    assert packing.efficiency == sum(map(len, rows)) / (301 * len(rows)) > 0.9


def test_columns_are_mapped(tokenizer: Tokenizer, tmp_path: Path, source: Path) -> None:
    renamed = [{"q": r["instruction"], "input": r.get("input"), "output": r["output"]}
               for r in RECORDS]  # fmt: skip
    other = write_records(tmp_path / "other.jsonl", renamed)
    made = handler("alpaca", tokenizer)
    mapped = preprocess(
        [other], tmp_path / "m", made, tokenizer, Options(columns={"instruction": "q"})
    )
    assert contents(mapped) == contents(preprocess([source], tmp_path / "c", made, tokenizer))


def test_long_texts_make_small_batches(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_records(tmp_path / "r.jsonl", [{"text": "one two " * n} for n in range(1, 60)])
    made = handler("pretrain", tokenizer)
    before = preprocess([source], tmp_path / "a", made, tokenizer)
    sizes = []
    encode = encoding.Encoder.encode
    monkeypatch.setattr(
        encoding.Encoder, "encode", lambda *a: (sizes.append(len(a[1].values)), encode(*a))[1]
    )
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 1000)
    after = preprocess([source], tmp_path / "b", made, tokenizer)
    assert contents(before) == contents(after)
    assert sum(sizes) == 59 and max(sizes) > 10 and sizes[-2:] == [3, 3]


def test_progress_reaches_the_end(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    seen: list[Progress] = []
    corpus = preprocess(
        [source], tmp_path / "c", handler("alpaca", tokenizer), tokenizer, on_progress=seen.append
    )
    assert seen[-1].documents == corpus.card.counts.documents
    assert seen[-1].tokens == corpus.card.counts.tokens
    assert seen[-1].bytes_read == seen[-1].bytes_total == source.stat().st_size


# --- what cannot be used -------------------------------------------------------------------------

BAD = [
    {"instruction": None, "output": "x"},
    {"instruction": "no output"},
    {"instruction": "half a pair: \ud800", "output": "x"},
    ["no", "object"],
]


def test_damaged_records_are_counted_by_choice(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [RECORDS[0], *BAD, *RECORDS[1:]]
    source = write_records(tmp_path / "r.jsonl", rows)
    made = handler("alpaca", tokenizer)
    corpus = preprocess([source], tmp_path / "c", made, tokenizer, Options(on_damage="count"))
    assert corpus.card.counts.damaged == len(BAD)
    assert corpus.card.counts.documents == len(RECORDS)
    lines = {message.partition(":")[0] for message in corpus.card.damage}
    assert lines == {f"{source}, line {n}" for n in range(2, 2 + len(BAD))}
    clean = write_records(tmp_path / "clean.jsonl", RECORDS)
    assert contents(corpus) == contents(preprocess([clean], tmp_path / "d", made, tokenizer))


@pytest.mark.usefixtures("many_batches")
@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_record_is_told(tokenizer: Tokenizer, tmp_path: Path, workers: int) -> None:
    rows = [*RECORDS[:260], {"instruction": "x"}, *RECORDS[260:300], "no object", *RECORDS[300:]]
    source = write_records(tmp_path / "r.jsonl", rows)
    with pytest.raises(InputError, match="r.jsonl, line 261: column 'output' is missing"):
        preprocess(
            [source], tmp_path / "c", handler("alpaca", tokenizer), tokenizer, workers=workers
        )
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_a_corpus_of_damaged_records_alone_is_an_error(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = write_records(tmp_path / "r.jsonl", BAD)
    options = Options(on_damage="count")
    with pytest.raises(InputError, match="no document to write; .* damaged record: .*line "):
        preprocess([source], tmp_path / "c", handler("alpaca", tokenizer), tokenizer, options)
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


class BadIds:
    """A handler that gives ids which no tokenizer has."""

    name, kind = "bad ids", "pretrain"
    columns, optional_columns = ("instruction",), ()

    def document(self, row: Row) -> Sequence[Span]:
        text = row.values["instruction"]
        return [Span(text), Span(ids=(10**6,))] if "plus 150" in text else [Span(text)]


def test_what_cannot_be_encoded_is_damage_of_its_record(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    message = f"{source}, line 150: .*1000000"
    with pytest.raises(InputError, match=message):
        preprocess([source], tmp_path / "c", BadIds(), tokenizer)
    options = Options(on_damage="count")
    corpus = preprocess([source], tmp_path / "c", BadIds(), tokenizer, options)
    assert corpus.card.counts.damaged == 1 and re.match(message, corpus.card.damage[0])
    assert corpus.documents == len(RECORDS) - 1
    (before,) = read_documents(corpus.prefix, [148])
    assert tokenizer.decode(before[1:-1]) == RECORDS[148]["instruction"]


class Own:
    """A handler of somebody's, of which each worker has a process of its own."""

    name, kind = "own", "pretrain"
    columns, optional_columns = ("instruction",), ()

    def __init__(self, others: Path, fault: str = "") -> None:
        self.others, self.fault, self.test = others, fault, os.getpid()
        """A folder in which other processes leave their numbers, to be made; the test's own one."""
        others.mkdir()

    def document(self, row: Row) -> Sequence[Span]:
        text = row.values["instruction"]
        if os.getpid() != self.test:
            (self.others / str(os.getpid())).touch()
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault not in ("", "error") and not any(self.others.iterdir()):
            time.sleep(0.02)  # so that something is left to do for others
        if "13" in text:
            raise RecordError(f"{row.where}: 13 brings bad luck")
        if self.fault == "error" and "plus 150" in text:
            raise ZeroDivisionError("oh")
        return [Span(text)]

    def __reduce__(self) -> Any:
        if self.fault == "not loaded":
            return int, ("no number",)
        return super().__reduce__()


@pytest.mark.usefixtures("many_batches")
def test_a_handler_of_ones_own_runs_in_other_processes(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    options = Options(on_damage="count")
    alone = preprocess([source], tmp_path / "1", Own(tmp_path / "a"), tokenizer, options)
    slow = Own(tmp_path / "b", fault="slow")
    three = preprocess([source], tmp_path / "3", slow, tokenizer, options, workers=3)
    assert list((tmp_path / "b").iterdir()) and not list((tmp_path / "a").iterdir())
    assert contents(alone) == contents(three)
    unlucky = [f"line {n}: 13 brings bad luck" for n in range(1, 700) if "13" in str(n)]
    assert alone.card.counts.damaged == len(unlucky) == 17
    assert list(alone.card.damage) == [f"{source}, {message}" for message in unlucky]
    assert alone.card.damage == three.card.damage


@pytest.mark.usefixtures("many_batches")
@pytest.mark.parametrize(
    ("fault", "workers", "error", "message"),
    [
        ("error", 1, InputError, "line 150: handler 'own' failed: ZeroDivisionError: oh"),
        ("error", 2, InputError, "line 150: handler 'own' failed: ZeroDivisionError: oh"),
        ("killed", 2, WorkerError, r"a process that encodes ended \(SIGKILL\), perhaps for want"),
        ("not loaded", 2, InputError, "cannot be loaded by another process: ValueError: invalid"),
    ],
)
def test_a_handlers_fault_is_no_damage(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, fault: str, workers: int, error: Any,
    message: str,
) -> None:  # fmt: skip
    options, own = Options(on_damage="count"), Own(tmp_path / "others", fault)
    with pytest.raises(error, match=message):
        preprocess([source], tmp_path / "c", own, tokenizer, options, workers=workers)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("alpaca", {"pack_to": 9}, "pack_to = 9: handler 'alpaca' makes pre-training text"),
        ("alpaca_instruction", {"split_longer_than": 9}, "split_longer_than = 9: handler"),
        (
            "alpaca",
            {"columns": {"question": "q"}},
            "output, input, not question",
        ),
    ],
)
def test_options_must_fit_the_handler(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, name: str, options: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        preprocess(
            [source], tmp_path / "c", handler(name, tokenizer), tokenizer, Options(**options)
        )


def test_a_source_is_not_overwritten(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "alpaca.json"
    source.write_text(json.dumps(RECORDS))
    with pytest.raises(InputError, match="would overwrite the source .*alpaca.json"):
        preprocess([source], tmp_path / "alpaca", handler("alpaca", tokenizer), tokenizer)
    assert json.loads(source.read_text()) == RECORDS


def test_a_source_must_not_change_meanwhile(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def change(_: Progress) -> None:
        source.write_text(source.read_text() + "\n")

    made = handler("alpaca", tokenizer)
    with pytest.raises(InputError, match="a source was changed while it was read"):
        preprocess([source], tmp_path / "c", made, tokenizer, on_progress=change)
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]
