"""The dataset card `<prefix>.json`: what token files were made of, how, and what they hold.

It is written after all other files of a corpus and removed before any of them is replaced: where a
card stands, the files beside it are whole and its own.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy
from numpy.typing import NDArray
from pydantic import ValidationError

from internlm_lib import provenance
from internlm_lib.data.inputs import Inputs, Part
from internlm_lib.errors import InputError
from internlm_lib.files import sha256_of

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_TOP_TOKENS = 50


class Counts(Part):
    documents: int
    rows: int
    """Sequences in the token files: documents, after splitting and packing."""
    tokens: int
    """In the token files; with packing, one more for every cut of a document."""
    trained_tokens: int
    """Those with a label, as far as a row's first token can have one."""
    damaged: int
    """Records that were left out."""
    split: int
    """Documents that were cut."""


class Lengths(Part):
    """Tokens per document, special ones included, before splitting and packing."""

    shortest: int
    mean: float
    longest: int
    quantiles: dict[str, int]


class TokenCount(Part):
    id: int
    piece: str
    count: int


class Tokens(Part):
    """Which pieces of the vocabulary occur."""

    used: int
    used_share: float
    """Of the tokenizer's pieces."""
    most_frequent: tuple[TokenCount, ...]


class Packing(Part):
    """Rows of several documents.

    `<prefix>_packing.bin` and `.idx` hold three numbers for each piece of each row: of which
    document, from which of its tokens on, how many.
    """

    row_tokens: int
    """Room of a row: pack_to and the token that is predicted last."""
    pieces: int
    """Documents, or parts of long ones, in all rows."""
    efficiency: float
    """Share of the rows' room that is filled; the rest is padded in training."""


class TokenFile(Part):
    name: str
    bytes: int
    sha256: str


class Card(Part):
    format: Literal[1] = 1
    inputs: Inputs
    inputs_sha256: str
    seed: None = None
    """Nothing is drawn at random: documents stand in the order of the sources."""
    counts: Counts
    lengths: Lengths
    tokens: Tokens
    packing: Packing | None
    damage: tuple[str, ...]
    """The first damaged records, with file and position."""
    files: tuple[TokenFile, ...]
    versions: dict[str, Any]
    created: str
    """UTC."""
    seconds: float
    """Working time, interruptions left out."""

    @property
    def bin_sha256(self) -> str:
        """Of the file of token ids."""
        return self.files[0].sha256

    def samples(self, seq_length: int) -> int:
        """Training samples in one epoch: rows of instruction data; of pre-training text, windows of
        seq_length tokens and the one that follows."""
        if self.inputs.handler.kind == "instruction":
            return self.counts.rows
        return (self.counts.tokens - 1) // seq_length


def card_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")


def read_card(prefix: Path) -> Card | None:
    """The card of the corpus at a prefix; None if it has none.

    Raises InputError if the file there is not a card that this kit understands.
    """
    path = card_path(prefix)
    if not path.is_file():
        return None
    try:
        return Card.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(
            f"{path}: not a dataset card of this version of the kit ({error.error_count()} "
            f"problems, e.g. {error.errors()[0]['msg']}); preprocess again with --force, or give "
            "another prefix"
        ) from error


def damaged_files(prefix: Path, card: Card) -> list[str]:
    """Names of the corpus's files that are not, or not any more, those of the card."""
    return [
        file.name
        for file in card.files
        if not (path := prefix.with_name(file.name)).is_file()
        or path.stat().st_size != file.bytes
        or sha256_of(path) != file.sha256
    ]


def describe_lengths(counts: Mapping[int, int]) -> Lengths:
    """Args: length → number of documents, at least one."""
    lengths = numpy.array(sorted(counts))
    numbers = numpy.array([counts[length] for length in lengths.tolist()])
    reached = numbers.cumsum()
    # The smallest length that no more than the rest of the documents exceed.
    found = lengths[numpy.searchsorted(reached, numpy.array(QUANTILES) * reached[-1])]
    return Lengths(
        shortest=lengths[0],
        mean=(lengths * numbers).sum() / reached[-1],
        longest=lengths[-1],
        quantiles={f"{q:g}": length for q, length in zip(QUANTILES, found.tolist(), strict=True)},
    )


def describe_tokens(
    histogram: NDArray[numpy.int64], spell: Callable[[Sequence[int]], list[str]]
) -> Tokens:
    """Args: occurrences of each id; ids → pieces."""
    used = int((histogram > 0).sum())
    top = numpy.argsort(-histogram, kind="stable")[: min(_TOP_TOKENS, used)].tolist()
    return Tokens(
        used=used,
        used_share=used / len(histogram),
        most_frequent=tuple(
            TokenCount(id=i, piece=piece, count=histogram[i])
            for i, piece in zip(top, spell(top), strict=True)
        ),
    )


def made_now() -> dict[str, Any]:
    """The fields `versions` and `created`."""
    return {
        "versions": provenance.software(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
