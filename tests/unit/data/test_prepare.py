"""Stage 01, from parameters to files, on the pocket world and on given records."""

import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from internlm_lib.data.corpora import recorded_corpora
from internlm_lib.data.indexed import read_documents
from internlm_lib.data.questions import read_subjects
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError
from internlm_lib.files import sha256_of
from internlm_lib.journal import events
from internlm_lib.stages import prepare
from internlm_lib.stages.stage import Stage, open_stage


@pytest.fixture(autouse=True)
def no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """These stages are not to be mirrored into MLflow."""
    monkeypatch.setenv("INTERNLM_TAIL", "t")


def stage_of(home: Path, overrides: dict[str, Any] | None = None) -> Stage:
    """The stage with the settings of `params/tiny.yaml` but for `overrides`."""
    return open_stage("01_prepare", {"run_name": "t", "overrides": overrides or {}}, root=home)


@pytest.fixture
def records_file(home: Path) -> Path:
    rows = [
        {"instruction": f"Say the number {n} in words please.", "input": "", "output": f"no. {n}"}
        for n in range(400)
    ]
    path = home / "mine.json"
    path.write_text(json.dumps(rows))
    return path


def test_pocket_world_is_prepared_whole(home: Path) -> None:
    stage = stage_of(home)
    result = prepare.run(stage)
    folder = stage.folder
    assert result["vocab_size"] == 512 and result["subjects"] == 6 and result["questions"] == 240
    assert result["mean_length"] == pytest.approx(result["tokens"] / result["documents"], abs=0.01)

    tags = {k: v for event in events(folder.journal, "tags") for k, v in event["values"].items()}
    assert tags["data/bin_sha256"] == sha256_of(folder.data / "train_text_document.bin")
    assert tags["data/tokenizer_sha256"] == sha256_of(folder.tokenizer)
    assert tags["data/questions_sha256"] == sha256_of(folder.questions)

    counts = pandas.read_csv(folder.tables / "token_lengths.csv")
    assert counts.rows.sum() == result["documents"]
    assert (counts.tokens * counts.rows).sum() == result["tokens"]
    artifacts = {Path(e["path"]).name for e in events(folder.journal, "artifact")}
    assert artifacts == {"corpus.csv", "token_lengths.csv", "token_lengths.png", "usage.csv",
                         "token_lengths.svg", "train_text_document_card.json"}  # fmt: skip
    assert all((folder.root / e["path"]).exists() for e in events(folder.journal, "artifact"))

    text = Tokenizer(folder.tokenizer).decode(read_documents(folder.corpus_prefix, [0])[0])
    assert text.startswith("Question: ") and "\nAnswer: " in text


def test_preparing_again_gives_the_same_bytes(home: Path) -> None:
    prepare.run(stage_of(home))
    first = sha256_of(home / "runs/t/data")
    prepare.run(stage_of(home))
    assert sha256_of(home / "runs/t/data") == first


def test_given_records_bring_no_pocket_questions(home: Path, records_file: Path) -> None:
    prepare.run(stage_of(home))
    stage = stage_of(home, {"data.train_path": "mine.json", "model.vocab_size": 300})
    result = prepare.run(stage)
    assert result["documents"] == 400 and result["questions"] == 0
    assert not stage.folder.questions.exists()  # those of the run before are gone


def test_given_questions_are_checked_and_used_in_place(home: Path) -> None:
    prepare.run(stage_of(home))
    (home / "runs/t/data/questions").rename(home / "asked")
    stage = stage_of(home, {"evaluation.questions_path": "asked", "data.pocket_seed": 3})
    prepare.gather_records(stage)
    questions = prepare.gather_questions(stage)
    assert questions.folder == home / "asked" and questions.count == 240
    subject = read_subjects(home / "asked")[0].name
    (home / "asked" / "dev" / f"{subject}_dev.csv").unlink()
    with pytest.raises(InputError, match="missing"):
        prepare.gather_questions(stage)


def test_given_tokenizer_must_fit_the_model(home: Path) -> None:
    prepare.run(stage_of(home))
    (home / "runs/t/data/tokenizer/tokenizer.model").rename(home / "given.model")
    given = {"data.tokenizer_model": "given.model"}
    assert prepare.run(stage_of(home, given))["vocab_size"] == 512
    stage = stage_of(home, {**given, "model.vocab_size": 400})
    records = prepare.gather_records(stage)
    with pytest.raises(InputError, match="has 512 pieces, but the model.s embedding only 400 rows"):
        prepare.make_tokenizer(stage, records)


