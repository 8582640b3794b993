"""What every child process of the kit does first: it ties its life to its parent's."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies; may be `Popen`'s `preexec_fn`.

    The kernel means the thread that started this process (prctl(2), PR_SET_PDEATHSIG).
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with(parent: int) -> None:
    """As `die_with_parent`, also if the process `parent` has died before."""
    die_with_parent()
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
