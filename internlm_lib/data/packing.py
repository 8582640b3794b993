"""Documents → the rows that are stored: long ones split, short ones packed several to a row.

A row of n tokens trains n - 1 predictions: its tokens are `ids[:-1]`, its labels `labels[1:]`.
Neither step draws anything at random, and what is packed together depends on the documents alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

IGNORED = -100
"""Label of a token that is not trained, as in torch's cross entropy."""
_OPEN_ROWS = 32


@dataclass(frozen=True)
class Documents:
    """Documents, one after another."""

    ids: NDArray[numpy.int32]
    lengths: NDArray[numpy.int32]
    labels: NDArray[numpy.int32] | None = None
    """Beside the ids; None where every token is trained."""


@dataclass(frozen=True)
class Rows(Documents):
    """Rows, one after another; `lengths` are theirs."""

    pieces: NDArray[numpy.int64] | None = None
    """Of packed rows: (document, first token, tokens) of every piece, in stored order."""
    row_pieces: NDArray[numpy.int32] | None = None
    """Of packed rows: how many pieces each holds."""
    splits: int = 0
    """Documents that were cut."""


def split(documents: Documents, longest: int) -> Rows:
    """Cut documents of more than `longest` tokens; the pieces are rows of their own.

    No token is added, left out or repeated.
    """
    lengths = documents.lengths
    long = lengths > longest
    parts = -(-lengths // longest)  # per document, rounded up
    cut = numpy.full(parts.sum(), longest, dtype=numpy.int32)
    cut[parts.cumsum() - 1] = lengths - (parts - 1) * longest
    return Rows(documents.ids, cut, documents.labels, splits=int(long.sum()))


def pack(documents: Documents, longest: int, first_number: int) -> Rows:
    """Fill rows of at most `longest` tokens with whole documents: first fit, a few rows open.

    Longer documents are cut into pieces that overlap by one token: the last label of one piece is
    the first input of the next. No piece predicts its first token from what stands before it in
    the row, so that every trained token of a document is trained exactly once, but for the first.

    Args:
        first_number: number of the first document, for `pieces`.
    """
    pieces = _pieces(documents.lengths, longest)
    rows = first_fit([stop - start for _, start, stop in pieces], longest)
    starts = numpy.concatenate([[0], documents.lengths.cumsum()])
    ordered = [pieces[number] for row in rows for number in row]
    spans = [slice(starts[doc] + start, starts[doc] + stop) for doc, start, stop in ordered]
    lengths = numpy.array([stop - start for _, start, stop in ordered], dtype=numpy.int64)
    row_pieces = numpy.array([len(row) for row in rows], dtype=numpy.int32)
    borders = lengths.cumsum() - lengths
    labels = documents.ids if documents.labels is None else documents.labels
    labels = numpy.concatenate([labels[span] for span in spans])
    labels[borders] = IGNORED
    return Rows(
        ids=numpy.concatenate([documents.ids[span] for span in spans]),
        lengths=numpy.add.reduceat(lengths, row_pieces.cumsum() - row_pieces).astype(numpy.int32),
        labels=labels,
        pieces=numpy.array(
            [(first_number + doc, start, stop - start) for doc, start, stop in ordered],
            dtype=numpy.int64,
        ),
        row_pieces=row_pieces,
        splits=int((documents.lengths > longest).sum()),
    )


def first_fit(lengths: Sequence[int], longest: int) -> list[list[int]]:
    """Which lengths go into which row; each goes into the first open row that has room for it.

    Rows come in the order in which they were begun. At most `_OPEN_ROWS` are open at a time; where
    there would be one more, the fullest is closed. With texts like Alpaca's the rows of 512 to
    4096 tokens are then 97 to 99.5 % full, as full as with all of them open.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    open_rows: list[int] = []
    for number, length in enumerate(lengths):
        row = next((row for row in open_rows if room[row] >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(longest)
            open_rows.append(row)
        rows[row].append(number)
        room[row] -= length
        if room[row] == 0:
            open_rows.remove(row)
        elif len(open_rows) > _OPEN_ROWS:
            open_rows.remove(min(open_rows, key=room.__getitem__))
    return rows


def _pieces(lengths: NDArray[numpy.int32], longest: int) -> list[tuple[int, int, int]]:
    """(document, start, stop) of every piece; a document's pieces overlap by one token."""
    pieces = []
    for document, length in enumerate(lengths.tolist()):
        for start in range(0, max(length - 1, 1), longest - 1):
            pieces.append((document, start, min(start + longest, length)))
    return pieces