def test_check_sees_a_corpus_that_is_not_its_records(home: Path) -> None:
    stage = stage_of(home)
    records = prepare.gather_records(stage)
    tokenizer = prepare.make_tokenizer(stage, records)
    corpus = prepare.write_corpus(stage, records, tokenizer)
    assert prepare.check_corpus(stage, records, corpus, tokenizer).startswith("4 documents")
    other = stage_of(home, {"data.pocket_seed": 9})
    with pytest.raises(InputError, match="row 0 is not that record's in tokens"):
        prepare.check_corpus(other, prepare.gather_records(other), corpus, tokenizer)


def test_check_sees_a_corpus_too_small_for_a_sample(home: Path) -> None:
    numbers = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    rows = [{"instruction": f"Say {numbers}.", "output": numbers}]
    (home / "one.json").write_text(json.dumps(rows))
    stage = stage_of(
        home,
        {"data.train_path": "one.json", "model.vocab_size": 300, "training.seq_length": 512},
    )
    records = prepare.gather_records(stage)
    tokenizer = prepare.make_tokenizer(stage, records)
    corpus = prepare.write_corpus(stage, records, tokenizer)
    with pytest.raises(InputError, match="training.seq_length = 512: the training part has"):
        prepare.check_corpus(stage, records, corpus, tokenizer)


def chat(number: int) -> dict[str, Any]:
    words = ("red", "green", "blue", "black", "white")
    asked, answered = words[number % 5], words[(number // 5) % 5]
    return {
        "messages": [
            {"role": "user", "content": f"Which colour comes after {asked}, number {number}?"},
            {"role": "assistant", "content": f"After {asked} comes {answered}."},
        ]
    }


def test_conversations_become_packed_rows_that_a_training_reads(home: Path) -> None:
    lines = "".join(json.dumps(chat(number)) + "\n" for number in range(300))
    (home / "chats.jsonl").write_text(lines)
    settings = {"data.train_path": "chats.jsonl", "data.handler": "conversation"}
    stage = stage_of(home, {**settings, "model.vocab_size": 340, "training.seq_length": 128})
    records = prepare.gather_records(stage)
    tokenizer = prepare.make_tokenizer(stage, records)
    (example, *_) = prepare.show_examples(records, tokenizer)
    spelled = "".join(p for p, t in zip(example.pieces, example.trained, strict=True) if t)
    assert "comes" in spelled and "Which" not in spelled  # answers alone are trained
    made = prepare.write_corpus(stage, records, tokenizer)
    corpora = recorded_corpora(stage.folder)
    assert corpora.kind == "instruction" and all(file.exists() for file in corpora.files())
    (usage, *_) = prepare.usage_rows(stage, made)
    assert made.documents == 300 and usage["rows"] < 150  # several share a row
    assert usage["samples taken"] == stage.experiment.training.train_samples
    assert float(usage["padding"].rstrip("%")) < 25


def test_a_blend_has_a_corpus_per_source(home: Path, records_file: Path) -> None:
    text = "\n".join(f"line {number} of a text" for number in range(500))
    (home / "more.txt").write_text(text)
    rows = [{"instruction": f"Repeat {n}", "output": str(n)} for n in range(200)]
    (home / "other.json").write_text(json.dumps(rows))
    blend = [{"path": "mine.json", "weight": 3.0}, {"path": "other.json"}]
    stage = stage_of(home, {"data.blend": blend, "model.vocab_size": 300})
    result = prepare.run(stage)
    assert result["documents"] == 600
    corpora = recorded_corpora(stage.folder)
    assert [prefix.name for prefix in corpora.prefixes] == ["blend-1", "blend-2"]
    assert corpora.weights == (3.0, 1.0)
    usage = pandas.read_csv(stage.folder.tables / "usage.csv")
    taken = usage[usage.part == "training"]["samples taken"].tolist()
    assert taken[0] == pytest.approx(3 * taken[1], abs=2)


def test_damaged_records_are_counted_where_that_is_asked_for(
    home: Path, records_file: Path
) -> None:
    rows = json.loads(records_file.read_text())
    rows[5]["output"] = None
    records_file.write_text(json.dumps(rows))
    settings = {"data.train_path": "mine.json", "model.vocab_size": 300}
    with pytest.raises(InputError, match="mine.json, row 5: column 'output'"):
        prepare.run(stage_of(home, settings))
    result = prepare.run(stage_of(home, {**settings, "data.on_damage": "count"}))
    assert result["documents"] == 399 and result["damaged"] == 1


def test_a_handler_of_somebody_elses_needs_a_tokenizer(home: Path, records_file: Path) -> None:
    settings = {"data.train_path": "mine.json", "data.handler": "their.module:Handler"}
    stage = stage_of(home, settings)
    with pytest.raises(InputError, match="give data.tokenizer_model"):
        prepare.make_tokenizer(stage, prepare.gather_records(stage))
