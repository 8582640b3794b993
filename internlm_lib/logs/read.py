"""A training log of another program → the events of a journal, in one pass, in constant memory."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from internlm_lib.errors import InputError
from internlm_lib.files import sha256_of
from internlm_lib.logs.bookkeeping import Bookkeeper
from internlm_lib.logs.facts import Facts
from internlm_lib.logs.internevo import InternEvoReader
from internlm_lib.logs.lines import LONGEST, LogLines
from internlm_lib.logs.megatron import MegatronReader
from internlm_lib.logs.reader import Event, Reader, is_step
from internlm_lib.logs.trainer_state import TrainerStateReader, is_trainer_state
from internlm_lib.logs.values import as_text

READERS: dict[str, type[Reader]] = {
    "megatron": MegatronReader,
    "internevo": InternEvoReader,
    "huggingface": TrainerStateReader,
}
"""Formats. `megatron` is that of AscendSpeed, MindSpeed-LLM and Megatron-DeepSpeed, too."""

_TEXT_FORMATS = ("megatron", "internevo")
_FIRST_LINES = 5


def read_log(path: Path, format: str = "auto", facts: Facts | None = None) -> Iterator[Event]:
    """Yield a log's events as a journal has them; nothing is read before the first is asked for.

    Args:
        path: the log, plain or gzip.
        format: one of `READERS`, or "auto" to recognise it by its content.
        facts: what the log lacks; None: nothing.
    Yields:
        Dicts with `event`, `time` (the line's own, in Unix seconds, zoneless stamps as UTC; None
        where it has none) and, per kind:

        - `start`, one per attempt, before its first step: who, where and how large, as
          `training/worker.py` writes it, None where nobody says; `imported`, `format`, `source`
          (the file's name), `arguments` (the log's, as text), `model`, `tags.log_sha256`.
        - `step`: `step` (from 1 on), `loss` (nats per token; NaN where the log has none), and
          what the line gives of `grad_norm`, `grad_norms` (per group), `lr`, `loss_scale`,
          `step_seconds`, `consumed_samples`, `consumed_tokens`, `tokens`, `global_batch_size`,
          `seq_length` (if it is not that of the start), `skipped` and `nan_iterations` (numbers
          of steps), `memory_bytes`, `logged_tflops_per_device`, `logged_samples_per_second`,
          `forward_backward_seconds`. `tokens_per_second_per_device` and `step_seconds` follow
          from each other where batch, length and devices are known. `log_interval`: the numbers
          are those of so many steps. `includes`: what stands between this line and the one
          before, "validation" or "checkpoint", which `step_seconds` may include.
        - `validation`, `test`: `step`, `loss`, and `data` where the log names several.
        - `checkpoint`: `step`. `end`: `status` "done" or "stopped", `step`.
        - `import`, the last: see `Bookkeeper.summary`; `torn_last_line`, `damage`.
    Raises:
        InputError: no such file; no metric line of the format; the facts contradict the log.
    """
    chosen = _checked_format(path, format)
    reader = READERS[chosen]()
    lines = reader.lines(path)
    tags = {"log_sha256": sha256_of(path)}
    source = {"imported": True, "format": chosen, "source": path.name, "tags": tags}
    book = Bookkeeper(reader, facts or Facts(), source)
    parse, take = reader.parse, book.take
    for line in lines:
        unreadable = len(line) > LONGEST or (lines.torn and not reader.is_whole(line))
        if events := take(None if unreadable else parse(line), line):
            yield from events
    if book.training is None:
        raise InputError(_nothing_found(path, chosen))
    yield from book.finish()
    torn = lines.torn and not reader.is_whole(line)
    yield {**book.summary(), "torn_last_line": torn, "damage": lines.damage}


def detect_format(path: Path) -> str | None:
    """The first format of `READERS` that makes a step of one of the file's lines."""
    lines = LogLines(path)
    if is_trainer_state(path):
        return "huggingface"
    readers = {name: READERS[name]() for name in _TEXT_FORMATS}
    for line in lines:
        for name, reader in readers.items():
            if len(line) <= LONGEST and is_step(reader.parse(line)):
                return name
    return None


def _checked_format(path: Path, format: str) -> str:
    if format != "auto" and format not in READERS:
        raise InputError(f"--format {format}: allowed are auto, {', '.join(READERS)}")
    if format == "auto":
        found = detect_format(path)
        if found is None:
            raise InputError(_nothing_found(path, *READERS))
        return found
    if format == "huggingface" and LogLines(path) and not is_trainer_state(path):
        raise InputError(_nothing_found(path, format))
    return format


def _nothing_found(path: Path, *tried: str) -> str:
    first = islice((line for line in LogLines(path) if line.strip()), _FIRST_LINES)
    shown = "\n".join(f"  | {as_text(line[:120])}" for line in first)
    other = detect_format(path) if len(tried) == 1 else None
    remedy = (
        f"It looks like --format {other}: give that, or leave --format out"
        if other
        else "Give the log of the rank that prints the metrics (Megatron and AscendSpeed: the "
        "last one, on the last node), or a trainer_state.json"
    )
    return (
        f"{path}: no metric line found; tried: {', '.join(tried)}. {remedy}. "
        f"Its first lines:\n{shown or '  (none)'}"
    )
