"""Logs of Megatron-LM and its kin: AscendSpeed, MindSpeed-LLM, Megatron-DeepSpeed.

Formats: `training_log` and `print_args` of AscendSpeed (branch modellink) and Megatron-LM (up to
core 0.16). One line per log interval, fields between bars; AscendSpeed leaves out a loss that is
not above 0, all leave out what does not apply. The learning rate is the one set for the next step.
"""

import math
import re
from itertools import chain, compress
from pathlib import Path

from internlm_lib.logs.header import Header
from internlm_lib.logs.lines import LogLines
from internlm_lib.logs.reader import FACT, Event, Lines, Parsed
from internlm_lib.logs.values import as_text, count, number, unix_seconds

_HEAD = re.compile(r"(?<!\w)iteration +(\d{1,15}) */ *(\d{1,15}) *\|")
_FRAME = re.compile(r"(?<!-)-{8,} *((?:[\w-]+ )?arguments) *-{8,}", re.IGNORECASE)
_ARGUMENT = re.compile(r"(?:^|\s)(\w{1,100}) (?:\.{2,}|(?<=\w{30} )\.?) ?(.*)$")
"""Dots fill the name up to 48 columns (32 in early versions); longer names have none."""
_PARAMETERS = re.compile(r"parameters on .*?rank \((\d{1,6}), (\d{1,6})\): (\d{1,18})\b")
_HELD_OUT = re.compile(r"lm loss value: *([^ |]+) *\|")
_AT_ITERATION = re.compile(r"iteration +(\d{1,15})\b")
_MEMORY = re.compile(r"\| max allocated: *([\d.]+)")
_MAX_SHAPES = 16
_SHORTEST_STAMP = len("2024-05-01 10:11:12")

_FIELDS: dict[str, tuple[str, type[int] | type[float]]] = {
    "current time": ("time", float),
    "consumed samples": ("consumed_samples", int),
    "consumed tokens": ("consumed_tokens", int),
    "elapsed time per iteration (ms)": ("step_seconds", float),
    "learning rate": ("lr", float),
    "global batch size": ("global_batch_size", int),
    "lm loss": ("loss", float),
    "loss scale": ("loss_scale", float),
    "grad norm": ("grad_norm", float),
    "actual seqlen": ("seq_length", int),
    "actual seq length": ("seq_length", int),
    "number of skipped iterations": ("skipped", int),
    "number of nan iterations": ("nan_iterations", int),
    "samples per second": ("logged_samples_per_second", float),
    "tokens per gpu per second (tgs)": ("tokens_per_second_per_device", float),
    "tokens/sec/gpu": ("tokens_per_second_per_device", float),
    "TFLOPs": ("logged_tflops_per_device", float),
    "throughput per GPU (TFLOP/s/GPU)": ("logged_tflops_per_device", float),
}
"""Name in the log → field of a `step` event; other names are left out."""

_EMPTY_STEP: Event = {"event": "step", "time": None, "loss": math.nan}

_KNOWN = (
    ("%|", "progress bar"),
    ("time (ms)", "timing"),
    ("across ranks (ms)", "timing"),
    ("..: (", "timing"),
    ("datetime: ", "time of day"),
    ("checkpoint", "checkpoint on its way"),
    ("arning", "warning"),
    ("WARN", "warning"),
    (" > ", "start-up message"),
    ("> ", "start-up message"),
)
"""What a line holds that is known and not needed → its kind; the first that fits."""


