"""The dataset card: what it says, and that it is only believed while it holds."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from internlm_lib.data.card import (
    Card,
    card_path,
    damaged_files,
    describe_lengths,
    describe_tokens,
    read_card,
)
from internlm_lib.data.inputs import Inputs, Options, options_of
from internlm_lib.errors import InputError
from internlm_lib.files import sha256_of, write_json

INPUTS = {
    "sources": [{"path": "/a/x.jsonl", "bytes": 7, "sha256": "aa"}],
    "handler": {"name": "alpaca", "kind": "pretrain", "sha256": "bb"},
    "tokenizer": {"path": "/t/tokenizer.model", "sha256": "cc", "vocab_size": 300},
    "options": Options().model_dump(),
    "code_sha256": "dd",
    "sentencepiece": "0.2.1",
}


def card_values(prefix: Path) -> dict[str, Any]:
    """A card of the two files at a prefix, which are written."""
    files = [prefix.with_name(f"{prefix.name}.{suffix}") for suffix in ("bin", "idx")]
    for file in files:
        file.write_bytes(b"content of " + file.name.encode())
    return {
        "inputs": INPUTS,
        "inputs_sha256": Inputs.model_validate(INPUTS).sha256(),
        "counts": {"documents": 3, "rows": 3, "tokens": 18, "trained_tokens": 18, "damaged": 0,
                   "split": 0},
        "lengths": describe_lengths({5: 2, 8: 1}).model_dump(),
        "tokens": {"used": 0, "used_share": 0.0, "most_frequent": []},
        "packing": None,
        "damage": [],
        "files": [
            {"name": f.name, "bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in files
        ],
        "versions": {"python": "3.11"},
        "created": "2025-01-01T00:00:00+00:00",
        "seconds": 1.5,
    }  # fmt: skip


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    prefix = tmp_path / "alpaca.v1"
    write_json(card_path(prefix), card_values(prefix))
    return prefix


def read(prefix: Path) -> Card:
    card = read_card(prefix)
    assert card is not None
    return card


def test_a_card_is_read_as_it_was_written(prefix: Path) -> None:
    assert card_path(prefix).name == "alpaca.v1.json"
    card = read(prefix)
    assert card.counts.tokens == 18 and card.inputs.options == Options()
    assert card.bin_sha256 == sha256_of(prefix.with_name("alpaca.v1.bin"))
    assert json.loads(card_path(prefix).read_text()).items() <= card.model_dump(mode="json").items()


def test_no_card_is_none(tmp_path: Path) -> None:
    assert read_card(tmp_path / "nothing") is None


@pytest.mark.parametrize("text", ["{}", "[1, 2]", "no JSON", '{"format": 2}'])
def test_another_file_is_no_card(prefix: Path, text: str) -> None:
    card_path(prefix).write_text(text)
    with pytest.raises(InputError, match=r"alpaca.v1.json: not a dataset card"):
        read_card(prefix)


def test_an_unknown_key_is_an_error(prefix: Path) -> None:
    write_json(card_path(prefix), {**card_values(prefix), "rows": 3})
    with pytest.raises(InputError, match="Extra inputs"):
        read_card(prefix)


def test_files_that_changed_are_named(prefix: Path) -> None:
    card = read(prefix)
    assert damaged_files(prefix, card) == []
    bin_path = prefix.with_name("alpaca.v1.bin")
    bin_path.write_bytes(bin_path.read_bytes().swapcase())
    assert damaged_files(prefix, card) == ["alpaca.v1.bin"]
    prefix.with_name("alpaca.v1.idx").unlink()
    assert damaged_files(prefix, card) == ["alpaca.v1.bin", "alpaca.v1.idx"]


def changed(path: tuple[Any, ...], value: Any) -> str:
    """Hash of `INPUTS` with one value changed."""
    values = json.loads(json.dumps(INPUTS))
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return Inputs.model_validate(values).sha256()


@pytest.mark.parametrize(
    "path",
    [("sources", 0, "sha256"), ("handler", "name"), ("handler", "sha256"), ("code_sha256",),
     ("tokenizer", "sha256"), ("sentencepiece",)],
)  # fmt: skip
def test_what_decides_the_bytes_is_hashed(path: tuple[Any, ...]) -> None:
    assert changed(path, "other") != Inputs.model_validate(INPUTS).sha256()


@pytest.mark.parametrize(
    ("option", "value"),
    [("append_eod", False), ("dtype", "int32"), ("pack_to", 9), ("split_longer_than", 9),
     ("columns", {"instruction": "question"}), ("on_damage", "count")],
)  # fmt: skip
def test_every_option_is_hashed(option: str, value: Any) -> None:
    assert changed(("options", option), value) != Inputs.model_validate(INPUTS).sha256()
    assert set(Options.model_fields) == set(INPUTS["options"])  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [("sources", 0, "path"), ("tokenizer", "path")])
def test_where_things_lay_is_not_hashed(path: tuple[Any, ...]) -> None:
    assert changed(path, "/elsewhere") == Inputs.model_validate(INPUTS).sha256()


def test_bad_options_are_bad_input() -> None:
    assert options_of(pack_to=8).pack_to == 8
    with pytest.raises(InputError, match="dtype = 'int16': Input should be 'smallest' or 'int32'"):
        options_of(dtype="int16")
    with pytest.raises(InputError, match="pack_to = 0: "):
        options_of(pack_to=0)


def test_samples_are_rows_or_windows(prefix: Path) -> None:
    card = read(prefix)
    assert [card.samples(n) for n in (17, 18)] == [1, 0]
    values = card_values(prefix)
    values["inputs"] = {**INPUTS, "handler": {**INPUTS["handler"], "kind": "instruction"}}
    assert Card.model_validate(values).samples(17) == 3


def test_lengths_are_numpys_quantiles() -> None:
    lengths = numpy.random.RandomState(3).lognormal(4, 1, 999).astype(int) + 1
    values, numbers = numpy.unique(lengths, return_counts=True)
    found = describe_lengths(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    assert (found.shortest, found.longest) == (lengths.min(), lengths.max())
    assert found.mean == pytest.approx(lengths.mean())
    for q, length in found.quantiles.items():
        assert length == numpy.quantile(lengths, float(q), method="inverted_cdf")


def test_tokens_are_counted_by_frequency_then_id() -> None:
    histogram = numpy.array([0, 4, 9, 0, 9, 1])
    found = describe_tokens(histogram, lambda ids: [f"<{i}>" for i in ids])
    assert (found.used, found.used_share) == (4, 4 / 6)
    assert [(t.id, t.piece, t.count) for t in found.most_frequent] == [
        (2, "<2>", 9), (4, "<4>", 9), (1, "<1>", 4), (5, "<5>", 1),
    ]  # fmt: skip
