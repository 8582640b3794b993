"""One run of lm-evaluation-harness over a model, and what the kit keeps of its result."""

from collections.abc import Callable
from typing import Any

from lm_eval.evaluator import evaluate

from internlm_lib.data.questions import LETTERS, Subject
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.evaluation.adapter import InternLMAdapter
from internlm_lib.evaluation.tasks import build_task
from internlm_lib.experiment.schema import EvaluationSection
from internlm_lib.generation.language_model import LanguageModel


def harness_scores(
    model: LanguageModel,
    tokenizer: Tokenizer,
    subjects: list[Subject],
    evaluation: EvaluationSection,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Run the harness once over all subjects and protocols.

    Returns:
        Rows `protocol, subject, questions, accuracy, accuracy_norm` (the latter with each option's
        log-likelihood divided by its length), one prediction per question and protocol, and the
        number of contexts that lost their beginning for want of room.
    """
    adapter = InternLMAdapter(
        model, tokenizer, batch_size=evaluation.batch_size, on_progress=on_progress
    )
    names = {f"{p}_{s.name}": (p, s) for p in evaluation.protocols for s in subjects}
    tasks = {name: build_task(subject, protocol) for name, (protocol, subject) in names.items()}
    # Not simple_evaluate: it would also collect a description of the machine, for seconds.
    found = evaluate(adapter, tasks, bootstrap_iters=0)
    rows, predictions = [], []
    for name, (protocol, subject) in names.items():
        rows.append(_row(protocol, subject.name, found["results"][name], found["samples"][name]))
        predictions += [_prediction(protocol, subject, s) for s in found["samples"][name]]
    return rows, predictions, adapter.shortened


def _row(
    protocol: str, subject: str, result: dict[str, Any], samples: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "subject": subject,
        "questions": len(samples),
        "accuracy": result["acc,none"],
        "accuracy_norm": result["acc_norm,none"],
    }


def _prediction(protocol: str, subject: Subject, sample: dict[str, Any]) -> dict[str, Any]:
    question = subject.test[sample["doc_id"]]
    scores = [log_likelihood for log_likelihood, _ in sample["filtered_resps"]]
    return {
        "protocol": protocol,
        "subject": subject.name,
        "question": question.text,
        "options": list(question.options),
        "answer": question.answer,
        "predicted": LETTERS[scores.index(max(scores))],
        "correct": bool(sample["acc"]),
        "log_likelihoods": scores,
    }
