"""Packed and split rows hold what the documents hold, each trained token once."""

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_lib.data.documents import IGNORED
from internlm_lib.data.packing import PIECE_NUMBERS, Documents, Rows, first_fit, pack, split

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def documents_of(lengths: list[int]) -> Documents:
    """Documents of consecutive numbers from 1000 on; every third token is not trained."""
    ids = numpy.arange(1000, 1000 + sum(lengths), dtype=numpy.int32)
    labels = numpy.where(ids % 3 == 0, IGNORED, ids)
    return Documents(ids, numpy.array(lengths, dtype=numpy.int32), labels)


def parts(values: numpy.ndarray, lengths: numpy.ndarray) -> list[list[int]]:
    return [part.tolist() for part in numpy.split(values, lengths.cumsum()[:-1])]


def targets(rows: Rows | Documents) -> list[int]:
    """Tokens that a training on these rows predicts, by the batches' rule `labels[1:]`."""
    assert rows.labels is not None
    found = [label for row in parts(rows.labels, rows.lengths) for label in row[1:]]
    return sorted(label for label in found if label != IGNORED)


@given(LENGTHS, st.integers(2, 50))
def test_packing_trains_what_the_documents_train(lengths: list[int], longest: int) -> None:
    documents = documents_of(lengths)
    rows = pack(documents, longest, first_number=0)
    assert targets(rows) == targets(documents)
    assert rows.lengths.max() <= longest and rows.lengths.sum() == len(rows.ids)


@given(LENGTHS, st.integers(2, 50))
def test_pieces_say_what_a_row_holds(lengths: list[int], longest: int) -> None:
    documents = documents_of(lengths)
    rows = pack(documents, longest, first_number=70)
    assert rows.pieces is not None and rows.row_numbers is not None and rows.labels is not None
    assert rows.row_numbers.sum() == len(rows.pieces)
    pieces = rows.pieces.reshape(-1, PIECE_NUMBERS)
    stored = parts(rows.ids, pieces[:, 2])
    whole: dict[int, list[int]] = {}
    for (number, start, length), piece in sorted(zip(pieces.tolist(), stored, strict=True)):
        assert len(piece) == length
        known = whole.setdefault(number - 70, [])
        assert start == max(len(known) - 1, 0) and known[-1:] in ([], piece[:1])  # overlap by one
        known += piece[1:] if known else piece
    given_documents = parts(documents.ids, documents.lengths)
    assert [whole[number] for number in range(len(lengths))] == given_documents
    tokens, per_row = pieces[:, 2], rows.row_numbers // PIECE_NUMBERS
    row_starts = per_row.cumsum() - per_row
    assert numpy.add.reduceat(tokens, row_starts).tolist() == rows.lengths.tolist()
    first_labels = rows.labels[tokens.cumsum() - tokens]
    assert set(first_labels.tolist()) == {IGNORED}


def test_a_document_goes_into_the_first_row_with_room() -> None:
    assert first_fit([6, 5, 4, 3, 2, 9], 10) == [[0, 2], [1, 3, 4], [5]]


def test_few_rows_are_open_and_the_fullest_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internlm_lib.data.packing._OPEN_ROWS", 2)
    # Rows of 7, 6 and 8 are begun; the third closes at once, the fullest, and 2 more do not fit it.
    assert first_fit([7, 6, 8, 2, 4], 10) == [[0, 3], [1, 4], [2]]


def test_packing_wastes_little() -> None:
    lengths = numpy.random.RandomState(5).lognormal(4.5, 0.5, 5000).astype(int) + 20
    rows = first_fit(lengths.tolist(), 1025)
    assert sum(lengths) / (len(rows) * 1025) > 0.95


@given(LENGTHS, st.integers(1, 50))
def test_splitting_cuts_and_keeps_every_token(lengths: list[int], longest: int) -> None:
    documents = documents_of(lengths)
    rows = split(documents, longest)
    assert rows.ids is documents.ids and rows.splits == sum(n > longest for n in lengths)
    expected = [
        document[start : start + longest]
        for document in parts(documents.ids, documents.lengths)
        for start in range(0, len(document), longest)
    ]
    assert parts(rows.ids, rows.lengths) == expected


def test_a_split_document_is_counted() -> None:
    assert pack(documents_of([9, 4, 11, 10]), 10, first_number=0).splits == 1
    assert split(documents_of([9, 4, 11, 10]), 9).splits == 2
