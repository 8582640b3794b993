"""What a log's lines mean in their order: attempts, repetitions, what a step's time includes."""

import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

from internlm_lib.logs.facts import Facts, Training, settle
from internlm_lib.logs.reader import FACT, Event, Parsed, Reader
from internlm_lib.logs.values import as_text, rank_label

_RECENT = 64
"""Steps that are remembered, to tell another rank's late line from a step taken again."""
_EARLY = 100
"""Events before the first step that are kept until it comes."""
_EXAMPLES = 20
_EXAMPLE_LENGTH = 160
_LATEST = 1e11
"""Unix seconds beyond which a number is no time."""


class Bookkeeper:
    """Turns what a reader parsed, line by line, into journal events, and counts the lines."""

    def __init__(self, reader: Reader, facts: Facts, source: dict[str, Any]) -> None:
        """`source` holds further fields of every `start` event, among them the file's name."""
        self.reader = reader
        self.facts = facts
        self.source = source
        self.told_by = f"{source['source']}: {reader.facts}"
        self.training: Training | None = None
        """Of the attempt whose steps are being read; None before the first step."""
        self.last_step = 0
        self.lines = 0
        self.counts: Counter[str] = Counter()
        """`understood`, `unknown`, `duplicates`, `restarts`, `missing_losses`."""
        self.ignored: Counter[str] = Counter()
        self.examples: list[dict[str, Any]] = []
        self._starting = True
        """Whether the next step begins an attempt."""
        self._recent: dict[int, tuple[Event, str]] = {}
        self._held_out: deque[tuple[Any, ...]] = deque(maxlen=_RECENT)
        """Validations and checkpoints of late, to know when another rank repeats one."""
        self._early: deque[Event] = deque(maxlen=_EARLY)
        self._end: Event | None = None
        self._includes: list[str] = []
        self._interval: int | None = None
        self._time: float | None = None

    def take(self, parsed: Parsed, line: str) -> Sequence[Event]:
        """The journal events of a line; counts it."""
        self.lines += 1
        if self.reader.begins:
            self._begin()
        if self._starting:
            self.reader.header.note(line)
        if isinstance(parsed, str):
            if parsed == FACT:
                self.counts["understood"] += 1
            else:
                self.ignored[parsed] += 1
        elif isinstance(parsed, dict):
            given = self._accept(parsed, line)
            self.counts["duplicates" if given is None else "understood"] += 1
            return given or ()
        elif parsed is None:
            self._remember(line)
        else:
            accepted = [self._accept(event, line) for event in parsed]
            found = [given for given in accepted if given is not None]
            self.counts["understood" if found else "duplicates"] += 1
            return [event for given in found for event in given]
        return ()

    def finish(self) -> Iterator[Event]:
        """The events still held back, and the training's end."""
        yield from self._early
        if self._end is not None:
            yield self._end
            return
        total = self._train_iters()
        done = total is not None and self.last_step >= total
        yield {
            "event": "end",
            "time": self._time,
            "status": "done" if done else "stopped",
            "step": self.last_step,
            "reason": "the log ends here",
        }

    def summary(self) -> Event:
        """The `import` event: every line is in exactly one of `understood`, `ignored` (per kind),
        `unknown` and `duplicates`."""
        names = ("understood", "unknown", "duplicates", "restarts", "missing_losses")
        return {
            "event": "import",
            "time": self._time,
            "lines": self.lines,
            **{name: self.counts[name] for name in names},
            "ignored": dict(self.ignored),
            "unknown_examples": self.examples,
        }

    def _begin(self) -> None:
        """The log shows a training that starts."""
        self.reader.begins = False
        self._starting = True
        self._recent.clear()
        self._held_out.clear()

    def _remember(self, line: str) -> None:
        self.counts["unknown"] += 1
        if len(self.examples) < _EXAMPLES:
            text = as_text(line[:_EXAMPLE_LENGTH])
            self.examples.append({"line": self.lines, "text": text})

    def _accept(self, event: Event, line: str) -> list[Event] | None:
        """The journal events that a parsed one gives; None for a repetition."""
        time = event["time"]
        if time is not None and not 0 < time < _LATEST:
            time = event["time"] = None
        is_step = event["event"] == "step"
        accepted = self._accept_step(event, line) if is_step else self._accept_other(event)
        if accepted is not None and time is not None:
            self._time = time
        return accepted

    def _accept_step(self, event: Event, line: str) -> list[Event] | None:
        step = event["step"]
        if not self._starting and step <= self.last_step:
            if self._is_repetition(event, line):
                return None
            self._begin()
        before: list[Event] = []
        if self._starting:
            before = self._start(event)
        else:
            if (interval := step - self.last_step) > 1 and self.reader.averages:
                self._interval = event["log_interval"] = interval
            else:
                self._interval = None
        self._complete(event)
        self.last_step = step
        self._recent[step] = (event, line)
        if len(self._recent) > _RECENT:
            del self._recent[next(iter(self._recent))]
        before.append(event)
        return before

    def _is_repetition(self, event: Event, line: str) -> bool:
        """Whether a step that is not new is a line seen before, and not the step taken again.

        It is if it has the same numbers, is of the step just read, or is another rank's.
        """
        if (seen := self._recent.get(event["step"])) is None:
            return False
        known, known_line = seen
        if event["step"] == self.last_step or _same(event, known):
            return True
        rank, known_rank = rank_label(line), rank_label(known_line)
        return None not in (rank, known_rank) and rank != known_rank

    def _start(self, first: Event) -> list[Event]:
        """The events that come before the first step of an attempt."""
        header = self.reader.header
        self.counts["restarts"] += self.training is not None
        self.training = training = settle(header, first, self.facts, self.told_by)
        begun = header.time
        if begun is None or begun < (self._time or 0.0):
            begun = first["time"]
        if (stated := header.whole("log_interval")) is not None:
            self._interval = stated if stated > 1 else None
        if self._interval is not None:
            first["log_interval"] = self._interval
        # A step that is a mean over an interval stands for the steps before it, too.
        first_step = max(1, first["step"] - (self._interval or 1) + 1)
        start = {
            "event": "start",
            "time": begun,
            "role": "candidate",
            "engine": self.reader.program,
            "layout": header.layout,
            "world_size": training.world_size,
            "device": training.device,
            "device_name": training.device_name,
            "precision": training.precision,
            "train_iters": self._train_iters(),
            "seq_length": training.seq_length,
            "global_batch_size": training.global_batch_size,
            "tokens_per_step": self._tokens_per_step(first),
            "parameters": header.parameters,
            "first_step": first_step,
            **self.source,
            "arguments": header.arguments,
            "model": training.model,
        }
        before = [] if self._end is None else [self._end]
        events = [*before, start, *self._early]
        self._early.clear()
        self._includes = []
        self._starting, self._end = False, None
        return events

    def _complete(self, event: Event) -> None:
        """Add what follows from a step and its training."""
        assert self.training is not None
        if event["loss"] != event["loss"]:
            self.counts["missing_losses"] += 1
        if "seq_length" in event and event["seq_length"] == self.training.seq_length:
            del event["seq_length"]
        if self._includes:
            event["includes"] = self._includes
            self._includes = []
        world, tokens = self.training.world_size, self.training.tokens_of(event)
        if world and tokens:
            seconds, speed = event.get("step_seconds"), event.get("tokens_per_second_per_device")
            if speed is None and seconds is not None and 0 < seconds < math.inf:
                event["tokens_per_second_per_device"] = tokens / seconds / world
            elif seconds is None and speed is not None and 0 < speed < math.inf:
                event["step_seconds"] = tokens / speed / world

    def _accept_other(self, event: Event) -> list[Event] | None:
        kind = event["event"]
        if event.get("step") is None:
            event["step"] = self.last_step
        if kind == "end":
            if self._end is not None:
                return None
            self._end = event if self.training is not None else None
            return []
        if kind in ("validation", "checkpoint") and kind not in self._includes:
            self._includes = sorted([*self._includes, kind])
        signature = (kind, event["step"], event.get("data"), repr(event.get("loss")))
        if signature in self._held_out:
            return None
        self._held_out.append(signature)
        if self._starting:
            self._early.append(event)
            return []
        return [event]

    def _train_iters(self) -> int | None:
        return self.reader.header.whole("train_iters") or self.reader.total_steps

    def _tokens_per_step(self, first: Event) -> int | None:
        assert self.training is not None
        stated = self.training.tokens_of({})
        return stated if stated is not None else first.get("tokens")


def _same(one: Event, other: Event) -> bool:
    keys = ("loss", "lr", "grad_norm", "grad_norms", "consumed_samples", "consumed_tokens")
    return all(repr(one.get(key)) == repr(other.get(key)) for key in keys)
