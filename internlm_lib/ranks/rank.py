"""What every rank does first and last: its own log, a watch on its parents, its traceback."""

import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from internlm_lib.errors import KitError, StoppedError
from internlm_lib.files import write_text
from internlm_lib.ranks.launch import LAUNCHER_VARIABLE
from internlm_lib.ranks.orphans import kill_group_when_gone
from internlm_lib.ranks.plan import LOGS_VARIABLE
from internlm_lib.ranks.stopping import STOPPED_EXIT_CODE, stopped_file
from internlm_lib.run_folder import RunFolder


def rank_main(work: Callable[..., None]) -> None:
    """Run `work(run_folder, *arguments)` as one rank that a launch plan started with these.

    Output goes to `rank<N>.log`; so do, on SIGUSR1, the stacks of all threads. If `work` raises
    StoppedError, `rank<N>.stopped` gets its message, and the rank ends with STOPPED_EXIT_CODE. If
    it raises anything else, the message of a KitError or the traceback goes to `rank<N>.error`, and
    the rank ends with code 1.
    """
    logs, rank = Path(os.environ[LOGS_VARIABLE]), int(os.environ["RANK"])
    _watch_parents()
    logs.mkdir(parents=True, exist_ok=True)
    error_file = logs / f"rank{rank}.error"
    for old in (error_file, stopped_file(logs, rank)):
        old.unlink(missing_ok=True)
    _redirect_output(logs / f"rank{rank}.log")
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    folder, *arguments = sys.argv[1:]
    try:
        work(RunFolder.at(Path(folder)), *arguments)
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        write_text(stopped_file(logs, rank), str(stopped))
        _exit(STOPPED_EXIT_CODE)
    except BaseException as error:
        traceback.print_exc()
        text = str(error) if isinstance(error, KitError) else traceback.format_exc()
        write_text(error_file, text)
        _exit(1)


def _watch_parents() -> None:
    """torchrun is watched; its starter, too, unless the command was given by hand or a cluster."""
    starter = os.environ.get(LAUNCHER_VARIABLE)
    kill_group_when_gone(os.getppid(), *([int(starter)] if starter else []))


def _exit(code: int) -> None:
    # Not sys.exit: other ranks may wait for this one inside a collective's destructor.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _redirect_output(log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
