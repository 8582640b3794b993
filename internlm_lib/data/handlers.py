"""Handlers: what makes a document of a row, chosen by name.

`pretrain`: the text of a row. `alpaca`, `alpaca_predecessor`, `question_answer`: a record in a
template, all of it trained. `alpaca_instruction`: answers trained only. `conversation`: the chat
form of the tokenizer's generation, all answers trained; `conversation_legacy`: InternLM's with the
marker ids of its first SFT tool.

Handlers of your own are named `package.module:Class`, or by the name under which an installed
package offers them in the entry-point group `internlm_lib.handlers`. The class is called with the
tokenizer and is a `Handler`:

    class Letters:
        name, kind = "letters", "instruction"
        columns, optional_columns = ("question", "letter"), ()

        def __init__(self, tokenizer):
            pass

        def document(self, row):
            question, letter = text_of(row, "question"), text_of(row, "letter")  # of data.records
            return [Span(question + "\\nAnswer:", trained=False), Span(" " + letter)]
"""

import importlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol, get_args

from internlm_lib.data.chat import (
    CONVERSATION_COLUMNS,
    ChatForm,
    Message,
    chat_form,
    read_messages,
)
from internlm_lib.data.documents import Span, encode_document, encode_documents, span_text
from internlm_lib.data.indexed import Kind
from internlm_lib.data.prompts import TEMPLATES, Template
from internlm_lib.data.records import RecordError, Row, text_of
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError

__all__ = [
    "ENTRY_POINT_GROUP",
    "HANDLERS",
    "Handler",
    "Kind",
    "PromptingHandler",
    "Span",
    "encode_document",
    "encode_documents",
    "handler",
    "handler_names",
    "span_text",
]

ENTRY_POINT_GROUP = "internlm_lib.handlers"

_MEMBERS = ("name", "kind", "columns", "optional_columns", "document")


class Handler(Protocol):
    """Makes documents of rows. Travels to other processes, so it pickles."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Kind: ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns a row must have, by their canonical names."""

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Columns that are read where there are any."""

    def document(self, row: Row) -> Sequence[Span]:
        """Spans of one document, without `<s>` and `</s>`. Raises RecordError."""


class PromptingHandler(Handler, Protocol):
    """A handler that can also ask, as the built-in ones can."""

    def prompt_spans(self, instruction: str, input_text: str) -> Sequence[Span]:
        """A document up to where the answer begins, in the same tokens as in training."""

    def prompt(self, instruction: str, input_text: str) -> str:
        """The same as text, chat markers written out: for people."""


@dataclass(frozen=True)
class TextHandler:
    """General text: a row is a document."""

    name: str = "pretrain"
    kind: Kind = "pretrain"
    columns: tuple[str, ...] = ("text",)
    optional_columns: tuple[str, ...] = ()

    def document(self, row: Row) -> Sequence[Span]:
        """Raises RecordError also if the text is empty."""
        text = text_of(row, "text")
        if not text:
            raise RecordError(f"{row.where}: column 'text' is empty")
        return [Span(text)]

    def prompt_spans(self, instruction: str, input_text: str) -> Sequence[Span]:
        return [Span("\n".join(filter(None, (instruction, input_text))), trained=False)]

    def prompt(self, instruction: str, input_text: str) -> str:
        return self.prompt_spans(instruction, input_text)[0].text


@dataclass(frozen=True)
class TemplateHandler:
    """A record of Alpaca's columns in a template."""

    name: str
    template: Template
    kind: Kind = "pretrain"
    columns: tuple[str, ...] = ("instruction", "output")
    optional_columns: tuple[str, ...] = ("input",)

    def document(self, row: Row) -> Sequence[Span]:
        prompt = self.template.prompt(
            text_of(row, "instruction"), text_of(row, "input", optional=True)
        )
        answer = text_of(row, "output") + self.template.end
        if self.kind == "pretrain":
            return [Span(prompt + self.template.joint + answer)]
        return [Span(prompt + self.template.joint, trained=False), Span(answer)]

    def prompt_spans(self, instruction: str, input_text: str) -> Sequence[Span]:
        # Where labels are masked, `joint` is encoded with what comes before it, else with the
        # answer: a prompt ends where an own token begins in training.
        joint = self.template.joint if self.kind == "instruction" else ""
        return [Span(self.template.prompt(instruction, input_text) + joint, trained=False)]

    def prompt(self, instruction: str, input_text: str) -> str:
        return self.prompt_spans(instruction, input_text)[0].text


