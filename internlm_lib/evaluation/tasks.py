"""Multiple-choice questions as tasks of lm-evaluation-harness, in two protocols.

`letter` is MMLU's own: the options are shown, the model is to name A, B, C or D. `cloze` shows no
options and scores each option's text as the answer: what a small model can do, which has learnt
facts but not to point at a list. The header is the harness's wording, with one blank before the
subject; the original script's has two.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.task import ConfigurableTask

from internlm_lib.data.questions import LETTERS, Question, Subject

_METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Protocol:
    """How a question is put, and what is scored as its answer, each after a blank."""

    header: str
    prompt: Callable[[Question], str]
    choices: Callable[[Question], Sequence[str]]


def _with_options(question: Question) -> str:
    options = zip(LETTERS, question.options, strict=True)
    lines = [question.text, *(f"{letter}. {text}" for letter, text in options), "Answer:"]
    return "\n".join(lines)


PROTOCOLS: dict[str, Protocol] = {
    "cloze": Protocol(
        header="The following are questions about {subject}.\n\n",
        prompt=lambda question: f"Question: {question.text}\nAnswer:",
        choices=lambda question: question.options,
    ),
    "letter": Protocol(
        header="The following are multiple choice questions (with answers) about {subject}.\n\n",
        prompt=_with_options,
        choices=lambda question: tuple(LETTERS),
    ),
}


def build_task(subject: Subject, protocol: str) -> ConfigurableTask:
    """A task that shows all of the subject's `dev` and asks all of its `test`.

    A prompt is the header, the exemplars in order, each followed by its answer and an empty line,
    and the question up to `Answer:`; a continuation is a blank and an option.
    """
    rules = PROTOCOLS[protocol]
    return ConfigurableTask(
        config={
            "task": f"{protocol}_{subject.name}",
            # In memory: load_dataset would leave copies in the user's Hugging Face cache, and its
            # csv reader would turn the options None and NA into missing values.
            "custom_dataset": lambda: _datasets(subject, rules),
            "test_split": "test",
            "fewshot_split": "dev",
            "num_fewshot": len(subject.dev),
            "fewshot_config": {"sampler": "first_n"},
            "output_type": "multiple_choice",
            "description": rules.header.format(subject=subject.name.replace("_", " ")),
            "doc_to_text": "prompt",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": " ",
            "fewshot_delimiter": "\n\n",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True}
                for name in _METRICS
            ],
        }
    )


def _datasets(subject: Subject, rules: Protocol) -> dict[str, Any]:
    from datasets import Dataset

    return {
        split: Dataset.from_list([_document(question, rules) for question in questions])
        for split, questions in (("dev", subject.dev), ("test", subject.test))
    }


def _document(question: Question, rules: Protocol) -> dict[str, Any]:
    return {
        "prompt": rules.prompt(question),
        "choices": list(rules.choices(question)),
        "answer": LETTERS.index(question.answer),
    }
