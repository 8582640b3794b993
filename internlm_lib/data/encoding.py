"""Rows → token ids, by several processes at once, the results in the order of the rows.

This process reads the rows, sends them in batches to the others, and encodes those that would have
to wait. What a batch holds depends on the rows alone, and few are on their way at a time, so that
memory stays bounded. Only this process reads: that is a small part of the work, so that it can feed
many others, and few kinds of files could be read from the middle.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy

from internlm_lib.data.documents import IGNORED, Part, Span, encode_parts
from internlm_lib.data.handlers import Handler
from internlm_lib.data.packing import Documents
from internlm_lib.data.records import OnDamage, RecordError, Row
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError, WorkerError
from internlm_lib.processes import die_with

_BATCH_ROWS = 500
_BATCH_CHARACTERS = 1 << 20
_SENT_AHEAD = 2
"""Batches that every other process has to do, so that it never waits."""
_AT_MOST_HELD = 4
"""Batches per process that are sent or done, and wait for an earlier one."""
_BATCHES_ALONE = 4
"""So few batches are encoded sooner than a process is started."""


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


def encode_all(source: Iterable[Batch], encoder: Encoder, workers: int) -> Iterator[EncodedBatch]:
    """Encode batches in up to `workers` processes, of which this is one; the results are the same.

    Raises:
        InputError: a row that cannot be used, or the source's failure.
        WorkerError: another process was killed.
    """
    source = iter(source)
    first = list(islice(source, _BATCHES_ALONE))
    source = chain(first, source)
    if workers > 1 and len(first) == _BATCHES_ALONE:
        return _encode_together(source, encoder, workers - 1)
    return map(encoder.encode, source)


def _encode_together(
    source: Iterable[Batch], encoder: Encoder, others: int
) -> Iterator[EncodedBatch]:
    pool = ProcessPoolExecutor(
        others,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(os.getpid(), encoder),
    )
    held: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in source:
            if sum(not future.done() for future in held) < _SENT_AHEAD * others:
                held.append(pool.submit(_encode_batch, batch))
            else:
                held.append(_encoded_here(encoder, batch))
            while held and (held[0].done() or len(held) > _AT_MOST_HELD * (others + 1)):
                yield held.popleft().result()
        while held:
            yield held.popleft().result()
    except BrokenProcessPool as error:
        raise WorkerError(
            "a process that encodes was killed, perhaps for want of memory: fewer --workers need "
            "less; the same command goes on from here"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encoded_here(encoder: Encoder, batch: Batch) -> Future[EncodedBatch]:
    """As if by another process: an error is raised when it is the batch's turn."""
    future: Future[EncodedBatch] = Future()
    try:
        future.set_result(encoder.encode(batch))
    except InputError as error:
        future.set_exception(error)
    return future


_encoder: Encoder | None = None
"""That of a worker process."""


def _start_worker(parent: int, encoder: Encoder) -> None:
    global _encoder
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all, and the parent decides
    _encoder = encoder


def _encode_batch(batch: Batch) -> EncodedBatch:
    assert _encoder is not None
    return _encoder.encode(batch)


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
