"""All that decides the bytes of token files, written down: with equal inputs they are equal."""

import hashlib
import inspect
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from internlm_lib.data.handlers import Handler
from internlm_lib.data.indexed import DtypeChoice, Kind
from internlm_lib.data.records import OnDamage
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError
from internlm_lib.files import sha256_of, sha256_of_json

_HASHING_THREADS = 4


class Part(BaseModel):
    """Base of a card's parts: unknown keys are errors, values never change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Options(Part):
    """How documents become rows of tokens."""

    append_eod: bool = True
    """Close every document with `</s>`."""
    dtype: DtypeChoice = "smallest"
    """Of the token ids: the smallest that holds the vocabulary, or AscendSpeed's int32."""
    on_damage: OnDamage = "stop"
    """At a record that cannot be used: stop, or leave it out and count it."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Canonical name of a column → its name in the files."""
    pack_to: int | None = Field(None, ge=1)
    """Instruction data: pack documents into rows that train at most so many tokens, i.e. the
    seq_length of the training; a row holds one token more."""
    split_longer_than: int | None = Field(None, ge=1)
    """Pre-training text: cut documents of more tokens."""


DEFAULTS = Options()


class SourceFile(Part):
    path: str
    bytes: int
    sha256: str


class HandlerCard(Part):
    name: str
    kind: Kind
    sha256: str
    """Of the source file it is defined in."""


class TokenizerCard(Part):
    path: str
    sha256: str
    vocab_size: int


class Inputs(Part):
    """All that decides the bytes of the token files, and where it lay."""

    sources: tuple[SourceFile, ...]
    handler: HandlerCard
    tokenizer: TokenizerCard
    options: Options
    code_sha256: str
    """Of the kit's own code that reads, encodes and writes."""
    sentencepiece: str
    """Version of the library."""

    def sha256(self) -> str:
        """Of everything but paths: data that were moved are the same data."""
        values = self.model_dump(
            mode="json", exclude={"sources": {"__all__": {"path"}}, "tokenizer": {"path"}}
        )
        return sha256_of_json(values)


def options_of(**values: Any) -> Options:
    """Options from values as a user gives them. Raises InputError."""
    try:
        return Options(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        raise InputError(f"{name} = {problem['input']!r}: {problem['msg']}") from error


def describe_inputs(
    files: Sequence[Path], handler: Handler, tokenizer: Tokenizer, options: Options
) -> Inputs:
    """The inputs as they are now; the files are read whole, to hash them."""
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        hashes = list(threads.map(sha256_of, files))
    return Inputs(
        sources=tuple(
            SourceFile(path=str(file), bytes=file.stat().st_size, sha256=sha256)
            for file, sha256 in zip(files, hashes, strict=True)
        ),
        handler=HandlerCard(name=handler.name, kind=handler.kind, sha256=_code_of(handler)),
        tokenizer=TokenizerCard(
            path=str(tokenizer.path),
            sha256=sha256_of(tokenizer.path),
            vocab_size=tokenizer.vocab_size,
        ),
        options=options,
        code_sha256=_own_code(),
        sentencepiece=metadata.version("sentencepiece"),
    )


def _code_of(handler: Handler) -> str:
    """Hash of the file that a handler is defined in."""
    try:
        return sha256_of(Path(inspect.getfile(type(handler))))
    except (TypeError, OSError):  # typed into a notebook: never known to be the same as before
        return secrets.token_hex(32)


def _own_code() -> str:
    """Hash of this room's modules."""
    digest = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.name.encode() + b"\0" + module.read_bytes())
    return digest.hexdigest()
