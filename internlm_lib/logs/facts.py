"""What a training is, from what its log says and what the caller knows."""

from dataclasses import dataclass, fields
from typing import Any

from internlm_lib.errors import InputError
from internlm_lib.experiment.presets import PRESETS
from internlm_lib.logs.header import MODEL_KEYS, Header
from internlm_lib.logs.reader import Event

_ALLOWED = {
    "device": ("npu", "cuda", "cpu"),
    "precision": ("bf16", "fp16", "fp32"),
    "model": tuple(PRESETS),
}


@dataclass(frozen=True)
class Facts:
    """What a log may lack, given by the caller; None leaves it to the log.

    Raises InputError for a value that is not allowed.
    """

    seq_length: int | None = None
    """Tokens per sample."""
    devices: int | None = None
    """Number of devices of the training: its world size."""
    device: str | None = None
    """npu, cuda or cpu. The log's own is a guess, which this overrules."""
    device_name: str | None = None
    """E.g. "Ascend 910B3"."""
    global_batch_size: int | None = None
    """Samples per step."""
    precision: str | None = None
    """bf16, fp16 or fp32."""
    model: str | None = None
    """A preset of the kit, e.g. "internlm-7b"."""

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise InputError(f"{_option(name)} {value}: allowed are {', '.join(allowed)}")
        for name in ("seq_length", "devices", "global_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{_option(name)} {value}: give a whole number from 1 on")


@dataclass(frozen=True)
class Training:
    """What log and caller together say of one start of a training; None where neither does."""

    seq_length: int | None
    world_size: int | None
    device: str
    device_name: str | None
    global_batch_size: int | None
    precision: str | None
    model: dict[str, Any]

    def tokens_of(self, step: Event) -> int | None:
        """Tokens of a `step` event, by its own words or else batch size times length."""
        if (stated := step.get("tokens")) is not None:
            return int(stated)
        samples = step.get("global_batch_size", self.global_batch_size)
        length = step.get("seq_length", self.seq_length)
        return samples * length if samples and length and samples > 0 and length > 0 else None


def settle(header: Header, first: Event, facts: Facts, source: str) -> Training:
    """Join the log's facts with the caller's.

    Args:
        header: what the log said before its first step.
        first: the first step; its batch size and length count where the header has none.
        facts: what the caller knows.
        source: where the log's facts come from, for the message.
    Raises:
        InputError: log and caller contradict each other; all contradictions are listed.
    """
    logged: dict[str, Any] = {
        "seq_length": header.whole("seq_length") or first.get("seq_length"),
        "devices": header.world_size,
        "global_batch_size": header.whole("global_batch_size") or first.get("global_batch_size"),
        "precision": header.precision,
    }
    given = {field.name: getattr(facts, field.name) for field in fields(facts)}
    wrong = [
        f"{_option(name)} {given[name]}, but the log says {value}"
        for name, value in logged.items()
        if given[name] is not None and value is not None and given[name] != value
    ]
    shape = dict(header.model)
    if facts.model is not None:
        preset = PRESETS[facts.model]
        wrong += [
            f"--model {facts.model} has {key} {preset[key]}, but the log says {shape[key]}"
            for key in MODEL_KEYS
            if shape[key] not in (None, preset[key])
        ]
        shape = {key: preset[key] for key in shape}
    if wrong:
        raise InputError(
            f"{source} and what was given contradict each other; leave out what the log says "
            "itself:\n  - " + "\n  - ".join(wrong)
        )
    settled: dict[str, Any] = {name: given[name] or value for name, value in logged.items()}
    return Training(
        seq_length=settled["seq_length"],
        world_size=settled["devices"],
        device=facts.device or header.device or "unknown",
        device_name=facts.device_name,
        global_batch_size=settled["global_batch_size"],
        precision=settled["precision"],
        model={"preset": facts.model, **shape},
    )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
