"""InternLM's tokenizer: a plain sentencepiece model, read as it is, or a small one trained alike.

InternLM's conventions: byte-pair pieces, text neither normalised nor given a leading space, bytes
for what has no piece, `<unk>` 0, `<s>` 1, `</s>` 2, which also pads. `<s>` and `</s>` written out
in a text are ordinary text, as in sentencepiece itself; documents get them as ids. Chat markers
written out (`<eoh>`) are the markers, unless a text is encoded as `literal`.

Ids are sentencepiece's, but for one character: U+2581 (▁), with which sentencepiece marks a blank
and of which it would make one, is encoded by its bytes, so that decoding gives every text back.
"""

import io
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from internlm_lib.data.sentencepiece_model import (
    append_markers,
    drop_markers,
    make_processor,
    read_model,
)
from internlm_lib.errors import InputError
from internlm_lib.files import atomic_path

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_LONGEST_TEXT_BYTES = 1 << 20
_SMALLEST_VOCABULARY = 3 + 256
_BLANK = "▁"


class Tokenizer:
    """A `tokenizer.model` file. Adds no special tokens unless asked to.

    It travels to other processes as its path, and opens the file anew there.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError if `path` is not a sentencepiece model with `<s>` and `</s>`."""
        self.path = path
        if self._processor.bos_id() < 0 or self._processor.eos_id() < 0:
            raise InputError(f"{path}: this tokenizer has no <s> or no </s>; InternLM's has both")

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[Path]]:
        return Tokenizer, (self.path,)

    @cached_property
    def _processor(self) -> "SentencePieceProcessor":
        return make_processor(read_model(self.path), self.path)

    @cached_property
    def _literal_processor(self) -> "SentencePieceProcessor":
        model = read_model(self.path)
        return make_processor(model, self.path) if drop_markers(model) else self._processor

    @cached_property
    def _bytes(self) -> dict[int, int]:
        """Byte of each id that stands for one."""
        ids = [self.piece_id(f"<0x{byte:02X}>") for byte in range(256)]
        return {i: byte for byte, i in enumerate(ids) if i is not None}

    @cached_property
    def _blank_ids(self) -> list[int]:
        """U+2581 by its bytes; empty where it cannot be had so."""
        ids = {byte: i for i, byte in self._bytes.items()}
        if self.adds_leading_space or len(ids) < 256:
            return []
        return [ids[byte] for byte in _BLANK.encode()]

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def adds_leading_space(self) -> bool:
        """Whether a text is encoded as if it began with a space; InternLM's is not."""
        first: str = self._processor.encode("a", out_type=str)[0]
        return first.startswith(_BLANK)

    @property
    def unk_id(self) -> int:
        return self._processor.unk_id()

    @property
    def bos_id(self) -> int:
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        return self._processor.eos_id()

    @property
    def pad_id(self) -> int:
        """What fills rows up: the model's own, else `</s>`, as InternLM's tokenizer class does."""
        own: int = self._processor.pad_id()
        return own if own >= 0 else self.eos_id

    def piece_id(self, piece: str) -> int | None:
        """Id of a piece, e.g. `<eoh>` or the byte `<0x0A>`; None if there is no such piece."""
        i: int = self._processor.piece_to_id(piece)
        return i if self._processor.id_to_piece(i) == piece else None

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """How the model spells each id: `▁world`, `<0x0A>`. Raises InputError as `decode` does."""
        return self._processor.id_to_piece(self.check_ids(ids))

    def encode(
        self, text: str, *, add_bos: bool = False, add_eos: bool = False, literal: bool = False
    ) -> list[int]:
        """Token ids of `text`.

        Args:
            literal: chat markers written out in the text are text like any other.
        Raises:
            InputError: the text has no UTF-8 form, i.e. holds half a surrogate pair.
        """
        processor = self._literal_processor if literal else self._processor
        if _BLANK in text and self._blank_ids:
            parts = processor.encode(text.split(_BLANK))
            ids = chain(parts[0], *([*self._blank_ids, *part] for part in parts[1:]))
            return [*[self.bos_id] * add_bos, *ids, *[self.eos_id] * add_eos]
        try:
            return processor.encode(text, add_bos=add_bos, add_eos=add_eos)
        except RuntimeError:
            _check_encodable(text)
            raise

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        add_bos: bool = False,
        add_eos: bool = False,
        literal: bool = False,
        num_threads: int = 1,
    ) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them; the same for any number of threads."""
        processor = self._literal_processor if literal else self._processor
        try:
            encoded: list[list[int]] = processor.encode(
                list(texts), add_bos=add_bos, add_eos=add_eos, num_threads=num_threads
            )
        except TypeError:
            _check_encodable(*texts)
            raise
        for number, text in enumerate(texts):
            if _BLANK in text:
                encoded[number] = self.encode(
                    text, add_bos=add_bos, add_eos=add_eos, literal=literal
                )
        return encoded

    def check_ids(self, ids: Sequence[int]) -> list[int]:
        """The ids, all in the vocabulary; raises InputError if not, e.g. for a padded row's."""
        ids = [int(i) for i in ids]
        if outside := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise InputError(
                f"token id {outside[0]} is not in [0, {self.vocab_size}) of {self.path}"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; `<s>` and `</s>` have none, chat markers are written out.

        Raises InputError for an id outside the vocabulary.
        """
        return self._processor.decode(self.check_ids(ids))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text while its ids come, never cut inside a character; joined, it is what `decode` gives.

        Raises InputError as `decode` does.
        """
        before: list[int] = []
        pending: list[int] = []
        for i in ids:
            pending.append(i)
            if not self._ends_inside_a_character(pending):
                yield self._continuation(before, pending)
                before, pending = pending, []
        yield self._continuation(before, pending)

    def _continuation(self, before: list[int], ids: list[int]) -> str:
        """What `ids` add to the text: alone, they might lose a leading space."""
        return self.decode(before + ids)[len(self.decode(before)) :]

    def _ends_inside_a_character(self, ids: list[int]) -> bool:
        start = len(ids)
        while start and ids[start - 1] in self._bytes:
            start -= 1
        try:
            bytes(self._bytes[i] for i in ids[start:]).decode()
        except UnicodeDecodeError:
            return True
        return False


def _check_encodable(*texts: str) -> None:
    """Raises InputError if a text has no UTF-8 form: JSON can hold half a surrogate pair."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"not text: half a surrogate pair, U+{ord(text[error.start]):04X}, at character "
                f"{error.start}"
            ) from error


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, path: Path, *, markers: Sequence[str] = ()
) -> Tokenizer:
    """Train a tokenizer with InternLM's conventions and write it to `path`.

    Args:
        texts: the corpus, one document each.
        vocab_size: number of pieces, among them 3 special ones, 256 bytes and the markers.
        markers: chat markers, e.g. `<eoh>` and `<eoa>`, for the last ids.
    Returns:
        The tokenizer; equal texts in equal order give an equal file.
    Raises:
        InputError: the corpus is too small for that many pieces, or `vocab_size` for the bytes.
    """
    smallest = _SMALLEST_VOCABULARY + len(markers)
    if vocab_size <= smallest:
        raise InputError(
            f"model.vocab_size = {vocab_size}: a tokenizer needs 3 special pieces, 256 bytes and "
            f"{len(markers)} chat markers, so choose more than {smallest}"
        )
    with atomic_path(path) as temporary:
        temporary.write_bytes(_train(texts, vocab_size - len(markers)))
        if markers:
            model = read_model(temporary)
            append_markers(model, markers)
            temporary.write_bytes(model.SerializeToString())
    return Tokenizer(path)


def _train(texts: Iterable[str], vocab_size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9999,
            max_sentence_length=_LONGEST_TEXT_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(
            f"no tokenizer of model.vocab_size = {vocab_size} pieces can be trained on this "
            f"corpus: {error}; give more records, a smaller model.vocab_size, or a "
            "data.tokenizer_model"
        ) from error
    return model.getvalue()


def copy_tokenizer(source: Path, path: Path) -> Tokenizer:
    """Copy a given `tokenizer.model` to `path`. Raises InputError if it is not one."""
    Tokenizer(source)
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)
    return Tokenizer(path)
