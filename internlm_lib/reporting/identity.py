"""Are two trainings the same experiment? What they were, side by side."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from internlm_lib.reporting.training import LoggedTraining

Finding = Literal["same", "differs", "unknown", "decides"]
"""`decides`: a difference after which losses say nothing about each other."""

_DECISIVE = {
    "config_sha256": "other settings (model, schedule, optimizer or data keys)",
    "data_sha256": "other data, or another order of it",
    "weights_sha256": "other initial weights",
    "tokenizer_sha256": "another tokenizer",
}
"""Hash in a `start` event's tags → what it means if two differ."""

_PLAIN = (
    "engine", "layout", "world_size", "device", "device_name", "precision", "recompute",
    "deterministic_mode", "seed", "tokens_per_step", "seq_length", "global_batch_size",
    "micro_batch_size", "train_iters", "parameters",
)  # fmt: skip
_NOT_LIKE_FOR_LIKE = (
    "world_size", "precision", "recompute", "seq_length", "global_batch_size", "micro_batch_size",
    "parameters",
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One line of the comparison of what two trainings were."""

    name: str
    reference: Any
    candidate: Any
    finding: Finding

    @property
    def row(self) -> dict[str, str]:
        """As a table row; hashes are cut to the characters people compare."""
        return {
            "fact": self.name.replace("_", " "),
            "reference": _shown(self.name, self.reference),
            "candidate": _shown(self.name, self.candidate),
            "finding": self.finding,
        }


def compare_identity(reference: LoggedTraining, candidate: LoggedTraining) -> list[Fact]:
    """The decisive hashes, then all facts that at least one of the trainings recorded."""
    ours, theirs = _facts(reference.start), _facts(candidate.start)
    names = [*_DECISIVE, *_PLAIN, *sorted((ours.keys() | theirs.keys()) - {*_DECISIVE, *_PLAIN})]
    facts = [Fact(n, ours.get(n), theirs.get(n), _finding(n, ours, theirs)) for n in names]
    return [f for f in facts if f.name in _DECISIVE or (f.reference, f.candidate) != (None, None)]


def decisive(facts: list[Fact]) -> list[str]:
    """What keeps the losses from being compared, one sentence each; empty if nothing does."""
    return [
        f"{_DECISIVE[fact.name]}: {fact.name} is {fact.row['reference']} in the reference, "
        f"{fact.row['candidate']} in the candidate"
        for fact in facts
        if fact.finding == "decides"
    ]


def unknown(facts: list[Fact]) -> list[str]:
    """Decisive hashes that not both sides recorded: what has to be taken on trust."""
    return [fact.name for fact in facts if fact.name in _DECISIVE and fact.finding == "unknown"]


def not_like_for_like(facts: list[Fact]) -> list[str]:
    """Differences that make a ratio of speeds unfair, one phrase each."""
    return [
        f"{fact.name.replace('_', ' ')}: {fact.reference} against {fact.candidate}"
        for fact in facts
        if fact.name in _NOT_LIKE_FOR_LIKE and fact.finding == "differs"
    ]


def _facts(start: Mapping[str, Any]) -> dict[str, Any]:
    packages = start.get("packages") or {}
    return {
        **{name: start.get(name) for name in _PLAIN},
        **(start.get("tags") or {}),
        **{f"{name} version": version for name, version in packages.items()},
    }


def _finding(name: str, reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> Finding:
    ours, theirs = reference.get(name), candidate.get(name)
    if ours is None or theirs is None:
        return "unknown"
    if ours == theirs:
        return "same"
    return "decides" if name in _DECISIVE else "differs"


_SHOWN: dict[str, Callable[[Any], str]] = {"git_commit": lambda text: str(text)[:12]}


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if name.endswith("_sha256"):
        return str(value)[:12]
    return _SHOWN.get(name, str)(value)