@dataclass(frozen=True)
class ConversationHandler:
    """Conversations in the chat form of the tokenizer's generation."""

    name: str
    form: ChatForm
    tokenizer: Tokenizer
    kind: Kind = "instruction"
    columns: tuple[str, ...] = ()
    optional_columns: tuple[str, ...] = CONVERSATION_COLUMNS

    def document(self, row: Row) -> Sequence[Span]:
        return self.form.document(read_messages(row))

    def prompt_spans(self, instruction: str, input_text: str) -> Sequence[Span]:
        text = "\n".join(filter(None, (instruction, input_text)))
        return self.form.prompt([Message("user", text)])

    def prompt(self, instruction: str, input_text: str) -> str:
        return span_text(self.prompt_spans(instruction, input_text), self.tokenizer)


HANDLERS: dict[str, Callable[[Tokenizer], PromptingHandler]] = {
    "pretrain": lambda _: TextHandler(),
    "alpaca": lambda _: TemplateHandler("alpaca", TEMPLATES["alpaca"]),
    "alpaca_predecessor": lambda _: TemplateHandler(
        "alpaca_predecessor", TEMPLATES["alpaca_predecessor"]
    ),
    "question_answer": lambda _: TemplateHandler("question_answer", TEMPLATES["question_answer"]),
    "alpaca_instruction": lambda _: TemplateHandler(
        "alpaca_instruction", TEMPLATES["alpaca_instruction"], kind="instruction"
    ),
    "conversation": lambda tokenizer: ConversationHandler(
        "conversation", chat_form(tokenizer), tokenizer
    ),
    "conversation_legacy": lambda tokenizer: ConversationHandler(
        "conversation_legacy", chat_form(tokenizer, legacy=True), tokenizer
    ),
}
"""The built-in handlers. A package's entry point of the same name is not looked at."""


def handler(name: str, tokenizer: Tokenizer) -> Handler:
    """The handler called `name`: a built-in one, `package.module:Class`, or an entry point.

    Raises InputError if there is none, it cannot be imported or made, or it is no `Handler`.
    """
    if name in HANDLERS:
        return HANDLERS[name](tokenizer)
    return _made(_class_of(name), name, tokenizer)


def handler_names() -> list[str]:
    """Names that `handler` knows: the built-in ones, then those of installed packages."""
    return list(
        dict.fromkeys([*HANDLERS, *(e.name for e in entry_points(group=ENTRY_POINT_GROUP))])
    )


def _class_of(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if not attribute:
        return _entry_point(name)
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise InputError(f"handler {name!r}: {module} has no {attribute}") from error
    except Exception as error:
        raise InputError(
            f"handler {name!r}: {module} cannot be imported: {type(error).__name__}: {error}; it "
            "must be installed in this environment, or lie in a folder that PYTHONPATH names"
        ) from error


def _entry_point(name: str) -> Any:
    found = list(entry_points(group=ENTRY_POINT_GROUP, name=name))
    if not found:
        raise InputError(
            f"handler {name!r}: allowed are {', '.join(handler_names())}, and one of your own as "
            "package.module:Class"
        )
    try:
        return found[0].load()
    except Exception as error:
        raise InputError(
            f"handler {name!r}: its entry point {found[0].value} cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


def _made(make: Any, name: str, tokenizer: Tokenizer) -> Handler:
    """The handler that a class of somebody else's makes, checked."""
    try:
        made = make(tokenizer)
        pickle.dumps(made)
    except Exception as error:
        raise InputError(
            f"handler {name!r}: cannot be made of a tokenizer and sent to another process: "
            f"{type(error).__name__}: {error}"
        ) from error
    if lacking := [member for member in _MEMBERS if not hasattr(made, member)]:
        raise InputError(f"handler {name!r}: lacks {', '.join(lacking)}")
    if isinstance(made.columns, str) or isinstance(made.optional_columns, str):
        raise InputError(f'handler {name!r}: columns are a tuple, ("text",) for a single one')
    if made.kind not in get_args(Kind):
        raise InputError(f"handler {name!r}: kind {made.kind!r} is none of {get_args(Kind)}")
    return made
