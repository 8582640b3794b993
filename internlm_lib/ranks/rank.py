"""What every rank does first and last: its own log, a watch on its parents, its traceback."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from internlm_lib.errors import KitError
from internlm_lib.files import write_text
from internlm_lib.ranks.launch import LAUNCHER_VARIABLE, LOGS_VARIABLE
from internlm_lib.ranks.orphans import kill_group_when_gone
from internlm_lib.run_folder import RunFolder


def rank_main(work: Callable[..., None]) -> None:
    """Run `work(run_folder, *arguments)` as one rank that `launch` started with these.

    Output goes to `rank<N>.log`; if `work` raises, the message of a KitError or the traceback goes
    to `rank<N>.error`, and the rank ends with code 1.
    """
    logs, rank = Path(os.environ[LOGS_VARIABLE]), int(os.environ["RANK"])
    kill_group_when_gone(os.getppid(), int(os.environ[LAUNCHER_VARIABLE]))
    _redirect_output(logs / f"rank{rank}.log")
    folder, *arguments = sys.argv[1:]
    try:
        work(RunFolder.at(Path(folder)), *arguments)
    except BaseException as error:
        traceback.print_exc()
        text = str(error) if isinstance(error, KitError) else traceback.format_exc()
        write_text(logs / f"rank{rank}.error", text)
        sys.stderr.flush()
        # Not sys.exit: other ranks may wait for this one inside a collective's destructor.
        os._exit(1)


def _redirect_output(log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
