"""Records → token files: each record is one document, `<s>` text `</s>`, streamed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from internlm_lib.data.indexed import indexed_writer
from internlm_lib.data.prompts import Template
from internlm_lib.data.records import Record
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError

_BATCH = 1024


@dataclass(frozen=True)
class Corpus:
    """Token files and what they hold."""

    prefix: Path
    """Files are `<prefix>.bin` and `<prefix>.idx`."""
    lengths: tuple[int, ...]
    """Tokens of each document, special ones included, in file order."""

    @property
    def documents(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def mean_length(self) -> float:
        return self.tokens / self.documents

    def samples(self, seq_length: int) -> int:
        """Training samples in one epoch: windows of seq_length tokens and the one that follows."""
        return (self.tokens - 1) // seq_length


def preprocess(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    prefix: Path,
    *,
    template: Template,
    append_eod: bool = True,
    workers: int = 1,
) -> Corpus:
    """Render, tokenise and write records as `<prefix>.bin` and `<prefix>.idx`.

    Args:
        append_eod: close every document with `</s>`.
        workers: threads that tokenise; the files do not depend on it.
    Raises:
        InputError: there are no records.
    """
    lengths: list[int] = []
    texts = (template.document(record) for record in records)
    with indexed_writer(prefix, tokenizer.vocab_size) as writer:
        for batch in _batches(texts):
            for ids in tokenizer.encode_batch(
                batch, add_bos=True, add_eos=append_eod, num_threads=workers
            ):
                writer.add_document(ids)
                lengths.append(len(ids))
        if not lengths:
            raise InputError(f"{prefix}: there are no records to write")
    return Corpus(prefix, tuple(lengths))


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(texts, _BATCH)):
        yield batch
