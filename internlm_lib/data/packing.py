"""Documents → the rows that are stored: long ones split, short ones packed several to a row.

A row of n tokens trains n - 1 predictions: its tokens are `ids[:-1]`, its labels `labels[1:]`.
Neither step draws anything at random, and what is packed together depends on the documents alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from internlm_lib.data.documents import IGNORED

PIECE_NUMBERS = 3
"""Numbers that describe a piece of a packed row: of which document, from which of its tokens on,
how many."""
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
    """Of packed rows: `PIECE_NUMBERS` of every piece, in stored order."""
    row_numbers: NDArray[numpy.int32] | None = None
    """Of packed rows: how many of the numbers in `pieces` each has."""
    splits: int = 0
    """Documents that were cut."""


def arrange(
    documents: Documents, *, pack_to: int | None, split_longer_than: int | None, first_number: int
) -> Rows:
    """The rows of some documents, by `card.Options`; at least one document."""
    if pack_to:
        return pack(documents, pack_to + 1, first_number)
    if split_longer_than:
        return split(documents, split_longer_than)
    return Rows(documents.ids, documents.lengths, documents.labels)


def joined(parts: Sequence[Documents]) -> Documents:
    """The documents of all parts, of which there is at least one."""
    labels = [part.labels for part in parts if part.labels is not None]
    return Documents(
        numpy.concatenate([part.ids for part in parts]),
        numpy.concatenate([part.lengths for part in parts]),
        numpy.concatenate(labels) if labels else None,
    )


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
    rows = first_fit(pieces[:, 2].tolist(), longest)
    per_row = numpy.array([len(row) for row in rows])
    pieces = pieces[[number for row in rows for number in row]]
    lengths = pieces[:, 2]
    borders = lengths.cumsum() - lengths  # where each piece begins in the rows
    begins = (documents.lengths.cumsum() - documents.lengths)[pieces[:, 0]] + pieces[:, 1]
    taken = numpy.repeat(begins - borders, lengths) + numpy.arange(lengths.sum())
    labels = (documents.ids if documents.labels is None else documents.labels)[taken]
    labels[borders] = IGNORED
    return Rows(
        ids=documents.ids[taken],
        lengths=numpy.add.reduceat(lengths, per_row.cumsum() - per_row).astype(numpy.int32),
        labels=labels,
        pieces=(pieces + (first_number, 0, 0)).ravel(),
        row_numbers=(PIECE_NUMBERS * per_row).astype(numpy.int32),
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


def _pieces(lengths: NDArray[numpy.int32], longest: int) -> NDArray[numpy.int64]:
    """`PIECE_NUMBERS` of every piece; a document's pieces overlap by one token."""
    return numpy.array(
        [
            (document, start, min(longest, length - start))
            for document, length in enumerate(lengths.tolist())
            for start in range(0, max(length - 1, 1), longest - 1)
        ],
        dtype=numpy.int64,
    )
