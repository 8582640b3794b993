"""Stage 01: records → tokenizer → token files, and the questions of the evaluation.

Without `data.train_path` the records are the pocket world's, which brings its own questions.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from internlm_lib.data.indexed import read_documents, token_files
from internlm_lib.data.known_tokenizers import tokenizer_for
from internlm_lib.data.pocket import make_pocket_world, write_pocket_world
from internlm_lib.data.preprocess import Corpus, preprocess
from internlm_lib.data.prompts import Template, template
from internlm_lib.data.questions import read_subjects
from internlm_lib.data.records import Record, read_records
from internlm_lib.data.tokenizer import Tokenizer, copy_tokenizer, train_tokenizer
from internlm_lib.errors import InputError
from internlm_lib.files import sha256_of
from internlm_lib.stages.stage import Stage

_SAMPLES = 4
_PROBE = "Question:  two blanks\n\nAnswer: 12"


@dataclass(frozen=True)
class Records:
    """The records of an experiment: read anew, one at a time, wherever they are needed."""

    path: Path
    template: Template
    count: int
    with_input: int

    def __iter__(self) -> Iterator[Record]:
        return read_records(self.path)

    def documents(self) -> Iterator[str]:
        """The text of each record, as it is trained on."""
        return map(self.template.document, self)


@dataclass(frozen=True)
class Questions:
    """The multiple-choice questions that stage 06 asks; none if `folder` is None."""

    folder: Path | None
    rows: tuple[dict[str, Any], ...]
    """One table row per subject."""

    @property
    def count(self) -> int:
        return sum(row["questions"] for row in self.rows)


def gather_records(stage: Stage) -> Records:
    """Make the pocket world, or read `data.train_path` through once to check it.

    Raises InputError if the file is not one of Alpaca-schema records.
    """
    data, folder = stage.experiment.data, stage.folder
    shutil.rmtree(folder.questions, ignore_errors=True)  # an earlier execution's, maybe
    if data.train_path is None:
        write_pocket_world(make_pocket_world(data.pocket_seed), folder.data)
        path = folder.data / "records.parquet"
    else:
        path = folder.root / data.train_path
    inputs = Counter(bool(record.input) for record in read_records(path))
    stage.tags({"data/records_sha256": sha256_of(path)})
    return Records(path, template(data.prompt_template), inputs.total(), inputs[True])


def record_rows(records: Records) -> list[dict[str, Any]]:
    """The first records, as table rows."""
    return [asdict(record) for record in islice(records, _SAMPLES)]


def gather_questions(stage: Stage) -> Questions:
    """Check the layout of the questions: `evaluation.questions_path`'s, or the pocket world's.

    Raises InputError if a file is missing or a row is malformed.
    """
    given = stage.experiment.evaluation.questions_path
    if given is None and stage.experiment.data.train_path is not None:
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
    """Copy `data.tokenizer_model`, or train a tokenizer on the records' documents.

    Raises InputError if it is not the one that the model needs.
    """
    given, target = stage.experiment.data.tokenizer_model, stage.folder.tokenizer
    model = stage.experiment.model
    if given is None:
        tokenizer = train_tokenizer(records.documents(), model.vocab_size, target)
    else:
        source = stage.folder.root / given
        tokenizer_for(source, vocab_size=model.vocab_size, preset=model.preset)
        tokenizer = copy_tokenizer(source, target)
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


def write_corpus(stage: Stage, records: Records, tokenizer: Tokenizer) -> Corpus:
    """Tokenise the records into the run's token files."""
    corpus = preprocess(
        records,
        tokenizer,
        stage.folder.corpus_prefix,
        template=records.template,
        append_eod=stage.experiment.data.append_eod,
        workers=os.cpu_count() or 1,
    )
    bin_path, idx_path = token_files(corpus.prefix)
    stage.tags({"data/bin_sha256": sha256_of(bin_path), "data/idx_sha256": sha256_of(idx_path)})
    numbers = ("documents", "tokens", "mean_length")
    stage.metrics({f"data/{name}": getattr(corpus, name) for name in numbers})
    return corpus


