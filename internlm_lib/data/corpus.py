"""A corpus in the making: files that grow, and what they hold so far.

A journal says what has been committed. The same work, started again, cuts the files back to the
last commit and goes on; other work starts anew.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from internlm_lib.data.card import (
    Card,
    Counts,
    Packing,
    TokenFile,
    card_path,
    describe_lengths,
    describe_tokens,
    made_now,
    read_card,
)
from internlm_lib.data.documents import IGNORED
from internlm_lib.data.encoding import EncodedBatch
from internlm_lib.data.growing import GrowingFile
from internlm_lib.data.indexed import (
    FIELDS,
    field_prefix,
    id_dtype,
    packing_prefix,
    token_files,
    write_index,
)
from internlm_lib.data.inputs import Inputs
from internlm_lib.data.packing import PIECE_NUMBERS, Documents, arrange, joined
from internlm_lib.data.records import Damage
from internlm_lib.data.working_folder import clear
from internlm_lib.errors import InputError
from internlm_lib.files import read_json, sha256_of, sync, write_json
from internlm_lib.journal import Journal, events

_PACKED_BATCHES = 64
"""So many are packed together."""
_COMMIT_SECONDS = 5.0
_LISTED = 20
_BLOCK = 1 << 20
_JOURNAL, _WORK = "journal.jsonl", "work.json"
_MASK = "attention_mask"
_INT32 = numpy.dtype("int32")


class Tally:
    """What the files of a corpus hold: counted while they are written, or read again."""

    def __init__(self, vocab_size: int) -> None:
        self.histogram = numpy.zeros(vocab_size, dtype=numpy.int64)
        self.lengths: Counter[int] = Counter()
        """Documents of each length."""
        self.rows = self.pieces = self.untrained = 0

    @property
    def documents(self) -> int:
        return self.lengths.total()

    @property
    def tokens(self) -> int:
        return int(self.histogram.sum())

    def see(self, name: str, values: NDArray) -> None:
        """Count what is in the file that `CorpusWriter` calls so."""
        if name == "input_ids":
            self.histogram += numpy.bincount(values, minlength=len(self.histogram))
        elif name == "labels":
            self.untrained += int((values == IGNORED).sum())
        elif name == "rows":
            self.rows += len(values)
        elif name == "documents":
            self.lengths.update(values.tolist())
        elif name == "packing":
            self.pieces += len(values) // PIECE_NUMBERS


@dataclass
class Progress:
    """What is committed, beside what the files themselves tell."""

    batches: int = 0
    """Of the source."""
    splits: int = 0
    damaged: int = 0
    """Rows that gave no document."""
    damage: list[str] = field(default_factory=list)
    """The first messages about them."""
    seconds: float = 0.0


class CorpusWriter:
    """Writes the documents of encoded batches; made by `corpus_writer`."""

    def __init__(self, folder: Path, prefix: Path, inputs: Inputs) -> None:
        self.tally = Tally(inputs.tokenizer.vocab_size)
        self.progress = Progress()
        self.inputs = inputs
        self._folder, self._prefix = folder, prefix
        self._since = time.monotonic()
        self._held: list[EncodedBatch] = []
        self._journal = Journal(folder / _JOURNAL)
        self._files = self._open()

    def _open(self) -> dict[str, GrowingFile]:
        """Files of the corpus, under their final names, and files of lengths, for its indices."""
        dtypes = {name: dtype for name, dtype in self._fields().items() if name != _MASK}
        files = {name: GrowingFile(self._bin(name), dtype) for name, dtype in dtypes.items()}
        lengths = ["rows", "documents", *(["packing_lengths"] if "packing" in files else [])]
        return files | {name: GrowingFile(self._folder / name, _INT32) for name in lengths}

    def _fields(self) -> dict[str, numpy.dtype]:
        """What the corpus consists of, and its dtypes."""
        options = self.inputs.options
        fields = {"input_ids": id_dtype(options.dtype, self.inputs.tokenizer.vocab_size)}
        if self.inputs.handler.kind == "instruction":
            small = options.dtype == "smallest"
            fields |= {_MASK: numpy.dtype("uint8") if small else _INT32, "labels": _INT32}
        return fields | ({"packing": numpy.dtype("int64")} if options.pack_to else {})

    def _bin(self, name: str) -> Path:
        kind = self.inputs.handler.kind
        is_field = name in FIELDS
        own = field_prefix(self._prefix, kind, name) if is_field else packing_prefix(self._prefix)
        return self._folder / token_files(own)[0].name

    def restore(self) -> bool:
        """Go back to the last commit; False if there is none, or what it committed is damaged."""
        try:
            commits = events(self._folder / _JOURNAL, "commit")
        except InputError:
            commits = []
        if not commits:
            return False
        self.progress = Progress(**commits[-1]["progress"])
        committed = commits[-1]["files"]
        return all(
            file.restore(committed[name], partial(self.tally.see, name))
            for name, file in self._files.items()
        )

    def add(self, batch: EncodedBatch) -> None:
        """Append a batch; every few seconds all of them are committed."""
        self._held.append(batch)
        # What is packed together must not depend on when that is.
        if not self.inputs.options.pack_to or len(self._held) == _PACKED_BATCHES:
            self._write_held()
            if time.monotonic() - self._since >= _COMMIT_SECONDS:
                self._commit()

    def finish(self, unreadable: Damage, spell: Callable[[Sequence[int]], list[str]]) -> Card:
        """Write what is left, the indices, and the card.

        Args:
            unreadable: records that never came to be rows.
            spell: ids → pieces of the vocabulary.
        Raises:
            InputError: there is not one document.
        """
        self._write_held()
        self._commit()
        damage = [*unreadable.first, *self.progress.damage]
        if not self.tally.rows:
            raise InputError(
                f"there is no document to write; the first damaged record: {damage[0]}"
                if damage
                else "there is no document to write: the sources hold no records"
            )
        fields = self._fields().items()
        files = [file for name, dtype in fields for file in self._finished(name, dtype)]
        card = Card(
            inputs=self.inputs,
            inputs_sha256=self.inputs.sha256(),
            counts=self._counts(unreadable.count),
            lengths=describe_lengths(self.tally.lengths),
            tokens=describe_tokens(self.tally.histogram, spell),
            packing=self._packing(),
            damage=tuple(damage[:_LISTED]),
            files=tuple(files),
            seconds=round(self.progress.seconds, 3),
            **made_now(),
        )
        write_json(_card_in(self._folder, self._prefix), card.model_dump(mode="json"))
        return card

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _write_held(self) -> None:
        progress, held = self.progress, self._held
        if any(len(batch.documents.lengths) for batch in held):
            self._append(joined([batch.documents for batch in held]))
        messages = [message for batch in held for message in batch.damage]
        progress.damaged += len(messages)
        progress.damage = [*progress.damage, *messages][:_LISTED]
        progress.batches += len(held)
        self._held = []

    def _commit(self) -> None:
        """Bring what is written to the disk; from here on an interrupted work goes on."""
        committed = {name: file.commit() for name, file in self._files.items()}
        now = time.monotonic()
        self.progress.seconds += now - self._since
        self._since = now
        self._journal.write("commit", progress=asdict(self.progress), files=committed)

    def _append(self, documents: Documents) -> None:
        options = self.inputs.options
        rows = arrange(
            documents,
            pack_to=options.pack_to,
            split_longer_than=options.split_longer_than,
            first_number=self.tally.documents,
        )
        self.progress.splits += rows.splits
        values: dict[str, Any] = {
            "input_ids": rows.ids,
            "labels": rows.labels,
            "rows": rows.lengths,
            "documents": documents.lengths,
            "packing": rows.pieces,
            "packing_lengths": rows.row_numbers,
        }
        for name, file in self._files.items():
            file.append(values[name])
            self.tally.see(name, values[name])

    def _finished(self, name: str, dtype: numpy.dtype) -> Iterator[TokenFile]:
        """A field's two files, both on the disk."""
        path = self._bin(name)
        if name == _MASK:
            _write_ones(path, dtype, self.tally.tokens)
            yield _described(path)
        else:
            yield TokenFile(name=path.name, **self._files[name].commit())
        index = path.with_suffix(".idx")
        lengths = self._files["packing_lengths" if name == "packing" else "rows"].path
        with lengths.open("rb") as file:
            write_index(index, file, dtype)
        yield _described(index)

    def _counts(self, unreadable: int) -> Counts:
        tally = self.tally
        return Counts(
            documents=tally.documents,
            rows=tally.rows,
            tokens=tally.tokens,
            trained_tokens=tally.tokens - tally.untrained,
            damaged=unreadable + self.progress.damaged,
            split=self.progress.splits,
        )

    def _packing(self) -> Packing | None:
        if not self.inputs.options.pack_to:
            return None
        room, tally = self.inputs.options.pack_to + 1, self.tally
        return Packing(
            row_tokens=room,
            efficiency=tally.tokens / (room * tally.rows),
            pieces=tally.pieces,
        )


