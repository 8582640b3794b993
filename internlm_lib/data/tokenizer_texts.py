"""What a tokenizer is trained on: the texts that a handler makes, before there is a tokenizer."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from internlm_lib.data.handlers import HANDLERS, Handler
from internlm_lib.data.records import OnDamage, RecordError, Row
from internlm_lib.errors import InputError


def text_handler(name: str) -> Handler | None:
    """The built-in handler of this name, if it makes text, so that it needs no tokenizer."""
    if name not in HANDLERS or name.startswith("conversation"):
        return None
    return HANDLERS[name](None)  # type: ignore[arg-type]


def texts_to_train_on(
    rows: Iterable[Row], handler: str, on_damage: OnDamage = "stop"
) -> Iterator[str]:
    """Documents as text; of conversations, whose markers are ids, all texts of the records.

    Raises InputError for a handler of somebody else's, which is made with a tokenizer.
    """
    if handler not in HANDLERS:
        raise InputError(
            f"data.handler = {handler!r} is made with a tokenizer, so that none can be trained on "
            "what it makes; give data.tokenizer_model"
        )
    made = text_handler(handler)
    if made is None:
        return (text for row in rows for text in _strings(row.values))
    return _documents(rows, made, on_damage)


def _documents(rows: Iterable[Row], made: Handler, on_damage: OnDamage) -> Iterator[str]:
    for row in rows:
        try:
            yield "".join(span.text for span in made.document(row))
        except RecordError:  # counted when it is written
            if on_damage == "stop":
                raise


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _strings(part)