class MegatronReader:
    facts = "the log's arguments"
    averages = True

    def __init__(self) -> None:
        self.header = Header()
        self.begins = False
        self.total_steps: int | None = None
        self._in_arguments = False
        self._shapes: list[_Shape] = []
        self._memory: float | None = None

    @property
    def program(self) -> str:
        return f"{self.header.program or 'AscendSpeed / Megatron'} log"

    def lines(self, path: Path) -> Lines:
        return LogLines(path)

    def is_whole(self, line: str) -> bool:
        return line.rstrip().endswith("|")

    def parse(self, line: str) -> Parsed:
        if "iteration" in line:
            at = line.find("iteration ")
            for shape in self._shapes:
                if event := shape.read(line, at):
                    return self._with_memory(event)
            if (steps := self._read_steps(line)) is not None:
                return steps
        return self._read_other(line)

    def _read_steps(self, line: str) -> Event | list[Event] | None:
        """The steps of a line whose shape is new, or that other text is mixed into."""
        heads = list(_HEAD.finditer(line))
        if not heads:
            return None
        ends = [*(head.start() for head in heads[1:]), len(line)]
        events = []
        for head, end in zip(heads, ends, strict=True):
            *closed, _ = line[head.end() : end].split("|")  # what no bar ends may be cut
            if event := _read_fields(head, closed):
                events.append(
                    {**event, "time": event["time"] or unix_seconds(line[: head.start()])}
                )
        if events:
            self.total_steps = int(heads[-1].group(2))
        if len(events) == 1 and len(self._shapes) < _MAX_SHAPES:
            self._shapes += _Shape.of(line, heads[0])
        if not events:
            return None
        return self._with_memory(events[0]) if len(events) == 1 else events

    def _with_memory(self, event: Event) -> Event:
        self._in_arguments = False
        if self._memory is not None:
            event["memory_bytes"] = int(self._memory * 2**20)
            self._memory = None
        return event

    def _read_other(self, line: str) -> Parsed:
        if not line or line.isspace():
            return "blank"
        if self._in_arguments and (argument := _ARGUMENT.search(line)):
            name, value = map(as_text, argument.groups())
            self.header.add(name, value.strip())
            return FACT
        if "----" in line:
            return self._read_ruler(line)
        if "loss at" in line and (held_out := _read_held_out(line)):
            return held_out
        if "successfully saved" in line and (at := _AT_ITERATION.search(line)):
            return {"event": "checkpoint", "time": unix_seconds(line), "step": int(at.group(1))}
        if "parameters on" in line and (found := _PARAMETERS.search(line)):
            tensor, pipeline, parameters = map(int, found.groups())
            self.header.parameters_of_rank[tensor, pipeline] = parameters
            return FACT
        if "memory (MB)" in line and (allocated := _MEMORY.search(line)):
            megabytes = number(allocated.group(1))
            if megabytes is not None and megabytes < 1e9:
                self._memory = max(megabytes, self._memory or 0.0)
            return FACT
        if "[" in line and (milestone := self._read_milestone(line)):
            return milestone
        for needle, kind in _KNOWN:
            if needle in line:
                return kind
        return None

    def _read_ruler(self, line: str) -> str:
        if "rguments" in line and (frame := _FRAME.search(line)):
            title, _, more = frame.group(1).partition(" ")
            self.header = self.header.renewed(**({"program": title} if more else {}))
            self._in_arguments = self.begins = True
            return FACT
        if "end of" in line:
            self._in_arguments = False
        return "ruler"

    def _read_milestone(self, line: str) -> Parsed:
        """`[before the start of training step] datetime: …` and its like."""
        if "[before the start of training" in line:
            self.begins, self.header.time = True, unix_seconds(line)
            return FACT
        done = "[after training is done]" in line
        if done or "[exiting program" in line:
            status = "done" if done else "stopped"
            return {"event": "end", "time": unix_seconds(line), "status": status}
        return None


class _Shape:
    """Names of a line's fields in their order, compiled: most lines of a log have one of few."""

    def __init__(self, names: list[str]) -> None:
        values = (r"([^ |]+)" if name in _FIELDS else r"[^ |]+" for name in names)
        pairs = zip(names, values, strict=True)
        pieces = "".join(rf" {re.escape(name)}: *{value} \|" for name, value in pairs)
        self._match = re.compile(rf"{_HEAD.pattern}{pieces}\s*$").match
        known = [_FIELDS[name] for name in names if name in _FIELDS]
        fields = [("step", int), ("total", None), *known]
        self._ints = [kind is int for _, kind in fields]
        self._floats = [kind is float for _, kind in fields]
        order = [*compress(fields, self._ints), *compress(fields, self._floats)]
        self._names = [*_EMPTY_STEP, *(field for field, _ in order)]

    @classmethod
    def of(cls, line: str, head: "re.Match[str]") -> "list[_Shape]":
        """The shape of a line, unless it is not made of fields to its end."""
        names = [piece.partition(":")[0].strip() for piece in line[head.end() :].split("|")[:-1]]
        shape = cls(names)
        return [shape] if 0 < len(names) < 90 and shape.read(line, head.start()) else []

    def read(self, line: str, at: int) -> Event | None:
        """The step of a line whose head begins at `at`; None if it has another shape."""
        if (match := self._match(line, at)) is None:
            return None
        groups = match.groups()
        ints, floats = compress(groups, self._ints), compress(groups, self._floats)
        values = chain(_EMPTY_STEP.values(), map(int, ints), map(float, floats))
        try:
            event: Event = dict(zip(self._names, values, strict=True))
        except ValueError:
            return None
        if at > _SHORTEST_STAMP and event["time"] is None:
            event["time"] = unix_seconds(line[:at])
        return _in_seconds(event)


def _read_fields(head: "re.Match[str]", pieces: list[str]) -> Event | None:
    """A step from its head and `name: value` pieces; None if none of the pieces is known."""
    event = {**_EMPTY_STEP, "step": int(head.group(1))}
    known = False
    for piece in pieces:
        name, _, text = piece.partition(":")
        if name.strip() in _FIELDS:
            known = True
            field, kind = _FIELDS[name.strip()]
            value = count(text.strip()) if kind is int else number(text.strip())
            if value is not None:
                event[field] = value
    return _in_seconds(event) if known else None


def _in_seconds(event: Event) -> Event:
    if "step_seconds" in event:
        event["step_seconds"] /= 1000  # logged in milliseconds
    return event


def _read_held_out(line: str) -> Event | None:
    """`validation loss at iteration N | lm loss value: …`, or `… at the end of training for …`."""
    begin = line.find("loss at")
    where, _, values = line[begin:].partition("|")
    found = _HELD_OUT.search(values)
    loss = number(found.group(1)) if found else None
    if loss is None:
        return None
    at = _AT_ITERATION.search(where)
    return {
        "event": "test" if "test" in where else "validation",
        "time": unix_seconds(line[:begin]),
        "step": int(at.group(1)) if at else None,
        "loss": loss,
    }
