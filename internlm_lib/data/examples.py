"""The first records as they will be trained on: what to look at before the work starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from internlm_lib.data.documents import IGNORED, encode_document, span_text
from internlm_lib.data.handlers import Handler
from internlm_lib.data.inputs import DEFAULTS, Options
from internlm_lib.data.records import Damage, Row, read_rows
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError

_BY_COLUMNS = (
    (("instruction", "output"), "alpaca"),
    (("messages",), "conversation"),
    (("conversations",), "conversation"),
    (("text",), "pretrain"),
)
"""Columns of a first row → name of the handler, the first that fits."""


@dataclass(frozen=True)
class Example:
    """A record as it is trained on."""

    where: str
    text: str
    pieces: tuple[str, ...]
    """Spelling of each token, special ones included."""
    trained: tuple[bool, ...]
    """Whether each token is predicted in training."""


def examples(
    sources: Sequence[Path],
    handler: Handler,
    tokenizer: Tokenizer,
    options: Options = DEFAULTS,
    *,
    count: int = 2,
) -> list[Example]:
    """The first records that can be used. Raises InputError as `preprocess` does."""
    found: list[Example] = []
    rows = read_rows(sources, columns=options.columns, on_damage=options.on_damage, damage=Damage())
    for row in rows:
        try:
            found.append(_example(row, handler, tokenizer, options.append_eod))
        except InputError:
            if options.on_damage == "stop":
                raise
        if len(found) == count:
            break
    return found


def fitting_handler(sources: Sequence[Path], columns: Mapping[str, str]) -> str:
    """Name of the built-in handler for such columns as the first record has.

    Args:
        columns: see `Options`.
    Raises:
        InputError: there is none.
    """
    for row in islice(read_rows(sources, columns=columns), 1):
        for needed, name in _BY_COLUMNS:
            if all(column in row.values for column in needed):
                return name
        raise InputError(
            f"{row.where}: no handler is known for the columns {', '.join(row.values)}; name one, "
            "and the columns that it reads, with --handler and --columns"
        )
    raise InputError(f"{sources[0]}: holds no records")


def _example(row: Row, handler: Handler, tokenizer: Tokenizer, append_eod: bool) -> Example:
    spans = handler.document(row)
    ids, labels = encode_document(spans, tokenizer, append_eod=append_eod)
    return Example(
        row.where,
        span_text(spans, tokenizer),
        tuple(tokenizer.pieces(ids)),
        tuple(label != IGNORED for label in labels),
    )
