"""The tokenizers of InternLM's generations, and whether a file is the one that a model needs.

A wrong tokenizer raises no error later: a model trains on any ids that its embedding has rows for.
So the number of pieces, the ids of the special tokens and a few encodings are checked beforehand.
Byte equality is not asked for: the file has been published more than once.
"""

from dataclasses import dataclass
from pathlib import Path

from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError
from internlm_lib.files import sha256_of


@dataclass(frozen=True)
class KnownTokenizer:
    """A published `tokenizer.model`."""

    name: str
    pieces: int
    sha256: str
    golden: tuple[tuple[str, tuple[int, ...]], ...]
    """Texts and their ids."""


INTERNLM = KnownTokenizer(
    "InternLM's",
    pieces=103168,
    # InternLM/InternLM, tools/V7_sft.model, with which the ids were made; that the file beside the
    # weights on Hugging Face has the same bytes is expected, not confirmed.
    sha256="aab622d98c98677a1a51f969e25765154487bf3e85c7819db105db2fcacba83f",
    golden=(
        ("Hello world", (9843, 2028)),
        (" Hello world", (22190, 2028)),
        ("\n\n", (402,)),
        ("12345", (4575, 1889)),
        ("今天天气晴朗适合出门散步", (67577, 69095, 63010, 61770, 67783, 69301, 74732)),
        ("<eoh><eoa>", (103027, 103028)),
    ),
)
INTERNLM2 = KnownTokenizer(
    "InternLM2's",
    pieces=92544,
    # tokenizer.model of internlm/internlm2-step-prover, as public projects pin it; not checked
    # here against the file, nor whether all InternLM2 models have the same one.
    sha256="f868398fc4e05ee1e8aeba95ddf18ddcc45b8bce55d5093bead5bbf80429b48b",
    # InternLM/InternLM, chat/chat_format.md, for the markers. The words between them as public
    # dumps of tokenised InternLM2 chats have them (fine-tuning scripts of three repositories).
    golden=(
        ("<|im_start|>user\n", (92543, 1008, 364)),
        ("<|im_start|>assistant\n", (92543, 525, 11353, 364)),
        ("<|im_end|>\n", (92542, 364)),
    ),
)
KNOWN = {known.pieces: known for known in (INTERNLM, INTERNLM2)}

_NAMES = {known.sha256: known.name for known in KNOWN.values()} | {
    # LLaMA 1 and 2, the same file for both; named by many public manifests
    "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347": "LLaMA's",
}


def tokenizer_for(path: Path, *, vocab_size: int, preset: str | None = None) -> Tokenizer:
    """The tokenizer at `path`, which is one that a model with that embedding can be trained with.

    Args:
        vocab_size: the model's; 103168 and 92544 are InternLM's and InternLM2's, and ask for their
            tokenizers. Other models take any that has not more pieces.
        preset: name of the model's shape, for the message.
    Raises:
        InputError: the file is no tokenizer or another model's; the message says what was found
            and what is needed.
    """
    tokenizer = Tokenizer(path)
    known = KNOWN.get(vocab_size)
    problem = _misfit(tokenizer, vocab_size, known)
    if problem is None:
        return tokenizer
    found = sha256_of(path)
    model = f"model.vocab_size = {vocab_size}" + (f", model.preset = {preset}" if preset else "")
    raise InputError(
        f"{path}: {problem}. The file is {_NAMES.get(found, 'unknown')} (SHA-256 {found}); the "
        f"model ({model}) needs {_need(vocab_size, known)}; give that, or set model.vocab_size to "
        "what your tokenizer needs"
    )


def _misfit(tokenizer: Tokenizer, vocab_size: int, known: KnownTokenizer | None) -> str | None:
    """Why the tokenizer cannot be the model's, if it cannot."""
    pieces = tokenizer.vocab_size
    if pieces > vocab_size:
        return f"has {pieces} pieces, but the model's embedding only {vocab_size} rows"
    if known and pieces != known.pieces:
        return f"has {pieces} pieces, not the {known.pieces} of {known.name} tokenizer"
    ids = (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id)
    if ids != (0, 1, 2):
        return f"<unk>, <s> and </s> have the ids {ids}, not (0, 1, 2) as in InternLM's models"
    return _wrong_encoding(tokenizer, known) if known else None


def _wrong_encoding(tokenizer: Tokenizer, known: KnownTokenizer) -> str | None:
    for text, golden in known.golden:
        if (encoded := tokenizer.encode(text)) != list(golden):
            return (
                f"encodes {text!r} as {encoded}, {known.name} tokenizer as {list(golden)}: another "
                "tokenizer of the same size, or a changed file"
            )
    return None


def _need(vocab_size: int, known: KnownTokenizer | None) -> str:
    if known:
        return f"{known.name} tokenizer.model of {known.pieces} pieces (SHA-256 {known.sha256})"
    return f"a tokenizer of at most {vocab_size} pieces"
