"""The first records are shown as they will be trained on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from internlm_lib.data.examples import examples, fitting_handler
from internlm_lib.data.handlers import handler
from internlm_lib.data.inputs import Options
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError
from tests.unit.data.trained_tokenizer import trained

RECORDS = [{"instruction": f"Add {n}.", "output": str(n)} for n in range(5)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("t"))


def write(folder: Path, records: Sequence[Any]) -> list[Path]:
    path = folder / "r.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [path]


def test_pieces_spell_the_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    sources = write(tmp_path, RECORDS)
    found = examples(sources, handler("alpaca_instruction", tokenizer), tokenizer)
    assert [example.where for example in found] == [f"{sources[0]}, line {n}" for n in (1, 2)]
    for example in found:
        assert (example.pieces[0], example.pieces[-1]) == ("<s>", "</s>")
        assert text_of(example.pieces[1:-1], tokenizer) == example.text
    pairs = zip(found[1].pieces, found[1].trained, strict=True)
    answer = [piece for piece, is_trained in pairs if is_trained]
    assert answer[-1] == "</s>" and text_of(answer[:-1], tokenizer) == "1\n"


def text_of(pieces: Sequence[str], tokenizer: Tokenizer) -> str:
    ids = [tokenizer.piece_id(piece) for piece in pieces]
    return tokenizer.decode([i for i in ids if i is not None])


def test_damaged_records_are_no_examples(tokenizer: Tokenizer, tmp_path: Path) -> None:
    sources = write(tmp_path, [{"instruction": "no output"}, *RECORDS])
    made = handler("alpaca", tokenizer)
    with pytest.raises(InputError, match="line 1: column 'output' is missing"):
        examples(sources, made, tokenizer)
    found = examples(sources, made, tokenizer, Options(on_damage="count"), count=1)
    assert [example.where for example in found] == [f"{sources[0]}, line 2"]


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"text": "a", "instruction": "b", "output": "c"}, "alpaca"),
        ({"text": "a", "id": 7}, "pretrain"),
        ({"messages": []}, "conversation"),
        ({"conversations": [], "id": 7}, "conversation"),
    ],
)
def test_a_handler_is_found_by_the_columns(tmp_path: Path, record: Any, name: str) -> None:
    assert fitting_handler(write(tmp_path, [record]), {}) == name


def test_columns_are_mapped_before_a_handler_is_looked_for(tmp_path: Path) -> None:
    sources = write(tmp_path, [{"question": "a", "output": "b"}])
    with pytest.raises(InputError, match="line 1: no handler is known for the columns question, o"):
        fitting_handler(sources, {})
    assert fitting_handler(sources, {"instruction": "question"}) == "alpaca"
