"""A document before it is tokens: spans of text or of ids, each trained or only read.

All text is literal: `<eoh>` in a record is five characters, never the id that ends a user's turn.
Ids come from handlers alone, so that no record can forge a turn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError

IGNORED = -100
"""Label of a token that is not trained, as in torch's cross entropy and Hugging Face's data."""


@dataclass(frozen=True)
class Span:
    """A piece of a document: text, or the ids of e.g. chat markers."""

    text: str = ""
    ids: tuple[int, ...] = ()
    trained: bool = True
    """False: the model reads it, but is not asked to write it; its labels are -100."""

    def __post_init__(self) -> None:
        if self.text and self.ids:
            raise InputError(f"a span is text or ids, not both: {self.text!r}, {self.ids}")


Encoded = tuple[list[int], list[int]]
"""Ids and labels of a document, equally many."""
Part = tuple[list[int], bool]
"""Ids of a part of a document, and whether they are trained."""


def encode_document(spans: Sequence[Span], tokenizer: Tokenizer, *, append_eod: bool) -> Encoded:
    """Ids and labels of one document; see `encode_parts`."""
    return encode_documents([spans], tokenizer, append_eod=append_eod)[0]


def encode_documents(
    documents: Sequence[Sequence[Span]],
    tokenizer: Tokenizer,
    *,
    append_eod: bool,
    num_threads: int = 1,
) -> list[Encoded]:
    """Ids and labels of documents; see `encode_parts`. A label is the id itself, or -100."""
    result = []
    for parts in encode_parts(documents, tokenizer, append_eod=append_eod, num_threads=num_threads):
        ids = [i for part, _ in parts for i in part]
        labels = [i if trained else IGNORED for part, trained in parts for i in part]
        result.append((ids, labels))
    return result


def encode_parts(
    documents: Sequence[Sequence[Span]],
    tokenizer: Tokenizer,
    *,
    append_eod: bool,
    num_threads: int = 1,
) -> list[list[Part]]:
    """Documents as ids, all their texts in one call of sentencepiece.

    `<s>` comes first, with append_eod `</s>` last. `</s>` is trained, `<s>`, which nothing
    precedes, is not.

    Neighbouring texts that are equally trained are encoded as one. Where a trained text follows one
    that is not, both are encoded by themselves: what the model is asked with at inference ends at
    the same place. (Tokens across that border, which the predecessor let happen and then masked by
    count, do not exist.)

    Args:
        documents: their spans, in order; what `Handler.document` returns.
        num_threads: of sentencepiece; the result does not depend on it.
    Raises:
        InputError: an id of a span is outside the vocabulary, or a text has no UTF-8 form.
    """
    documents = [list(_joined(spans)) for spans in documents]
    texts = [span.text for spans in documents for span in spans if span.text]
    encoded = iter(tokenizer.encode_batch(texts, literal=True, num_threads=num_threads))
    start: Part = ([tokenizer.bos_id], False)
    end: list[Part] = [([tokenizer.eos_id], True)] * append_eod
    return [
        [
            start,
            *(
                (next(encoded) if span.text else tokenizer.check_ids(span.ids), span.trained)
                for span in spans
            ),
            *end,
        ]
        for spans in documents
    ]


def span_text(spans: Sequence[Span], tokenizer: Tokenizer) -> str:
    """What a document looks like, its chat markers written out."""
    return "".join(span.text or tokenizer.decode(span.ids) for span in spans)


def _joined(spans: Sequence[Span]) -> Iterator[Span]:
    """The spans without empty ones; neighbouring texts that are equally trained are one."""
    open_texts: list[Span] = []
    for span in spans:
        if open_texts and (span.ids or span.trained != open_texts[0].trained):
            yield _join(open_texts)
            open_texts = []
        if span.ids:
            yield span
        elif span.text:
            open_texts.append(span)
    if open_texts:
        yield _join(open_texts)


def _join(texts: list[Span]) -> Span:
    if len(texts) == 1:
        return texts[0]
    return Span("".join(span.text for span in texts), trained=texts[0].trained)
