"""Errors a user can act on: where, what was found, what is allowed, what to do."""

from collections.abc import Sequence


class KitError(Exception):
    """Base of every error raised on purpose; the command line prints it without a traceback."""

    exit_code = 1


class InputError(KitError):
    """A value, file or folder given by the user cannot be used."""

    exit_code = 2


class ConfigError(InputError):
    """One or more problems in an experiment's parameters, all of them listed."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__("\n  - ".join([f"{source}: {count}", *self.problems]))


class MissingStageError(InputError):
    """A stage was asked to run before the stage whose output it reads."""


class WorkerError(KitError):
    """A rank of a parallel job failed; the message carries its traceback and the log to read."""


class RanksHangError(WorkerError):
    """The ranks of a parallel job run, but get no further."""


class StoppedError(KitError):
    """Work stopped because it was asked to, after saving; the same command goes on from there."""

    exit_code = 5


class VerdictError(KitError):
    """Two runs were compared and differ by more than the tolerance."""

    exit_code = 3


class NotComparableError(KitError):
    """Two runs cannot be compared, or the comparison cannot decide."""

    exit_code = 4