@contextmanager
def corpus_writer(
    folder: Path, prefix: Path, inputs: Inputs, *, anew: bool = False
) -> Iterator[CorpusWriter]:
    """A writer that goes on where the same work was interrupted, unless `anew`.

    Args:
        folder: what `working_folder` gives.
    """
    begun = folder / _WORK
    work = {"inputs_sha256": inputs.sha256()}
    same = not anew and begun.exists() and read_json(begun) == work
    writer = CorpusWriter(folder, prefix, inputs) if same else None
    if writer is None or not writer.restore():
        if writer:
            writer.close()
        clear(folder)
        write_json(begun, work)
        writer = CorpusWriter(folder, prefix, inputs)
    try:
        yield writer
    finally:
        writer.close()


def finished_card(folder: Path, prefix: Path, inputs: Inputs) -> Card | None:
    """The card, if the same work was finished and only interrupted while its files were moved."""
    card = read_card(folder / prefix.name)
    return card if card and card.inputs_sha256 == inputs.sha256() else None


def _card_in(folder: Path, prefix: Path) -> Path:
    return card_path(folder / prefix.name)


def _write_ones(path: Path, dtype: numpy.dtype, count: int) -> None:
    with path.open("wb") as file:
        for start in range(0, count, _BLOCK):
            file.write(numpy.ones(min(_BLOCK, count - start), dtype).tobytes())


def _described(path: Path) -> TokenFile:
    """A file that is complete, once it is on the disk."""
    sync(path)
    return TokenFile(name=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))
