"""Templates, held against the published texts by their hashes."""

import hashlib

import pytest

from internlm_lib.data.prompts import TEMPLATES
from internlm_lib.data.records import Record


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("input_text", "length", "digest"),
    [
        ("{input}", 224, "28811e9850d9511bab334d167a03a8a37614535fdb28d645492efac8e9951c0f"),
        ("", 152, "35101bc36d10997c7d926d8f21f7d173aec6523f3a57d78821b944a89925cdca"),
    ],
)
def test_alpaca_is_stanfords_training_template(input_text: str, length: int, digest: str) -> None:
    prompt = TEMPLATES["alpaca"].prompt("{instruction}", input_text)
    assert (len(prompt), sha256(prompt)) == (length, digest)


def test_alpaca_output_follows_the_header_directly() -> None:
    document = TEMPLATES["alpaca"].document(Record("Add.", "1 2", "3"))
    assert document.endswith("\n\n### Input:\n1 2\n\n### Response:3")


@pytest.mark.parametrize(
    ("record", "length", "digest"),
    [
        (
            Record("Add.", "1 2", "3"),
            332,
            "126b3dacf4fe81b43c10b47d35ca457de82e6c38a276008637947582707e15f4",
        ),
        (
            Record("Say hi.", "", "hi"),
            329,
            "266f946815e5e7be7684e4c0339ae46bc361a1c94f449057e9205a07813dc62b",
        ),
    ],
)
def test_ascendspeed_is_the_predecessors_text_to_the_byte(
    record: Record, length: int, digest: str
) -> None:
    document = TEMPLATES["alpaca_predecessor"].document(record)
    assert (len(document), sha256(document)) == (length, digest)


def test_alpaca_instruction_is_the_predecessors_text_to_the_byte() -> None:
    """The facts give the beginnings of the hashes."""
    document = TEMPLATES["alpaca_instruction"].document(Record("Add.", "1 2", "3"))
    system = document.split("\n")[1]
    assert (len(system), sha256(system)[:16]) == (242, "75694f78b6ebe6f7")
    assert (len(document), sha256(document)[:16]) == (286, "3e698b3993d8cedd")
    without = TEMPLATES["alpaca_instruction"].document(Record("Say hi.", "", "hi"))
    assert without.endswith("### Instruction:\nSay hi.\n\n### Response:\nhi\n")


def test_question_answer_joins_instruction_and_input_with_a_line_break() -> None:
    question_answer = TEMPLATES["question_answer"]
    assert question_answer.document(Record("Add.", "1 2", "3")) == "Question: Add.\n1 2\nAnswer: 3"
    assert question_answer.document(Record("Say hi.", "", "hi")) == "Question: Say hi.\nAnswer: hi"


@pytest.mark.parametrize("name", TEMPLATES)
def test_document_is_prompt_joint_output_and_no_prompt_ends_in_a_blank(name: str) -> None:
    chosen = TEMPLATES[name]
    for record in (Record("Do.", "it", "done"), Record("Do.", "", "done")):
        prompt = chosen.prompt(record.instruction, record.input)
        assert chosen.document(record) == prompt + chosen.joint + "done" + chosen.end
        assert prompt == prompt.rstrip()
