"""Records → token files and their card: in parallel, in order, resumable, and not twice.

The files depend on the sources, the handler, the tokenizer and the options; not on the number of
workers, nor on where the work was interrupted.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy
from numpy.typing import NDArray

from internlm_lib.data.card import Card, card_path, damaged_files, read_card
from internlm_lib.data.corpus import CorpusWriter, corpus_writer, finished_card
from internlm_lib.data.encoding import Encoder, batches, encode_all
from internlm_lib.data.files import source_files
from internlm_lib.data.handlers import Handler
from internlm_lib.data.indexed import corpus_files, field_prefix, sequence_lengths
from internlm_lib.data.inputs import DEFAULTS, Inputs, Options, describe_inputs
from internlm_lib.data.position import Position
from internlm_lib.data.records import Damage, read_rows
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.data.working_folder import publish, remove_working_folder, working_folder
from internlm_lib.errors import InputError

_BYTES_PER_PROCESS = 1 << 20
"""Of the sources; for fewer another process would hardly be started before all is done."""


@dataclass(frozen=True)
class Corpus:
    """Token files at a prefix, and how this call came by them."""

    prefix: Path
    card: Card
    unchanged: bool
    """They were there already, made of the same inputs."""
    resumed_documents: int
    """Written by an earlier call, which was interrupted."""
    resumed_tokens: int
    seconds: float
    """This call took."""

    @property
    def documents(self) -> int:
        return self.card.counts.documents

    @property
    def tokens(self) -> int:
        return self.card.counts.tokens

    def row_lengths(self) -> NDArray[numpy.int32]:
        """Tokens of every row of the files, special ones included."""
        return sequence_lengths(field_prefix(self.prefix, self.card.inputs.handler.kind))


@dataclass(frozen=True)
class Progress:
    """How far the work is."""

    documents: int
    tokens: int
    bytes_read: int
    """Of the sources' files, as they lie on the disk."""
    bytes_total: int


def preprocess(
    sources: Sequence[Path],
    prefix: Path,
    handler: Handler,
    tokenizer: Tokenizer,
    options: Options = DEFAULTS,
    *,
    workers: int = 1,
    force: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Corpus:
    """Write the token files of `indexed.corpus_files` and the card `<prefix>.json`.

    Args:
        sources: files, folders or globs; see `data.files`.
        workers: how many batches are encoded at a time, by threads and processes (see
            `encoding.encode_all`); this process also reads and writes.
        force: do it again though nothing has changed.
    Raises:
        InputError: sources, options or prefix cannot be used, or a record cannot, unless these are
            counted.
        KitError: the disk is full; the same call goes on from there. The prefix is as it was.
    """
    began = time.monotonic()
    files = source_files(sources)
    _check(files, prefix, handler, options)
    stamps = _stamps(files)
    inputs = describe_inputs(files, handler, tokenizer, options)
    if not force and (card := _unchanged(prefix, inputs)):
        remove_working_folder(prefix)
        return Corpus(prefix, card, True, 0, 0, time.monotonic() - began)
    encoder, before = Encoder(handler, tokenizer, options.append_eod, options.on_damage), (0, 0)
    with working_folder(prefix) as folder:
        finished = None if force else finished_card(folder, prefix, inputs)
        if finished is None:
            with corpus_writer(folder, prefix, inputs, anew=force) as writer:
                before = (writer.tally.documents, writer.tally.tokens)
                finished = _write(writer, files, encoder, workers, on_progress)
            if _stamps(files) != stamps:
                raise InputError("a source was changed while it was read; preprocess it again")
        publish(folder, prefix, finished)
    return Corpus(prefix, finished, False, *before, time.monotonic() - began)


def _write(
    writer: CorpusWriter,
    files: Sequence[Path],
    encoder: Encoder,
    workers: int,
    on_progress: Callable[[Progress], None] | None,
) -> Card:
    """Read, encode and append what is not written yet; finish the corpus."""
    options, unreadable, needed = writer.inputs.options, Damage(), _needed(encoder.handler)
    rows = read_rows(
        files,
        columns=options.columns,
        only=needed,
        on_damage=options.on_damage,
        damage=unreadable,
    )
    position = Position(files)
    source = islice(batches(rows, needed, position), writer.progress.batches, None)
    documents, tokens = writer.tally.documents, writer.tally.tokens
    most = 1 + position.total // _BYTES_PER_PROCESS
    for batch in encode_all(source, encoder, workers, most_processes=most):
        writer.add(batch)
        documents += len(batch.documents.lengths)
        tokens += len(batch.documents.ids)
        if on_progress:
            on_progress(Progress(documents, tokens, batch.position, position.total))
    if on_progress:
        on_progress(Progress(documents, tokens, position.total, position.total))
    return writer.finish(unreadable, encoder.tokenizer.pieces)


def _check(files: Sequence[Path], prefix: Path, handler: Handler, options: Options) -> None:
    if options.pack_to and handler.kind != "instruction":
        raise InputError(
            f"pack_to = {options.pack_to}: handler {handler.name!r} makes pre-training text, whose "
            "samples are cut from one long row in training anyway; leave it out"
        )
    if options.split_longer_than and handler.kind != "pretrain":
        raise InputError(
            f"split_longer_than = {options.split_longer_than}: handler {handler.name!r} makes "
            "instruction data; with pack_to its long documents are split, too"
        )
    if unknown := set(options.columns) - set(_needed(handler)):
        raise InputError(
            f"columns: handler {handler.name!r} reads {', '.join(_needed(handler))}, "
            f"not {', '.join(sorted(unknown))}"
        )
    targets = {p.resolve() for p in (*corpus_files(prefix, handler.kind), card_path(prefix))}
    for file in files:
        if file.resolve() in targets:
            raise InputError(f"{prefix}: would overwrite the source {file}; give another prefix")


def _needed(handler: Handler) -> tuple[str, ...]:
    return (*handler.columns, *handler.optional_columns)


def _unchanged(prefix: Path, inputs: Inputs) -> Card | None:
    """The card of the corpus at a prefix, if that is whole and made of the same inputs."""
    card = read_card(prefix)
    if card is None or card.inputs_sha256 != inputs.sha256() or damaged_files(prefix, card):
        return None
    return card


def _stamps(files: Sequence[Path]) -> list[tuple[int, int]]:
    return [(stat.st_size, stat.st_mtime_ns) for stat in map(Path.stat, files)]
