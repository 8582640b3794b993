"""Rows → token ids, by several workers at once, the results in the order of the rows.

Rows are handed out in batches. What a batch holds depends on the rows alone, and few are on their
way at a time, so that memory stays bounded. This process alone reads: that is a small part of the
work, so that it can feed many others, and few kinds of files could be read from the middle.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy

from internlm_lib.data.documents import IGNORED, Part, Span, encode_parts
from internlm_lib.data.handlers import HANDLERS, Handler
from internlm_lib.data.packing import Documents
from internlm_lib.data.records import OnDamage, RecordError, Row
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.data.workers import Workers
from internlm_lib.errors import InputError

_BATCH_ROWS = 250
_BATCH_CHARACTERS = 1 << 20
_THREADS = 4


@dataclass(frozen=True)
class Batch:
    """Rows as they are sent: as columns, for rows as objects take longer than to read them."""

    values: list[Mapping[str, Any]]
    """Of each row."""
    where: list[str]
    position: int
    """Bytes of the sources that had been read after them."""
    failure: InputError | None = None
    """Why no rows follow, if it is not that all were read."""


@dataclass(frozen=True)
class EncodedBatch:
    """What became of a batch."""

    documents: Documents
    damage: tuple[str, ...]
    """A message per row that cannot be used."""
    position: int


@dataclass(frozen=True)
class Encoder:
    """Makes ids of rows. Travels to other processes, as its handler and its tokenizer do."""

    handler: Handler
    tokenizer: Tokenizer
    append_eod: bool = True
    on_damage: OnDamage = "stop"

    def load(self) -> None:
        """Load now what is loaded when it is first needed."""
        encode_parts([[Span("a")]], self.tokenizer, append_eod=True)

    def encode(self, batch: Batch) -> EncodedBatch:
        """Raises InputError for the first row that cannot be used, unless these are counted, and
        after all of them the batch's failure."""
        damage: list[str] = []
        rows = map(Row, batch.values, batch.where)
        made = [(row, self._document(row, damage)) for row in rows]
        found = [(row, spans) for row, spans in made if spans is not None]
        try:
            encoded = self._encode([spans for _, spans in found])
        except InputError:  # of one of them: which one?
            encoded = [ids for row, spans in found for ids in self._encode_one(row, spans, damage)]
        if batch.failure:
            raise batch.failure
        return EncodedBatch(
            joined_parts(encoded, labels=self.handler.kind == "instruction"),
            tuple(damage),
            batch.position,
        )

    def _document(self, row: Row, damage: list[str]) -> Sequence[Span] | None:
        try:
            return self.handler.document(row)
        except RecordError as error:
            self._note(str(error), damage)
            return None
        except Exception as error:
            # Also where damage is counted: a handler's fault is no record's.
            raise InputError(
                f"{row.where}: handler {self.handler.name!r} failed: {type(error).__name__}: "
                f"{error}; correct the handler"
            ) from error

    def _encode(self, documents: Sequence[Sequence[Span]]) -> list[list[Part]]:
        return encode_parts(documents, self.tokenizer, append_eod=self.append_eod)

    def _encode_one(self, row: Row, spans: Sequence[Span], damage: list[str]) -> list[list[Part]]:
        try:
            return self._encode([spans])
        except InputError as error:
            self._note(f"{row.where}: {error}", damage)
            return []

    def _note(self, message: str, damage: list[str]) -> None:
        if self.on_damage == "stop":
            raise InputError(message)
        damage.append(message)


def batches(
    rows: Iterable[Row], columns: Sequence[str], position: Callable[[], int]
) -> Iterator[Batch]:
    """Rows by the hundred, or fewer where they are long; only `columns` of them.

    An InputError while reading becomes the last batch's failure: rows before it come first, so that
    the error told is the same for any number of processes.

    Args:
        position: how many bytes of the sources have been read.
    """
    wanted = frozenset(columns)
    values: list[Mapping[str, Any]] = []
    where: list[str] = []
    characters = 0
    failure = None
    try:
        for row in rows:
            own = row.values
            if not own.keys() <= wanted:
                own = {name: own[name] for name in columns if name in own}
            values.append(own)
            where.append(row.where)
            characters += sum(map(_characters, own.values()))
            if len(values) == _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
                yield Batch(values, where, position())
                values, where, characters = [], [], 0
    except InputError as error:
        failure = error
    if values or failure:
        yield Batch(values, where, position(), failure)


def encode_all(
    source: Iterable[Batch], encoder: Encoder, workers: int, *, most_processes: int
) -> Iterator[EncodedBatch]:
    """Encode `workers` batches at a time; the results do not depend on their number.

    Handlers of the kit's take so little time that four threads of one process do not wait for each
    other; each worker has a process of its own where it may be otherwise.

    Raises:
        InputError: a row that cannot be used, or the source's failure.
        WorkerError: another process was killed.
    """
    threads = min(workers, _THREADS) if encoder.handler.name in HANDLERS else 1
    processes = min(-(-workers // threads), most_processes)
    encoder.load()
    pool = Workers(encoder, threads=threads, processes=processes)
    held: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in source:
            while not (future := pool.submit(batch)):
                yield held.popleft().result()
            held.append(future)
            while held and (held[0].done() or len(held) > 2 * pool.capacity):
                yield held.popleft().result()
        while held:
            yield held.popleft().result()
    finally:
        pool.close()


def _characters(value: Any) -> int:
    """Length of all texts in a value, however deep."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def joined_parts(documents: Sequence[Sequence[Part]], labels: bool) -> Documents:
    """Documents as arrays; as the ids come from sentencepiece as lists, they are touched once."""
    parts = [part for document in documents for part in document]
    sizes = numpy.array([len(ids) for ids, _ in parts], dtype=numpy.int32)
    ids = numpy.fromiter(chain.from_iterable(ids for ids, _ in parts), numpy.int32, sizes.sum())
    counts = numpy.array([len(document) for document in documents], dtype=numpy.int64)
    trained = numpy.repeat([trained for _, trained in parts], sizes) if labels else None
    return Documents(
        ids,
        # Of no documents `reduceat` makes no sense; each has at least one part, its `<s>`.
        numpy.add.reduceat(sizes, counts.cumsum() - counts) if documents else sizes,
        None if trained is None else numpy.where(trained, ids, numpy.int32(IGNORED)),
    )
