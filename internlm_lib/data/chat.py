r"""Conversations: from ShareGPT's and OpenAI's JSON to the spans of InternLM's chat forms.

InternLM (modeling_internlm.py of internlm-chat-7b, `build_inputs`; the system block as in lmdeploy
and xtuner), with `<eoh>` 103027 and `<eoa>` 103028:

    <|System|>:…\n<|User|>:…<eoh>\n<|Bot|>:…<eoa>\n<|User|>:…

The legacy form is that of InternLM's first tools/alpaca_tokenizer.py, which gave the markers the
ids 103167 and 103166 (pieces that are unused elsewhere), each followed by the byte 13 as a line
break, trained after an answer. A model tuned with one form does not know the other's markers.

InternLM2 (InternLM/InternLM, chat/chat_format.md), with ids 92543 and 92542; roles for tools are
not rendered:

    <|im_start|>system\n…<|im_end|>\n<|im_start|>user\n…<|im_end|>\n<|im_start|>assistant\n…<|im_end|>\n

`<|User|>:` is ordinary text in InternLM's form, and a message may hold it; the markers it may not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Any

from internlm_lib.data.documents import Span
from internlm_lib.data.records import RecordError, Row
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError

MARKERS = ("<eoh>", "<eoa>")
"""What ends a user's and an assistant's turn: for a tokenizer that is to be trained."""
CONVERSATION_COLUMNS = ("conversations", "messages")
_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
}
"""What data sets call the roles."""


@dataclass(frozen=True)
class Message:
    role: str
    """`system`, `user` or `assistant`."""
    text: str


@dataclass(frozen=True)
class Turn:
    """What stands around a role's text."""

    opening: tuple[Span, ...]
    closing: tuple[Span, ...]


@dataclass(frozen=True)
class ChatForm:
    """How messages become a document; made by `chat_form`."""

    system: Turn
    user: Turn
    assistant: Turn

    def document(self, messages: Sequence[Message]) -> list[Span]:
        """Spans of a conversation: the assistant's texts and the markers that end them trained."""
        return [span for message in messages for span in self._turn(message)]

    def prompt(self, messages: Sequence[Message]) -> list[Span]:
        """Spans of a conversation that the assistant is to continue."""
        return [*self.document(messages), *self.assistant.opening]

    def _turn(self, message: Message) -> list[Span]:
        turn: Turn = getattr(self, message.role)
        text = Span(message.text, trained=message.role == "assistant")
        return [*turn.opening, text, *turn.closing]


def chat_form(tokenizer: Tokenizer, *, legacy: bool = False) -> ChatForm:
    """The form of the tokenizer's generation, known by its chat markers.

    Args:
        legacy: InternLM's with the ids of its first SFT tool.
    Raises:
        InputError: the tokenizer has no such markers.
    """
    if legacy:
        eoh, eoa, line = _ids(tokenizer, "<TOKENS_UNUSED_140>", "<TOKENS_UNUSED_139>", "<0x0A>")
        after_user, after_bot = (_marker(eoh, line),), (_marker(eoa, line, trained=True),)
        return _internlm(after_user, after_bot)
    if tokenizer.piece_id("<|im_start|>") is not None:
        return _internlm2(*_ids(tokenizer, "<|im_start|>", "<|im_end|>"))
    eoh, eoa = _ids(tokenizer, *MARKERS)
    line_break = _read("\n")
    return _internlm((_marker(eoh), line_break), (_marker(eoa, trained=True), line_break))


def _internlm(after_user: tuple[Span, ...], after_bot: tuple[Span, ...]) -> ChatForm:
    return ChatForm(
        system=Turn((_read("<|System|>:"),), (_read("\n"),)),
        user=Turn((_read("<|User|>:"),), after_user),
        assistant=Turn((_read("<|Bot|>:"),), after_bot),
    )


def _internlm2(start: int, end: int) -> ChatForm:
    def turn(role: str) -> Turn:
        ending = _marker(end, trained=role == "assistant")
        return Turn((_marker(start), _read(f"{role}\n")), (ending, _read("\n")))

    return ChatForm(turn("system"), turn("user"), turn("assistant"))


def _read(text: str) -> Span:
    return Span(text, trained=False)


def _marker(*ids: int, trained: bool = False) -> Span:
    return Span(ids=ids, trained=trained)


def _ids(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    ids = {piece: tokenizer.piece_id(piece) for piece in pieces}
    if missing := [piece for piece, i in ids.items() if i is None]:
        raise InputError(
            f"{tokenizer.path}: has no chat marker {missing[0]}; conversations need InternLM's or "
            f"InternLM2's tokenizer.model, or one trained with the markers {' and '.join(MARKERS)}"
        )
    return [i for i in ids.values() if i is not None]


def read_messages(row: Row) -> list[Message]:
    """The conversation of a row: user and assistant in turn, perhaps after a system message.

    Raises RecordError if the row holds none, or one that cannot be trained on; it names the turn.
    """
    messages = [
        _message(turn, f"{row.where}: {column}, turn {number}")
        for column, turns in [_turns(row)]
        for number, turn in enumerate(turns, start=1)
    ]
    talk = messages[1:] if messages[0].role == "system" else messages
    expected = ["user", "assistant"] * (len(talk) // 2 + 1)
    for number, (message, role) in enumerate(zip(talk, expected, strict=False)):
        if message.role != role:
            turn = len(messages) - len(talk) + number + 1
            raise RecordError(
                f"{row.where}: turn {turn} is the {message.role}'s, where the {role}'s is due; a "
                "conversation is user and assistant in turn, after at most one system message"
            )
    if not talk or talk[-1].role != "assistant":
        raise RecordError(
            f"{row.where}: the conversation does not end with an answer of the assistant's"
        )
    return messages


def _turns(row: Row) -> tuple[str, Sequence[Any]]:
    """The one filled column of a conversation, and its turns."""
    filled = [name for name in CONVERSATION_COLUMNS if row.values.get(name) is not None]
    if len(filled) != 1:
        found = " and ".join(filled) or "none (columns: " + ", ".join(row.values) + ")"
        raise RecordError(
            f"{row.where}: expected one of the columns {' and '.join(CONVERSATION_COLUMNS)}, "
            f"found {found}"
        )
    turns = row.values[filled[0]]
    if isinstance(turns, str) or not isinstance(turns, Sequence) or not turns:
        raise RecordError(
            f"{row.where}: column {filled[0]!r} = {short_repr(turns)} is no list of turns"
        )
    return filled[0], turns


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RecordError(f"{where}: expected an object, found {type(turn).__name__}")
    keys = next((keys for keys in _KEYS if turn.get(keys[0]) is not None), None)
    if keys is None:
        raise RecordError(f"{where}: has neither 'role' nor 'from'; found {', '.join(turn)}")
    role, text = (turn.get(key) for key in keys)
    if not isinstance(role, str) or role not in _ROLES:
        raise RecordError(f"{where}: role {role!r} is not rendered; known are {', '.join(_ROLES)}")
    if not isinstance(text, str) or not text.strip():
        raise RecordError(f"{where}: {keys[1]!r} = {short_repr(text)} is no text")
    return Message(_ROLES[role], text)
