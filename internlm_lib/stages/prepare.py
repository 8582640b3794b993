"""Stage 01: records → tokenizer → token files, and the questions of the evaluation.

Without `data.train_path` or `data.blend` the records are the pocket world's, which brings its own
questions.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any

from internlm_lib.data.chat import MARKERS
from internlm_lib.data.corpora import Corpora, Source, plan_corpora, record_corpora, sources_of
from internlm_lib.data.examples import Example, examples
from internlm_lib.data.files import source_files
from internlm_lib.data.handlers import Handler, handler
from internlm_lib.data.indexed import corpus_files, field_prefix, read_documents
from internlm_lib.data.inputs import Options
from internlm_lib.data.known_tokenizers import tokenizer_for
from internlm_lib.data.pocket import make_pocket_world, write_pocket_world
from internlm_lib.data.preprocess import Corpus, Progress, preprocess
from internlm_lib.data.questions import read_subjects
from internlm_lib.data.records import Damage, Row, read_rows
from internlm_lib.data.tokenizer import Tokenizer, copy_tokenizer, train_tokenizer
from internlm_lib.data.tokenizer_texts import text_handler, texts_to_train_on
from internlm_lib.data.usage import part_rows
from internlm_lib.errors import InputError
from internlm_lib.files import sha256_of
from internlm_lib.stages.stage import Stage

_SAMPLES = 4
_PROBE = "Question:  two blanks\n\nAnswer: 12"
_LONGEST_CELL = 240
"""Characters of a value that a table shows."""


@dataclass(frozen=True)
class Records:
    """The records of an experiment: read anew, one at a time, wherever they are needed."""

    sources: tuple[Source, ...]
    options: Options
    handler: str
    counts: tuple[int, ...]
    """Records of each source that could be read."""

    @property
    def count(self) -> int:
        return sum(self.counts)

    def rows(self) -> Iterator[Row]:
        for source in self.sources:
            yield from _read(source, self.options)


@dataclass(frozen=True)
class Questions:
    """The multiple-choice questions that stage 06 asks; none if `folder` is None."""

    folder: Path | None
    rows: tuple[dict[str, Any], ...]
    """One table row per subject."""

    @property
    def count(self) -> int:
        return sum(row["questions"] for row in self.rows)


@dataclass(frozen=True)
class Made:
    """The token files of all sources, in their order."""

    corpora: Corpora
    parts: tuple[Corpus, ...]

    @property
    def documents(self) -> int:
        return sum(part.documents for part in self.parts)

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    def lengths(self) -> Counter[int]:
        """Tokens per row of the files → number of rows."""
        counts = (Counter(part.row_lengths().tolist()) for part in self.parts)
        return reduce(Counter.__add__, counts)


def gather_records(stage: Stage) -> Records:
    """Make the pocket world, or read all records through once to check and count them.

    Raises InputError if a file is none of records, lacks what the handler reads, or, with
    `data.on_damage: stop`, holds a damaged record.
    """
    data, folder = stage.experiment.data, stage.folder
    shutil.rmtree(folder.questions, ignore_errors=True)  # an earlier execution's, maybe
    if not data.train_path and not data.blend:
        write_pocket_world(make_pocket_world(data.pocket_seed), folder.data)
    options = Options(append_eod=data.append_eod, on_damage=data.on_damage, columns=data.columns)
    sources = sources_of(data, folder)
    counts = tuple(sum(1 for _ in _read(source, options)) for source in sources)
    stage.tags({"data/records_sha256": _sha256_of_sources(sources)})
    return Records(tuple(sources), options, data.handler, counts)


def source_rows(records: Records) -> list[dict[str, Any]]:
    """What was read, one row per file; weights where there are several sources."""
    return [
        {
            "file": file.name,
            "MiB": file.stat().st_size / (1 << 20),
            "sha256": sha256_of(file)[:16],
            **({"weight of its source": source.weight} if len(records.sources) > 1 else {}),
        }
        for source in records.sources
        for file in source_files([source.path])
    ]


def record_rows(records: Records) -> list[dict[str, Any]]:
    """The first records, as table rows: of a built-in handler for text the columns it reads."""
    made = text_handler(records.handler)
    read = (*made.columns, *made.optional_columns) if made else ()
    return [
        {name: _shortened(value) for name, value in row.values.items() if not read or name in read}
        for row in islice(records.rows(), _SAMPLES)
    ]


def gather_questions(stage: Stage) -> Questions:
    """Check the layout of the questions: `evaluation.questions_path`'s, or the pocket world's.

    Raises InputError if a file is missing or a row is malformed.
    """
    given, data = stage.experiment.evaluation.questions_path, stage.experiment.data
    if given is None and (data.train_path or data.blend):
        return Questions(None, ())
    folder = stage.folder.root / given if given else stage.folder.questions
    subjects = read_subjects(folder)
    stage.tags({"data/questions_sha256": sha256_of(folder)})
    rows = [
        {
            "subject": subject.name,
            "exemplars": len(subject.dev),
            "questions": len(subject.test),
            "first question": subject.test[0].text,
            "answer": subject.test[0].answer_text,
        }
        for subject in subjects
    ]
    return Questions(folder, tuple(rows))


def make_tokenizer(stage: Stage, records: Records) -> Tokenizer:
    """Copy `data.tokenizer_model`, or train a tokenizer on the records' texts.

    Raises InputError if it is not the tokenizer of `model.preset`, or has more pieces than the
    model's embedding has rows.
    """
    model, target = stage.experiment.data.tokenizer_model, stage.folder.tokenizer
    rows, preset = stage.experiment.model.vocab_size, stage.experiment.model.preset
    if model is None:
        chats = records.handler == "conversation"
        texts = texts_to_train_on(records.rows(), records.handler, records.options.on_damage)
        tokenizer = train_tokenizer(texts, rows, target, markers=MARKERS if chats else ())
    else:
        given = tokenizer_for(stage.folder.root / model, vocab_size=rows, preset=preset)
        tokenizer = copy_tokenizer(given.path, target)
    stage.tags({"data/tokenizer_sha256": sha256_of(target)})
    return tokenizer


def tokenizer_rows(tokenizer: Tokenizer) -> list[dict[str, str]]:
    """What the tokenizer makes of a text with blanks and line breaks, as table rows."""
    ids = tokenizer.encode(_PROBE)
    return [
        {"tokenizer": "pieces", "value": f"{tokenizer.vocab_size:,}"},
        {"tokenizer": "<s>, </s>", "value": f"{tokenizer.bos_id}, {tokenizer.eos_id}"},
        {"tokenizer": "a text", "value": repr(_PROBE)},
        {"tokenizer": "its ids", "value": " ".join(map(str, ids))},
        {"tokenizer": "its ids as text", "value": repr(tokenizer.decode(ids))},
    ]


def show_examples(records: Records, tokenizer: Tokenizer) -> list[Example]:
    """The first documents as text and pieces, before the work starts.

    Raises InputError if there is no such handler, or a record is not one of its.
    """
    made = handler(records.handler, tokenizer)
    paths = [source.path for source in records.sources]
    return examples(paths, made, tokenizer, records.options, count=_SAMPLES)


def write_corpus(
    stage: Stage,
    records: Records,
    tokenizer: Tokenizer,
    show: Callable[[str], None] = lambda text: None,
) -> Made:
    """Tokenise the records into the run's token files, a corpus per source; does nothing where they
    are there and nothing has changed.

    Args:
        show: told how far the work is, in a line of text.
    """
    made, data = handler(records.handler, tokenizer), stage.experiment.data
    options = records.options
    if made.kind == "instruction" and data.pack:
        options = options.model_copy(update={"pack_to": stage.experiment.training.seq_length})
    corpora = plan_corpora(stage.folder, made.kind, records.sources)
    parts = [
        _write_part(source, prefix, made, tokenizer, options, show)
        for source, prefix in zip(records.sources, corpora.prefixes, strict=True)
    ]
    record_corpora(stage.folder, corpora)
    result = Made(corpora, tuple(parts))
    stage.tags({"data/bin_sha256": _joined(part.card.bin_sha256 for part in parts)})
    stage.metrics(
        {
            "data/documents": result.documents,
            "data/tokens": result.tokens,
            "data/trained_tokens": sum(part.card.counts.trained_tokens for part in parts),
            "data/damaged": sum(part.card.counts.damaged for part in parts),
        }
    )
    stage.artifact(*(_card_beside(stage, part) for part in parts))
    return result


def count_rows(stage: Stage, made: Made, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """What was made, one row per source's corpus; also written as `tables/corpus.csv`."""
    rows = [
        {
            "token files": part.prefix.name,
            "documents": part.documents,
            "left out as damaged": part.card.counts.damaged,
            "tokens": part.tokens,
            "tokens trained": part.card.counts.trained_tokens,
            "shortest document": part.card.lengths.shortest,
            "mean document": part.card.lengths.mean,
            "longest document": part.card.lengths.longest,
            "pieces used": f"{part.card.tokens.used_share:.1%} of {tokenizer.vocab_size:,}",
            "bytes per token": _bytes_per_token(part),
            "written": "before, unchanged" if part.unchanged else "now",
        }
        for part in made.parts
    ]
    stage.table("corpus", rows)
    return rows


