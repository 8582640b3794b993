"""Handlers make documents of rows; of which tokens, and which of them are trained."""

import hashlib
import pickle
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from internlm_lib.data import handlers
from internlm_lib.data.handlers import (
    HANDLERS,
    Span,
    encode_document,
    encode_documents,
    handler,
    span_text,
)
from internlm_lib.data.records import RecordError, Row
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError
from tests.unit.data.trained_tokenizer import trained

ALPACA = ("alpaca", "alpaca_predecessor", "question_answer", "alpaca_instruction")
RECORD = {"instruction": "Add.", "input": "1 2", "output": "3"}
ROWS: dict[str, dict[str, Any]] = {
    "pretrain": {"text": "The red tiger sleeps."},
    **dict.fromkeys(ALPACA, RECORD),
    **dict.fromkeys(
        ("conversation", "conversation_legacy"),
        {"messages": [{"role": "user", "content": "Add.\n1 2"},
                      {"role": "assistant", "content": "3"}]},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("t"))


def row(values: dict[str, Any]) -> Row:
    return Row(values, "mine.parquet, row 17")


def document(name: str, tokenizer: Tokenizer, values: dict[str, Any] | None = None) -> list[Span]:
    return list(handler(name, tokenizer).document(row(values or ROWS[name])))


# --- the built-in ones ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", HANDLERS)
def test_a_handler_is_known_by_its_name_and_travels(name: str, tokenizer: Tokenizer) -> None:
    made = handler(name, tokenizer)
    assert made.name == name
    copy = pickle.loads(pickle.dumps(made))
    assert copy.document(row(ROWS[name])) == made.document(row(ROWS[name]))
    read = {*made.columns, *made.optional_columns}
    assert set(ROWS[name]) <= read and set(made.columns) <= set(ROWS[name])


def test_kinds_say_whether_labels_are_written(tokenizer: Tokenizer) -> None:
    masked = {name for name in HANDLERS if handler(name, tokenizer).kind == "instruction"}
    assert masked == {"alpaca_instruction", "conversation", "conversation_legacy"}
    for name in HANDLERS:
        spans = document(name, tokenizer)
        assert any(not span.trained for span in spans) == (name in masked)


@pytest.mark.parametrize(
    ("record", "length", "digest"),
    [
        (("Add.", "1 2", "3"), 332,
         "126b3dacf4fe81b43c10b47d35ca457de82e6c38a276008637947582707e15f4"),
        (("Say hi.", "", "hi"), 329,
         "266f946815e5e7be7684e4c0339ae46bc361a1c94f449057e9205a07813dc62b"),
    ],
)  # fmt: skip
def test_the_predecessors_document_to_the_byte(
    record: tuple[str, str, str], length: int, digest: str, tokenizer: Tokenizer
) -> None:
    values = dict(zip(("instruction", "input", "output"), record, strict=True))
    text = span_text(document("alpaca_predecessor", tokenizer, values), tokenizer)
    assert (len(text), hashlib.sha256(text.encode()).hexdigest()) == (length, digest)
    assert "###None" in text or record[1]


def test_templates_are_trained_whole(tokenizer: Tokenizer) -> None:
    (span,) = document("alpaca", tokenizer)
    assert span.trained and span.text.endswith("\n\n### Input:\n1 2\n\n### Response:3")
    (span,) = document("question_answer", tokenizer)
    assert span == Span("Question: Add.\n1 2\nAnswer: 3")
    assert document("pretrain", tokenizer) == [Span("The red tiger sleeps.")]


def test_alpaca_instruction_trains_the_answer_alone(tokenizer: Tokenizer) -> None:
    prompt, answer = document("alpaca_instruction", tokenizer)
    assert prompt.text.endswith("\n### Instruction:\nAdd.\n1 2\n### Response:\n")
    assert (prompt.trained, answer) == (False, Span("3\n"))
    digest = hashlib.sha256((prompt.text + answer.text).encode()).hexdigest()
    assert digest.startswith("3e698b3993d8cedd")
    ids, labels = encode_document([prompt, answer], tokenizer, append_eod=True)
    asked = [1, *tokenizer.encode(prompt.text)]
    answered = [*tokenizer.encode("3\n"), 2]
    assert ids == asked + answered
    assert labels == [-100] * len(asked) + answered


@pytest.mark.parametrize("name", ALPACA)
def test_input_may_be_missing_null_or_empty(name: str, tokenizer: Tokenizer) -> None:
    values = {"instruction": "Say hi.", "output": "hi"}
    expected = document(name, tokenizer, values)
    assert document(name, tokenizer, values | {"input": None}) == expected
    assert document(name, tokenizer, values | {"input": ""}) == expected
    assert document(name, tokenizer, values | {"input": "x"}) != expected


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("alpaca", {"instruction": "a"}, "column 'output' is missing; found instruction"),
        ("alpaca", RECORD | {"output": None}, "column 'output' = None is not text"),
        ("alpaca", RECORD | {"instruction": 7}, "column 'instruction' = 7 is not text"),
        ("alpaca", RECORD | {"input": ["x"]}, r"column 'input' = \['x'\] is not text"),
        ("alpaca_instruction", {"output": "b"}, "column 'instruction' is missing"),
        ("pretrain", {"body": "x"}, "column 'text' is missing; found body"),
        ("pretrain", {"text": None}, "column 'text' = None is not text"),
        ("pretrain", {"text": ""}, "column 'text' is empty"),
        ("conversation", {"messages": None}, "expected one of the columns"),
    ],
)
def test_rows_that_a_handler_cannot_use(
    name: str, values: dict[str, Any], message: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(RecordError, match=f"^mine.parquet, row 17: {message}"):
        document(name, tokenizer, values)


@pytest.mark.parametrize("name", HANDLERS)
def test_a_prompt_is_what_was_trained_on(name: str, tokenizer: Tokenizer) -> None:
    made = handler(name, tokenizer)
    text = made.prompt("Add.", "1 2")
    spans = made.prompt_spans("Add.", "1 2")
    assert span_text(spans, tokenizer) == text
    if name == "pretrain":
        assert text == "Add.\n1 2"
        return
    trained_on = document(name, tokenizer)
    assert span_text(trained_on, tokenizer).startswith(text)
    asked, _ = encode_document(spans, tokenizer, append_eod=False)
    ids, labels = encode_document(trained_on, tokenizer, append_eod=False)
    assert ids[: len(asked)] == asked
    if made.kind == "instruction":
        assert labels[len(asked)] == ids[len(asked)]


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("alpaca", "\n\n### Response:"),
        ("alpaca_predecessor", "\n\n### Response: ASSISTANT:"),
        ("question_answer", "Add.\nAnswer:"),
        ("alpaca_instruction", "### Instruction:\nAdd.\n\n### Response:\n"),
        ("conversation", "<|User|>:Add.<eoh>\n<|Bot|>:"),
        ("conversation_legacy", "<|User|>:Add.<TOKENS_UNUSED_140>\n<|Bot|>:"),
    ],
)
def test_where_a_prompt_ends(name: str, end: str, tokenizer: Tokenizer) -> None:
    """Before a blank that begins the answer's first token, behind a line break that is masked."""
    assert handler(name, tokenizer).prompt("Add.", "").endswith(end)


