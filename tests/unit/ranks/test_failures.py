"""What is told of a job that failed: the first cause, not what followed from it."""

import os
from pathlib import Path

import pytest

from internlm_lib.ranks.failures import describe_failure

PIDS = {0: 700, 1: 701, 2: 702}


def torchruns_log(*failures: tuple[str, int, int], ended: tuple[int, ...] = ()) -> str:
    """As torchrun writes it; failures are (second, rank, exit code), the last one its choice."""
    entries = [
        f"[{index}]:\n  time      : 2026-01-02_03:04:{second}\n  host      : node.example\n"
        f"  rank      : {rank} (local_rank: {rank})\n  exitcode  : {code} (pid: {PIDS[rank]}) \n"
        "  error_file: <N/A>\n  traceback : To enable traceback see: https://…"
        for index, (second, rank, code) in enumerate(failures)
    ]
    kills = [
        f"W0102 03:04:40.1 1 torch/…/api.py:1] Unable to shutdown process {PIDS[rank]} via "
        "Signals.SIGTERM, forcefully exiting via Signals.SIGKILL"
        for rank in ended
    ]
    return "\n".join([*kills, "m FAILED", "Failures:", *entries[:-1], "Root Cause:", entries[-1]])


def describe(folder: Path, log: str, errors: tuple[int, ...] = ()) -> str:
    """What is told, if ranks left tracebacks in this order."""
    (folder / "launcher.log").write_text(log)
    for second, rank in enumerate(errors):
        error = folder / f"rank{rank}.error"
        error.write_text(f"error of {rank}")
        os.utime(error, (second, second))
    return describe_failure("m", folder, folder / "launcher.log", 1)


def test_a_kill_comes_before_the_tracebacks_it_caused(tmp_path: Path) -> None:
    log = torchruns_log(("05", 0, 1), ("05", 2, -6), ("05", 1, -9))
    told = describe(tmp_path, log, errors=(0,))
    assert told.splitlines()[0] == ("m: rank1 was killed by SIGKILL (out of memory? see `dmesg`)")
    assert told.splitlines()[1:] == ["rank0 failed after it", f"Its log: {tmp_path}/rank1.log"]


def test_a_crash_is_told_with_its_signal(tmp_path: Path) -> None:
    told = describe(tmp_path, torchruns_log(("05", 0, -15), ("05", 2, -11)))
    assert told.startswith("m: rank2 was killed by SIGSEGV\n")


@pytest.mark.parametrize(
    "log",
    [
        # torchrun itself killed rank 0, which did not heed its SIGTERM
        torchruns_log(("04", 0, -9), ("05", 1, 1), ended=(0,)),
        torchruns_log(("05", 0, -15), ("05", 1, 1)),
        torchruns_log(("06", 0, -11), ("05", 1, 1)),
        torchruns_log(("05", 0, -6), ("05", 1, 1)),
        torchruns_log(("05", 0, 143), ("05", 1, 1)),
    ],
    ids=["killed by torchrun", "ended by torchrun", "later crash", "abort", "left by itself"],
)
def test_a_traceback_is_told_though_another_rank_was_killed_after_it(
    tmp_path: Path, log: str
) -> None:
    assert describe(tmp_path, log, errors=(1,)).startswith("m: rank1 failed:\nerror of 1\n")


def test_of_several_tracebacks_the_first_is_told(tmp_path: Path) -> None:
    assert describe(tmp_path, "", errors=(1, 0, 2)).startswith("m: rank1 failed:\nerror of 1\n")


def test_without_a_cause_torchruns_own_words_are_told(tmp_path: Path) -> None:
    lines = [f"line {number}" for number in range(30)]
    told = describe(tmp_path, "\n".join(lines))
    assert told.splitlines()[0].startswith("m: torchrun ended with code 1 and no rank left a trace")
    assert told.splitlines()[1:] == lines[-20:]
