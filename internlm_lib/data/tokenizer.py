"""InternLM's tokenizer: a plain sentencepiece model, read as it is, or a small one trained alike.

InternLM's conventions: byte-pair pieces, text neither normalised nor given a leading space, bytes
for what has no piece, `<unk>` 0, `<s>` 1, `</s>` 2. `<s>` and `</s>` written out in a text are
ordinary text, as in sentencepiece itself; documents get them as ids.
"""

import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from internlm_lib.errors import InputError
from internlm_lib.files import atomic_path

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_LONGEST_TEXT_BYTES = 1 << 20
_SMALLEST_VOCABULARY = 3 + 256


class Tokenizer:
    """A `tokenizer.model` file. Adds no special tokens unless asked to."""

    def __init__(self, path: Path) -> None:
        """Raises InputError if `path` is not a sentencepiece model with `<s>` and `</s>`."""
        self.path = path
        if not path.is_file():
            raise InputError(f"{path}: no such tokenizer.model")
        if self._processor.bos_id() < 0 or self._processor.eos_id() < 0:
            raise InputError(f"{path}: this tokenizer has no <s> or no </s>; InternLM's has both")

    @cached_property
    def _processor(self) -> "SentencePieceProcessor":
        import sentencepiece

        # InternLM's model has a piece for NUL, of which each load would warn.
        sentencepiece.set_min_log_level(2)
        try:
            return sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{self.path}: not a sentencepiece model ({error}); InternLM-7B's is the file "
                "tokenizer.model beside its weights (a Git LFS pointer is not it)"
            ) from error

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def adds_leading_space(self) -> bool:
        """Whether a text is encoded as if it began with a space; InternLM's is not."""
        first: str = self._processor.encode("a", out_type=str)[0]
        return first.startswith("▁")

    @property
    def bos_id(self) -> int:
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        return self._processor.eos_id()

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Token ids of `text`."""
        return self._processor.encode(text, add_bos=add_bos, add_eos=add_eos)

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        add_bos: bool = False,
        add_eos: bool = False,
        num_threads: int = 1,
    ) -> list[list[int]]:
        """Token ids of each text; the same for any number of threads."""
        return self._processor.encode(
            list(texts), add_bos=add_bos, add_eos=add_eos, num_threads=num_threads
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens have none.

        Raises InputError for an id outside the vocabulary, e.g. of a padded embedding row.
        """
        ids = [int(i) for i in ids]
        if outside := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise InputError(
                f"token id {outside[0]} is not in [0, {self.vocab_size}) of {self.path}"
            )
        return self._processor.decode(ids)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Train a tokenizer with InternLM's conventions and write it to `path`.

    Args:
        texts: the corpus, one document each.
        vocab_size: number of pieces, among them 3 special ones and 256 bytes.
    Returns:
        The tokenizer; equal texts in equal order give an equal file.
    Raises:
        InputError: the corpus is too small for that many pieces, or `vocab_size` for the bytes.
    """
    import sentencepiece

    if vocab_size <= _SMALLEST_VOCABULARY:
        raise InputError(
            f"model.vocab_size = {vocab_size}: a tokenizer needs 3 special pieces and 256 bytes, "
            f"so choose more than {_SMALLEST_VOCABULARY}"
        )
    with atomic_path(path) as temporary:
        try:
            with temporary.open("wb") as file:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(texts),
                    model_writer=file,
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
    return Tokenizer(path)


def copy_tokenizer(source: Path, path: Path) -> Tokenizer:
    """Copy a given `tokenizer.model` to `path`. Raises InputError if it is not one."""
    Tokenizer(source)
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)
    return Tokenizer(path)
