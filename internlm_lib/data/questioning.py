"""What a model is asked: a record up to its answer, in the same text as in training."""

from dataclasses import dataclass
from itertools import takewhile

from internlm_lib.data.documents import span_text
from internlm_lib.data.handlers import Handler
from internlm_lib.data.records import Row, text_of
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError

_WORDS = 12
"""Of a text without question and answer, how many the model is given."""


@dataclass(frozen=True)
class Prompt:
    """A question put to the model."""

    question: str
    """As it is shown."""
    text: str
    """The same as in training, up to where the answer begins."""
    expected: str | None
    """The record's own answer; None for a prompt of `generation.prompts`."""


def given_prompt(handler: Handler, text: str) -> Prompt:
    """A prompt that a person wrote. Raises InputError if the handler cannot ask."""
    ask = getattr(handler, "prompt", None)
    if ask is None:
        raise InputError(
            f"generation.prompts: data.handler = {handler.name!r} has no method prompt(instruction,"
            " input_text) that says how it asks; add it, or leave generation.prompts empty"
        )
    return Prompt(text, ask(text, ""), None)


def prompt_of(handler: Handler, row: Row, tokenizer: Tokenizer) -> Prompt:
    """The question of a record, and its answer: of an instruction its output, of a conversation its
    first answer, of a text what follows its first words.

    Raises RecordError if the record cannot be used.
    """
    if handler.kind == "pretrain" and "instruction" in handler.columns:
        instruction, given = text_of(row, "instruction"), text_of(row, "input", optional=True)
        question = "\n".join(filter(None, (instruction, given)))
        text: str = handler.prompt(instruction, given)  # type: ignore[attr-defined]
        return Prompt(question, text, text_of(row, "output"))
    spans = list(handler.document(row))
    if handler.kind == "instruction":
        asked = list(takewhile(lambda span: not span.trained, spans))
        answer = list(takewhile(lambda span: span.trained, spans[len(asked) :]))
        text = span_text(asked, tokenizer)
        return Prompt(text, text, "".join(span.text for span in answer))
    words = span_text(spans, tokenizer).split(" ")
    beginning, rest = " ".join(words[:_WORDS]), " ".join(words[_WORDS:])
    return Prompt(beginning, beginning, f" {rest}" if rest else "")