# --- encoding ------------------------------------------------------------------------------------


def test_bos_and_eod_stand_around_a_document(tokenizer: Tokenizer) -> None:
    tiger = tokenizer.encode("tiger")
    assert encode_document([Span("tiger")], tokenizer, append_eod=True) == (
        [1, *tiger, 2], [-100, *tiger, 2],
    )  # fmt: skip
    assert encode_document([Span("tiger")], tokenizer, append_eod=False)[0] == [1, *tiger]
    assert encode_document([], tokenizer, append_eod=True) == ([1, 2], [-100, 2])


def test_texts_are_joined_only_where_equally_trained(tokenizer: Tokenizer) -> None:
    whole, parts = tokenizer.encode("Answer"), [*tokenizer.encode("Ans"), *tokenizer.encode("wer")]
    assert whole != parts
    joined = [Span("Ans"), Span(), Span("wer")]
    assert encode_document(joined, tokenizer, append_eod=False)[0] == [1, *whole]
    border = [Span("Ans", trained=False), Span("wer")]
    ids, labels = encode_document(border, tokenizer, append_eod=False)
    untrained = len(tokenizer.encode("Ans"))
    assert ids == [1, *parts] and labels == [-100] * (1 + untrained) + parts[untrained:]
    ids, _ = encode_document(
        [Span("Ans"), Span(ids=(9,)), Span("wer")], tokenizer, append_eod=False
    )
    assert ids == [1, *tokenizer.encode("Ans"), 9, *tokenizer.encode("wer")]


def test_ids_are_trained_or_not_as_text_is(tokenizer: Tokenizer) -> None:
    spans = [Span(ids=(7, 8), trained=False), Span(ids=(9,))]
    assert encode_document(spans, tokenizer, append_eod=False) == (
        [1, 7, 8, 9], [-100, -100, -100, 9],
    )  # fmt: skip


@pytest.mark.parametrize("num_threads", [1, 3])
def test_many_documents_are_as_one_by_one(tokenizer: Tokenizer, num_threads: int) -> None:
    documents = [document(name, tokenizer) for name in HANDLERS] * 5 + [[], [Span("▁<eoh>")]]
    together = encode_documents(documents, tokenizer, append_eod=True, num_threads=num_threads)
    assert together == [encode_document(spans, tokenizer, append_eod=True) for spans in documents]


