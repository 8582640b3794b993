"""Which rank of a job failed first, and why, from what torchrun and the ranks left behind."""

import re
import signal
from dataclasses import dataclass
from pathlib import Path

_TAIL_LINES = 20
_FAILURE = re.compile(
    r"^  time +: (?P<time>\S+)\n  host +: .*\n"
    r"  rank +: (?P<rank>\d+) \(local_rank: \d+\)\n"
    r"  exitcode +: (?P<code>-?\d+) \(pid: (?P<pid>\d+)\)",
    re.MULTILINE,
)
"""One rank in torchrun's summary (torch/distributed/elastic/multiprocessing/errors)."""
_KILLED_BY_TORCHRUN = re.compile(r"Unable to shutdown process (\d+) via")


@dataclass(frozen=True)
class Failure:
    """One rank that did not end well."""

    time: str
    """ISO, to the second."""
    rank: int
    exit_code: int
    """Negative: the signal that killed it."""

    @property
    def killed_by(self) -> signal.Signals | None:
        return signal.Signals(-self.exit_code) if self.exit_code < 0 else None


def describe_failure(module: str, logs: Path, launcher_log: Path, returncode: int) -> str:
    """What to tell of a job that failed: the first cause, its traceback if any, the log to read.

    When a rank is killed, the others' collectives fail a moment later, and they leave tracebacks
    ("connection closed by peer"): these are not the cause.
    """
    text = launcher_log.read_text(errors="replace") if launcher_log.exists() else ""
    errors = sorted(logs.glob("rank*.error"), key=lambda path: path.stat().st_mtime_ns)
    first = _first(_failures(text))
    if first and (killed_by := first.killed_by):
        return _describe_kill(module, logs, first.rank, killed_by, errors)
    if first and (own := logs / f"rank{first.rank}.error") in errors:
        errors = [own]
    if errors:
        return (
            f"{module}: {errors[0].stem} failed:\n{errors[0].read_text()}\n"
            f"Its log: {errors[0].with_suffix('.log')}"
        )
    tail = "\n".join(text.splitlines()[-_TAIL_LINES:])
    return (
        f"{module}: torchrun ended with code {returncode} and no rank left a traceback. "
        f"Last lines of {launcher_log}:\n{tail}"
    )


def _failures(text: str) -> list[Failure]:
    """Failed ranks in torchrun's summary, but for those that torchrun itself ended."""
    ended = {int(pid) for pid in _KILLED_BY_TORCHRUN.findall(text)}
    found = [
        Failure(match["time"], int(match["rank"]), int(match["code"]))
        for match in _FAILURE.finditer(text)
        if int(match["pid"]) not in ended
    ]
    return [failure for failure in found if failure.killed_by is not signal.SIGTERM]


def _first(failures: list[Failure]) -> Failure | None:
    """The earliest. Within a second a kill is taken for the cause of tracebacks, and an abort,
    which is how a collective's own threads end, for the consequence of either."""

    def order(failure: Failure) -> tuple[str, int]:
        if failure.killed_by is signal.SIGABRT:
            return failure.time, 2
        return failure.time, 0 if failure.killed_by else 1

    return min(failures, key=order, default=None)


def _describe_kill(
    module: str, logs: Path, rank: int, killed_by: signal.Signals, errors: list[Path]
) -> str:
    hint = " (out of memory? see `dmesg`)" if killed_by is signal.SIGKILL else ""
    others = [path.stem for path in errors if path.stem != f"rank{rank}"]
    after = f"\n{', '.join(others)} failed after it" if others else ""
    return (
        f"{module}: rank{rank} was killed by {killed_by.name}{hint}{after}\n"
        f"Its log: {logs / f'rank{rank}.log'}"
    )