def count_rows(
    stage: Stage, records: Records, corpus: Corpus, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """What was made, as table rows; also written as `tables/corpus.csv`."""
    samples = corpus.samples(stage.experiment.training.seq_length)
    bin_path, _ = token_files(corpus.prefix)
    rows = [
        {"quantity": "documents", "value": corpus.documents},
        {"quantity": "documents with an input", "value": records.with_input},
        {"quantity": "tokens", "value": corpus.tokens},
        {"quantity": "shortest document (tokens)", "value": min(corpus.lengths)},
        {"quantity": "mean document (tokens)", "value": corpus.mean_length},
        {"quantity": "longest document (tokens)", "value": max(corpus.lengths)},
        {"quantity": "tokenizer's pieces", "value": tokenizer.vocab_size},
        {"quantity": "samples of seq_length tokens in one epoch", "value": samples},
        {"quantity": "bytes per token on disk", "value": bin_path.stat().st_size // corpus.tokens},
    ]
    stage.table("corpus", rows)
    return rows


def draw_lengths(stage: Stage, corpus: Corpus) -> Path:
    """Draw the documents' lengths, with `tables/token_lengths.csv` beside; returns the PNG."""
    from internlm_lib.reporting.figures import length_histogram

    counts = sorted(Counter(corpus.lengths).items())
    rows = [{"tokens": length, "documents": number} for length, number in counts]
    stage.table("token_lengths", rows)
    seq_length = stage.experiment.training.seq_length
    figure = length_histogram(corpus.lengths, seq_length=seq_length)
    return stage.figure("token_lengths", figure)


def sample_documents(stage: Stage, corpus: Corpus, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The first documents, read back from the token files, as table rows."""
    numbers = range(min(_SAMPLES, corpus.documents))
    return [
        {
            "document": number,
            "tokens": len(ids),
            "text": tokenizer.decode(ids),
            "first ids": " ".join(map(str, ids[:8])) + " …",
            "last id": ids[-1],
        }
        for number, ids in zip(numbers, read_documents(corpus.prefix, numbers), strict=True)
    ]


def check_corpus(stage: Stage, records: Records, corpus: Corpus, tokenizer: Tokenizer) -> str:
    """Read token files and records back and hold them against each other; says what was checked.

    Raises InputError if a document does not decode to its record's text, has not `<s>` and `</s>`
    at its ends, or if the corpus is shorter than one training sample.
    """
    ends = [tokenizer.eos_id] if stage.experiment.data.append_eod else []
    texts = list(islice(records.documents(), _SAMPLES))
    for number, ids in enumerate(read_documents(corpus.prefix, range(len(texts)))):
        body = ids[1 : len(ids) - len(ends)]
        whole = ids[0] == tokenizer.bos_id and ids[len(ids) - len(ends) :] == ends
        if not whole or tokenizer.decode(body) != texts[number]:
            raise InputError(
                f"{corpus.prefix}.bin: document {number} is not its record's text between special "
                "tokens; the files were changed, or the tokenizer loses text: use InternLM's"
            )
    seq_length = stage.experiment.training.seq_length
    if corpus.samples(seq_length) == 0:
        raise InputError(
            f"training.seq_length = {seq_length}: the corpus has only {corpus.tokens} tokens, less "
            "than one sample and its next token; give more records or a shorter seq_length"
        )
    return f"{len(texts)} documents read back equal their records; {corpus.tokens:,} tokens"


def summarize(corpus: Corpus, tokenizer: Tokenizer, questions: Questions) -> dict[str, Any]:
    """The stage's result."""
    return {
        "documents": corpus.documents,
        "tokens": corpus.tokens,
        "mean_length": round(corpus.mean_length, 2),
        "max_length": max(corpus.lengths),
        "vocab_size": tokenizer.vocab_size,
        "subjects": len(questions.rows),
        "questions": questions.count,
    }


def run(stage: Stage) -> dict[str, Any]:
    """All steps in order; returns the stage's result."""
    records = gather_records(stage)
    questions = gather_questions(stage)
    tokenizer = make_tokenizer(stage, records)
    corpus = write_corpus(stage, records, tokenizer)
    count_rows(stage, records, corpus, tokenizer)
    draw_lengths(stage, corpus)
    check_corpus(stage, records, corpus, tokenizer)
    return summarize(corpus, tokenizer, questions)
