"""Questions, a tokenizer that knows their words, and a random model over its pieces."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internlm_lib.data.pocket import make_pocket_world
from internlm_lib.data.prompts import TEMPLATES
from internlm_lib.data.questions import Question, Subject
from internlm_lib.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    documents = map(TEMPLATES["question_answer"].document, make_pocket_world(1).records)
    return train_tokenizer(documents, 400, folder / "tokenizer.model")


@pytest.fixture
def model(random_model: Callable[[int], Any], tokenizer: Tokenizer) -> Any:
    return random_model(tokenizer.vocab_size)


@pytest.fixture
def subject() -> Subject:
    """Two exemplars and three questions, one of them with options that look like missing data."""
    return Subject(
        "world_religions",
        dev=(
            Question("2 + 2?", ("1", "2", "3", "4"), "D"),
            Question("Say {{no}}.", ("yes", "no", "NA", "None"), "B"),
        ),
        test=(
            Question("Which?", ("None", "NA", "null", "a word or two"), "B"),
            Question("3 + 3?", ("6", "7", "8", "9"), "A"),
            Question("Last?", ("W", "X", "Y", "Z"), "D"),
        ),
    )
