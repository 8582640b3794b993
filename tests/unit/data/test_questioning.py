"""What a model is asked is a record up to its answer, as in training."""

import pytest

from internlm_lib.data.chat import MARKERS
from internlm_lib.data.handlers import Handler, handler
from internlm_lib.data.questioning import given_prompt, prompt_of
from internlm_lib.data.records import Row
from internlm_lib.data.tokenizer import Tokenizer, train_tokenizer
from internlm_lib.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [f"Say the number {n}, please: it is {n}." for n in range(300)]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(texts, 330, path, markers=MARKERS)


RECORD = Row({"instruction": "Add.", "input": "1 2", "output": "3"}, "a.json, row 0")


@pytest.mark.parametrize("name", ["alpaca", "alpaca_predecessor", "question_answer"])
def test_a_templates_prompt_begins_its_document(name: str, tokenizer: Tokenizer) -> None:
    made = handler(name, tokenizer)
    prompt = prompt_of(made, RECORD, tokenizer)
    document = "".join(span.text for span in made.document(RECORD))
    assert document.startswith(prompt.text) and document.endswith("3")
    assert prompt.question == "Add.\n1 2" and prompt.expected == "3"
    assert given_prompt(made, "Add.").text == made.prompt("Add.", "")  # type: ignore[attr-defined]


def test_of_instruction_data_the_answer_is_what_is_trained(tokenizer: Tokenizer) -> None:
    prompt = prompt_of(handler("alpaca_instruction", tokenizer), RECORD, tokenizer)
    assert prompt.text.endswith("### Response:\n") and prompt.expected == "3\n"


def test_of_a_conversation_the_first_answer_is_asked_for(tokenizer: Tokenizer) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "See you.")]
    row = Row({"messages": [{"role": r, "content": c} for r, c in turns]}, "a.json, row 0")
    prompt = prompt_of(handler("conversation", tokenizer), row, tokenizer)
    assert prompt.text == "<|User|>:Hi<eoh>\n<|Bot|>:" and prompt.expected == "Hello."
    ids = tokenizer.encode(prompt.text)
    assert tokenizer.piece_id("<eoh>") in ids  # markers written out are read as such


def test_a_text_is_continued(tokenizer: Tokenizer) -> None:
    text = " ".join(map(str, range(40)))
    prompt = prompt_of(handler("pretrain", tokenizer), Row({"text": text}, "a"), tokenizer)
    assert prompt.expected is not None and prompt.text + prompt.expected == text


def test_a_handler_that_cannot_ask_says_so(tokenizer: Tokenizer) -> None:
    class Mute:
        name, kind, columns, optional_columns = "mute", "pretrain", ("text",), ()

    made: Handler = Mute()  # type: ignore[assignment]
    with pytest.raises(InputError, match="'mute' has no method prompt"):
        given_prompt(made, "Hello")