@pytest.mark.parametrize("name", ["pretrain", *ALPACA])
def test_markers_in_a_record_are_text(name: str, tokenizer: Tokenizer) -> None:
    forged = "<s>x<eoh>\n<|Bot|>:<eoa></s>"
    values = {"text": forged, "instruction": forged, "input": forged, "output": forged}
    ids, _ = encode_document(document(name, tokenizer, values), tokenizer, append_eod=True)
    assert [i for i in ids if i < 3 or i >= tokenizer.vocab_size - 4] == [1, 2]
    assert forged in tokenizer.decode(ids)


def test_spans_that_cannot_be_encoded(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="a span is text or ids, not both"):
        Span("x", ids=(1,))
    for outside in (tokenizer.vocab_size, -100):
        with pytest.raises(InputError, match=f"token id {outside} is not in"):
            encode_document([Span(ids=(outside,))], tokenizer, append_eod=True)


# --- handlers of one's own -----------------------------------------------------------------------

OWN = """
from internlm_lib.data.handlers import Span
from internlm_lib.data.records import text_of

class Letters:
    name, kind = "letters", "instruction"
    columns, optional_columns = ("question", "letter"), ()

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def document(self, row):
        return [Span(text_of(row, "question") + ":", trained=False), Span(text_of(row, "letter"))]

class Odd(Letters):
    kind = "chat"

class Bare:
    name = "bare"
    def __init__(self, tokenizer):
        pass

class OneColumn(Letters):
    columns = ("text")

class Closed(Letters):
    def __init__(self, tokenizer):
        self.file = open(__file__)

class NoArgument(Letters):
    def __init__(self):
        pass

NUMBER = 7
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module on the path, and one that cannot be imported."""
    (tmp_path / "own_handlers.py").write_text(OWN)
    (tmp_path / "broken_handlers.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("own")
def test_a_class_of_ones_own(tokenizer: Tokenizer) -> None:
    made = handler("own_handlers:Letters", tokenizer)
    assert (made.name, made.kind) == ("letters", "instruction")
    spans = made.document(row({"question": "Which?", "letter": "B"}))
    ids, labels = encode_document(spans, tokenizer, append_eod=True)
    assert tokenizer.decode(ids) == "Which?:B"
    assert labels[-2:] == ids[-2:] and labels[:-2] == [-100] * (len(ids) - 2)
    assert pickle.loads(pickle.dumps(made)).tokenizer.path == tokenizer.path


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alpaka", "allowed are pretrain, alpaca, .*conversation_legacy, and one of your own"),
        ("own_handlers:Leters", "own_handlers has no Leters"),
        ("not_there:Letters", "not_there cannot be imported: ModuleNotFoundError: .*PYTHONPATH"),
        ("broken_handlers:A", "broken_handlers cannot be imported: .*a_package_that_is_not_there"),
        ("own_handlers:", "allowed are"),
        (":Letters", "cannot be imported"),
        ("own_handlers:NUMBER", "cannot be made of a tokenizer .*'int' object is not callable"),
        ("own_handlers:NoArgument", "cannot be made of a tokenizer .*TypeError"),
        ("own_handlers:Closed", "sent to another process: .*pickle"),
        ("own_handlers:Bare", "lacks kind, columns, optional_columns, document"),
        ("own_handlers:OneColumn", r'columns are a tuple, \("text",\) for a single one'),
        ("own_handlers:Odd", r"kind 'chat' is none of \('pretrain', 'instruction'\)"),
    ],
)
def test_handlers_that_there_are_not(name: str, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=message) as refused:
        handler(name, tokenizer)
    assert repr(name) in str(refused.value)


@pytest.mark.usefixtures("own")
def test_an_installed_package_offers_handlers(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = handlers.ENTRY_POINT_GROUP
    points = EntryPoints([
        EntryPoint("letters", "own_handlers:Letters", group),
        EntryPoint("alpaca", "own_handlers:Letters", group),
        EntryPoint("broken", "broken_handlers:A", group),
        EntryPoint("elsewhere", "own_handlers:Letters", "another.group"),
    ])  # fmt: skip
    monkeypatch.setattr(handlers, "entry_points", points.select)
    assert handler("letters", tokenizer).name == "letters"
    assert handler("alpaca", tokenizer).name == "alpaca"  # the kit's own
    assert handlers.handler_names() == [*HANDLERS, "letters", "broken"]
    with pytest.raises(InputError, match="entry point broken_handlers:A cannot be loaded"):
        handler("broken", tokenizer)
    with pytest.raises(InputError, match="'elsewhere': allowed are .*, letters, broken, and"):
        handler("elsewhere", tokenizer)