def damage_rows(made: Made) -> list[dict[str, Any]]:
    """The first records that were left out and why, as table rows; a single row if none was."""
    messages = [message for part in made.parts for message in part.card.damage]
    return [{"left out": message} for message in messages or ["none"]]


def usage_rows(stage: Stage, made: Made) -> list[dict[str, Any]]:
    """What this experiment's parts hold and consume, one row per part; also `tables/usage.csv`."""
    rows = part_rows(made.corpora, stage.experiment.data, stage.experiment.training)
    stage.table("usage", rows)
    return rows


def draw_lengths(stage: Stage, made: Made) -> Path:
    """Draw the rows' lengths, with `tables/token_lengths.csv` beside; returns the PNG."""
    from internlm_lib.reporting.figures import length_histogram

    counts = made.lengths()
    stage.table(
        "token_lengths", [{"tokens": length, "rows": counts[length]} for length in sorted(counts)]
    )
    packed = any(part.card.packing for part in made.parts)
    figure = length_histogram(
        counts,
        seq_length=stage.experiment.training.seq_length,
        what="packed rows" if packed else "documents",
    )
    return stage.figure("token_lengths", figure)


def sample_documents(made: Made, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The first rows, read back from the token files, as table rows."""
    prefix = field_prefix(made.parts[0].prefix, made.corpora.kind)
    numbers = range(min(_SAMPLES, made.parts[0].card.counts.rows))
    return [
        {
            "row": number,
            "tokens": len(ids),
            "text": _shortened(tokenizer.decode(ids), 4 * _LONGEST_CELL),
            "first ids": " ".join(map(str, ids[:8])) + " …",
            "last id": ids[-1],
        }
        for number, ids in zip(numbers, read_documents(prefix, numbers), strict=True)
    ]


def check_corpus(stage: Stage, records: Records, made: Made, tokenizer: Tokenizer) -> str:
    """Read token files and records back and hold them against each other; says what was checked.

    Raises InputError if a document's tokens are not those of its record, or if the training part
    is shorter than one sample.
    """
    prefix, first = made.parts[0].prefix, show_examples(records, tokenizer)
    if made.parts[0].card.packing is None:
        rows = read_documents(field_prefix(prefix, made.corpora.kind), range(len(first)))
        for example, ids in zip(first, rows, strict=True):
            if tuple(tokenizer.pieces(ids)) != example.pieces:
                raise InputError(
                    f"{prefix}: the document of {example.where} is not that record's in tokens; "
                    "the files were changed: delete them, and run the stage again"
                )
    usage = part_rows(made.corpora, stage.experiment.data, stage.experiment.training)
    if usage[0]["samples per epoch"] == 0:
        raise InputError(
            f"training.seq_length = {stage.experiment.training.seq_length}: the training part has "
            f"{made.tokens} tokens, less than one sample and its next token; give more records or "
            "a shorter seq_length"
        )
    return (
        f"{len(first)} documents are their records' in tokens; {made.tokens:,} tokens, "
        f"{usage[0]['epochs']:.3g} epochs of the training part"
    )


def summarize(made: Made, tokenizer: Tokenizer, questions: Questions) -> dict[str, Any]:
    """The stage's result."""
    lengths = [part.card.lengths for part in made.parts]
    return {
        "documents": made.documents,
        "tokens": made.tokens,
        "mean_length": round(made.tokens / made.documents, 2),
        "max_length": max(length.longest for length in lengths),
        "damaged": sum(part.card.counts.damaged for part in made.parts),
        "vocab_size": tokenizer.vocab_size,
        "subjects": len(questions.rows),
        "questions": questions.count,
    }


def run(stage: Stage) -> dict[str, Any]:
    """All steps in order; returns the stage's result."""
    records = gather_records(stage)
    questions = gather_questions(stage)
    tokenizer = make_tokenizer(stage, records)
    show_examples(records, tokenizer)
    made = write_corpus(stage, records, tokenizer)
    count_rows(stage, made, tokenizer)
    usage_rows(stage, made)
    draw_lengths(stage, made)
    check_corpus(stage, records, made, tokenizer)
    return summarize(made, tokenizer, questions)


def _read(source: Source, options: Options) -> Iterator[Row]:
    """What can be read; what cannot is counted when it is written."""
    return read_rows(
        [source.path], columns=options.columns, on_damage=options.on_damage, damage=Damage()
    )


def _write_part(
    source: Source,
    prefix: Path,
    made: Handler,
    tokenizer: Tokenizer,
    options: Options,
    show: Callable[[str], None],
) -> Corpus:
    def tell(progress: Progress) -> None:
        share = progress.bytes_read / max(1, progress.bytes_total)
        show(f"{prefix.name}: {progress.documents:,} documents, {share:.0%} read")

    return preprocess(
        [source.path], prefix, made, tokenizer, options,
        workers=os.cpu_count() or 1, on_progress=tell,
    )  # fmt: skip


def _sha256_of_sources(sources: Sequence[Source]) -> str:
    """Of one source what it always was, its file's or folder's own; of several all together."""
    return _joined(sha256_of(file) for source in sources for file in source_files([source.path]))


def _joined(hashes: Iterator[str]) -> str:
    """One hash is itself; several are hashed together."""
    import hashlib

    found = list(hashes)
    if len(found) == 1:
        return found[0]
    return hashlib.sha256("".join(found).encode()).hexdigest()


def _card_beside(stage: Stage, part: Corpus) -> Path:
    """The dataset card's copy in the report."""
    from internlm_lib.data.card import card_path

    target = stage.folder.tables / f"{part.prefix.name}_card.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(card_path(part.prefix), target)
    return target


def _bytes_per_token(part: Corpus) -> int:
    ids = corpus_files(part.prefix, part.card.inputs.handler.kind)[0]
    return ids.stat().st_size // part.tokens


def _shortened(value: Any, limit: int = _LONGEST_CELL) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text):,} characters)"
