"""`internlm preprocess`: one JSON object on stdout, what is going to be done on stderr."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from internlm_lib.cli import app
from internlm_lib.data.card import read_card
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.files import sha256_of
from tests.unit.data.trained_tokenizer import trained

RECORDS = [{"instruction": f"Add {n}.", "output": str(n)} for n in range(600)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("t"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def preprocess(source: Path, tokenizer: Path, prefix: Path, *options: str) -> Result:
    arguments = [str(source), "--tokenizer", str(tokenizer), "--output-prefix", str(prefix)]
    return CliRunner().invoke(app, ["preprocess", *arguments, *options])


def test_json_tells_what_was_made(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    result = preprocess(source, tokenizer.path, tmp_path / "c", "--json")
    assert result.exit_code == 0, result.stderr
    made = json.loads(result.stdout)
    card = read_card(tmp_path / "c")
    assert card is not None and card.inputs.handler.name == made["handler"] == "alpaca"
    assert made["documents"] == len(RECORDS) == card.counts.documents
    assert made["tokens"] == card.counts.tokens
    assert made["bin_sha256"] == sha256_of(tmp_path / "c.bin")
    assert made["output"] == str(tmp_path / "c")
    assert made["documents_per_second"] == pytest.approx(600 / made["seconds"], rel=0.1)
    assert made["tokens_per_second"] > made["documents_per_second"] > 0
    assert made["unchanged"] is False


def test_a_second_call_says_that_nothing_was_to_be_done(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first = json.loads(preprocess(source, tokenizer.path, tmp_path / "c", "--json").stdout)
    again = json.loads(preprocess(source, tokenizer.path, tmp_path / "c", "--json").stdout)
    assert again["unchanged"] is True and again["documents_per_second"] == 0
    assert again["bin_sha256"] == first["bin_sha256"]
    forced = preprocess(source, tokenizer.path, tmp_path / "c", "--json", "--force")
    assert json.loads(forced.stdout)["unchanged"] is False


def test_any_number_of_workers_gives_the_same_file(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    hashes = {
        json.loads(
            preprocess(source, tokenizer.path, tmp_path / n, "--json", "--workers", n).stdout
        )["bin_sha256"]
        for n in ("1", "2", "5")
    }
    assert len(hashes) == 1


def test_the_first_records_are_shown(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tokenizer.path.parent
    result = preprocess(source, folder, tmp_path / "c", "--handler", "question_answer")
    assert "records.jsonl, line 1, handler question_answer" in result.stderr
    assert "Question: Add 0.\nAnswer: 0" in result.stderr
    assert "<s>|" in result.stderr and "|</s>" in result.stderr and "\\n|" in result.stderr


def test_options_reach_the_files(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source.write_text(source.read_text().replace('"instruction"', '"question"'))
    result = preprocess(
        source, tokenizer.path, tmp_path / "c", "--json", "--handler", "alpaca_instruction",
        "--columns", "instruction=question", "--pack-to", "1024", "--dtype", "int32",
        "--no-append-eod", "--on-damage", "count",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    card = read_card(tmp_path / "c")
    assert card is not None
    assert card.inputs.options.model_dump() == {
        "append_eod": False, "dtype": "int32", "on_damage": "count",
        "columns": {"instruction": "question"}, "pack_to": 1024, "split_longer_than": None,
    }  # fmt: skip
    made = json.loads(result.stdout)
    assert made["rows"] < made["documents"] and 0.8 < made["packing_efficiency"] <= 1
    assert (tmp_path / "c_packed_input_ids_document.bin").stat().st_size == 4 * made["tokens"]
    assert made["trained_tokens"] < made["tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--columns", "question"), "--columns 'question': give pairs like instruction=question"),
        (("--dtype", "int16"), "dtype = 'int16': Input should be 'smallest' or 'int32'"),
        (("--handler", "alpaka"), "handler 'alpaka': allowed are"),
        (("--workers", "0"), "Invalid value for '--workers'"),
        (("--pack-to", "64"), "pack_to = 64: handler 'alpaca' makes pre-training text"),
    ],
)
def test_bad_options_are_bad_input(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = preprocess(source, tokenizer.path, tmp_path / "c", *options)
    assert result.exit_code == 2 and message in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "c.json").exists()
