"""A sentencepiece model as a file: read, told from what is none, its chat markers handled.

Chat markers are pieces that sentencepiece takes out of a text before anything else (its type
"user defined"): `<eoh>` written by a user is the id that ends a user's turn. Hence two forms of a
model: as it is, and without markers, which makes ordinary pieces of all text.

The format is sentencepiece's own `sentencepiece_model.proto`, read with its own module.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm_lib.errors import InputError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_NORMAL, _USER_DEFINED, _UNUSED = 1, 4, 5
"""`ModelProto.SentencePiece.Type`. A piece of type unused is made of the pieces it merged."""

INTERNLM2_PIECES = 92544
_INTERNLM2_MARKERS = {
    92538: "<|plugin|>",
    92539: "<|interpreter|>",
    92540: "<|action_end|>",
    92541: "<|action_start|>",
    92542: "<|im_end|>",
    92543: "<|im_start|>",
}
"""InternLM/InternLM, chat/chat_format.md. The model file has placeholders (`[UNUSED_TOKEN_146]`) at
these ids, which InternLM2's tokenizer_config.json renames."""
_PLACEHOLDER = "[UNUSED_TOKEN_"

_NOT_A_MODEL = {
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` in its folder",
    b"<": "a web page (HTML or XML), perhaps a download's error message; download it again",
    b"{": "JSON, perhaps tokenizer.json, which is another format, or a download's error message",
}


def read_model(path: Path) -> Any:
    """The `ModelProto` of a file; InternLM2's with the names of its chat markers.

    Raises InputError if the file is no sentencepiece model, and says what it seems to be.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    if not path.is_file():
        raise InputError(f"{path}: no such tokenizer.model")
    pb2: Any = sentencepiece_model_pb2  # generated, its classes are not seen by type checkers
    content, model = path.read_bytes(), pb2.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        model.Clear()
    if not model.pieces:
        raise InputError(
            f"{path}: not a sentencepiece model, but {_what_it_seems(content)}; InternLM-7B's is "
            "the file tokenizer.model beside its weights"
        )
    if len(model.pieces) == INTERNLM2_PIECES:
        _name_markers(model)
    return model


def _name_markers(model: Any) -> None:
    for number, name in _INTERNLM2_MARKERS.items():
        piece = model.pieces[number]
        if piece.type != _NORMAL or piece.piece.startswith(_PLACEHOLDER):
            piece.piece, piece.type = name, _USER_DEFINED


def make_processor(model: Any, path: Path) -> "SentencePieceProcessor":
    """What encodes and decodes. Raises InputError, which names `path`, if the model is damaged."""
    import sentencepiece

    # InternLM's model has a piece for NUL, of which each load would warn.
    sentencepiece.set_min_log_level(2)
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    except RuntimeError as error:
        raise InputError(f"{path}: not a sentencepiece model that can be used: {error}") from error


def drop_markers(model: Any) -> bool:
    """Let no text become a chat marker; returns whether the model had any."""
    markers = [
        piece
        for piece in model.pieces
        if piece.type == _USER_DEFINED or piece.piece.startswith(_PLACEHOLDER)
    ]
    for piece in markers:
        piece.type = _UNUSED
    return bool(markers)


def append_markers(model: Any, markers: Sequence[str]) -> None:
    """Add chat markers behind all other pieces, where InternLM's model has its own."""
    for marker in markers:
        model.pieces.add(piece=marker, score=0.0, type=_USER_DEFINED)
    model.trainer_spec.vocab_size = len(model.pieces)


def _what_it_seems(content: bytes) -> str:
    start = content[:512].lstrip()
    for beginning, what in _NOT_A_MODEL.items():
        if start.startswith(beginning):
            return what
    return f"{len(content):,} bytes of something else, or a damaged file"
