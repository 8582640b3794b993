"""How ranks are asked to stop, and how they tell that they did."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from internlm_lib.errors import StoppedError
from internlm_lib.ranks.environment import ranks_on_this_node
from internlm_lib.ranks.plan import LOGS_VARIABLE

STOPPED_EXIT_CODE = StoppedError.exit_code
"""A rank's exit code: it stopped because it was asked to, and everything is saved."""
_TERMINATED_EXIT_CODE = 128 + signal.SIGTERM
_POLL_SECONDS = 0.5


class StopRequest:
    """From when it is made, SIGTERM and SIGINT ask this rank to stop at the next good moment.

    The work reads `requested` between steps, saves, and raises `StoppedError`. All ranks should
    agree on the step first: they are told at slightly different times.

    If the signal came because another rank of this node died, or if one dies later, the process
    ends at once: the step would never be finished. A thread looks after that, because Python runs
    signal handlers between bytecodes only, and the main thread may wait inside a collective.

    Make it in the main thread, once.
    """

    def __init__(self) -> None:
        self._requested = threading.Event()
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._writer = writer  # the interpreter keeps its number only
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _do_nothing)
        watch = threading.Thread(target=self._watch, args=(reader,), name="stop-watch", daemon=True)
        watch.start()

    @property
    def requested(self) -> bool:
        """Whether this rank has been asked to stop."""
        return self._requested.is_set()

    def _watch(self, signals: socket.socket) -> None:
        while not {signal.SIGTERM, signal.SIGINT} & set(signals.recv(16)):
            pass  # another signal's
        while True:
            if sibling_died():
                print("another rank of this node died: this one ends, too", file=sys.stderr)
                os._exit(_TERMINATED_EXIT_CODE)
            self._requested.set()
            time.sleep(_POLL_SECONDS)


def _do_nothing(number: int, frame: object) -> None:
    """Replaces the default action; `StopRequest`'s thread does the work."""


def sibling_died() -> bool:
    """Whether a rank of this node is gone that did not stop on request.

    Counts the launcher's living children that run what this process runs. Works under torchrun and
    DeepSpeed's launcher.
    """
    ranks = ranks_on_this_node() or 1
    own, living = psutil.Process().cmdline(), 0
    for process in psutil.Process(os.getppid()).children():
        try:
            living += process.cmdline() == own
        except psutil.Error:  # gone, or a zombie
            continue
    return living + _stopped_siblings(ranks) < ranks


def _stopped_siblings(ranks: int) -> int:
    node = int(os.environ.get("RANK", 0)) // ranks
    local = range(node * ranks, (node + 1) * ranks)
    logs = os.environ.get(LOGS_VARIABLE)
    return sum(stopped_file(Path(logs), rank).exists() for rank in local) if logs else 0


def stopped_file(logs: Path, rank: int) -> Path:
    """Left by a rank that stopped on request; holds what it said."""
    return logs / f"rank{rank}.stopped"


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Make SIGTERM, a scheduler's way to stop a job, do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
