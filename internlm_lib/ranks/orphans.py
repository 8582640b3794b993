"""No process outlives the one that started it, however that one ends.

A scheduler's SIGTERM or an out-of-memory SIGKILL gives the starter no chance to clean up, so every
child looks after itself: the kernel kills torchrun with its starter (`processes.die_with_parent`),
and each rank, which torchrun starts in a session of its own, watches the processes above it.
"""

import os
import signal
import threading
import time
from pathlib import Path

_POLL_SECONDS = 0.5


def process_started(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None if it is gone or a zombie.

    Tells a process from a later one that got the same number. Source: proc(5), fields 3 and 22.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def kill_group_when_gone(*pids: int) -> None:
    """Watch processes from a thread; when one is gone, kill this process's whole group."""
    watched = {pid: process_started(pid) for pid in pids}

    def watch() -> None:
        while all(start and process_started(pid) == start for pid, start in watched.items()):
            time.sleep(_POLL_SECONDS)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="orphan-watch", daemon=True).start()
