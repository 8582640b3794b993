"""Ranks under torchrun: how they end, what is said of it, what they are given.

Each start of torchrun takes seconds, hence one per way to end, shared by the tests.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from internlm_lib.errors import KitError, RanksHangError, StoppedError, WorkerError
from internlm_lib.ranks.launch import LAUNCHER_VARIABLE, launch
from internlm_lib.ranks.orphans import process_started
from internlm_lib.ranks.plan import LOGS_VARIABLE
from internlm_lib.ranks.stopping import STOPPED_EXIT_CODE
from internlm_lib.run_folder import RunFolder

PROCESSORS = 12
RANK_MODULE = """
import ctypes, json, os, signal, sys, time
from internlm_lib.errors import InputError, StoppedError
from internlm_lib.ranks.rank import rank_main
from internlm_lib.ranks.stopping import StopRequest

def wait_in_a_collective():
    # blocks in C, where Python's signal handlers do not run and signals do not wake
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

def work(folder, how, *more):
    rank = int(os.environ["RANK"])
    print(f"rank {rank} prints")
    print(f"rank {rank} complains", file=sys.stderr)
    stop = StopRequest() if how in ("stop", "die") else None
    if how == "stay":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    seen = {"folder": str(folder.path), "more": more, "environment": dict(os.environ),
            "pid": os.getpid()}
    (folder.path / f"seen{rank}.json").write_text(json.dumps(seen))
    if how == "succeed":
        return
    if how == "stop":
        while not stop.requested:
            time.sleep(0.05)
        time.sleep(2.0 * rank)  # saves; rank 0 is gone meanwhile
        raise StoppedError(f"rank {rank} stopped after step 7")
    if how in ("stay", "hang"):
        wait_in_a_collective()
    if rank == 0:
        wait_in_a_collective() if how == "die" else time.sleep(120)
    while not (folder.path / "seen0.json").exists():
        time.sleep(0.05)  # torchrun would end rank 0 before it has a log
    if how == "refuse":
        raise InputError("data.train_path = 'x': no such file")
    if how == "break":
        raise ValueError("seven is not eight")
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    rank_main(work)
"""


@dataclass
class Outcome:
    """What came of one launch."""

    folder: RunFolder
    logs: Path
    error: KitError | None = None
    seconds: float = 0.0
    ticks: list[int] = field(default_factory=list)
    """The threads that `on_tick` was called from."""

    @property
    def message(self) -> str:
        assert self.error is not None, "the launch succeeded"
        return str(self.error)

    def log(self, name: str) -> str:
        return (self.logs / name).read_text()

    def seen(self, rank: int) -> dict[str, Any]:
        return json.loads((self.folder.path / f"seen{rank}.json").read_text())


@pytest.fixture(scope="module")
def rank_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A module for ranks to run, on their PYTHONPATH; its name."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "rank_of_a_test.py").write_text(RANK_MODULE)
    path = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        yield "rank_of_a_test"


@pytest.fixture(scope="module")
def start(rank_module: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """Launches two ranks that end in a certain way, in a folder where others ran before.

    `then` is raised from `on_tick` once both ranks are at work.
    """

    def start(*arguments: str, then: BaseException | None = None, grace: float = 5.0) -> Outcome:
        folder = RunFolder.of("run", tmp_path_factory.mktemp("project"))
        outcome = Outcome(folder, folder.path / "logs")
        outcome.logs.mkdir(parents=True)
        for old in ("rank0.log", "rank1.error", "rank7.log", "rank7.error", "kept.txt"):
            (outcome.logs / old).write_text("of an earlier launch")
        begin = time.monotonic()

        def on_tick() -> None:
            outcome.ticks.append(threading.get_ident())
            if then and all((folder.path / f"seen{rank}.json").exists() for rank in (0, 1)):
                raise then

        try:
            launch(
                rank_module, folder, *arguments, world_size=2, logs=outcome.logs,
                on_tick=on_tick, grace_seconds=grace,
            )  # fmt: skip
        except KitError as error:
            outcome.error = error
        outcome.seconds = time.monotonic() - begin
        return outcome

    return start


@pytest.fixture(scope="module")
def success(start: Callable[..., Outcome]) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.setattr(os, "cpu_count", lambda: PROCESSORS)
        patch.setenv("PET_NO_PYTHON", "1")  # torchrun would take it for an option of its own
        return start("succeed", "--an-option", "two words")


@pytest.fixture(scope="module")
def refusal(start: Callable[..., Outcome]) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "5")
        return start("refuse")


@pytest.fixture(scope="module")
def breakdown(start: Callable[..., Outcome]) -> Outcome:
    return start("break")


@pytest.fixture(scope="module")
def kill(start: Callable[..., Outcome]) -> Outcome:
    return start("die")


@pytest.fixture(scope="module")
def stop(start: Callable[..., Outcome]) -> Outcome:
    return start("stop", then=KeyboardInterrupt(), grace=40.0)


@pytest.fixture(scope="module")
def hang(start: Callable[..., Outcome]) -> Outcome:
    return start("hang", then=RanksHangError("no step for 3 s"), grace=40.0)


def test_ranks_that_return_are_a_success(success: Outcome) -> None:
    assert success.error is None
    assert not list(success.logs.glob("*.error"))


def test_every_rank_is_given_the_run_and_the_arguments(success: Outcome) -> None:
    for rank in (0, 1):
        seen = success.seen(rank)
        assert seen["folder"] == str(success.folder.path)
        assert seen["more"] == ["--an-option", "two words"]
        assert seen["environment"]["WORLD_SIZE"] == "2"
        assert seen["environment"]["TOKENIZERS_PARALLELISM"] == "false"


def test_every_rank_writes_its_own_log(success: Outcome) -> None:
    for rank in (0, 1):
        log = success.log(f"rank{rank}.log")
        assert sorted(log.splitlines()) == [f"rank {rank} complains", f"rank {rank} prints"]
    assert "prints" not in success.log("launcher.log")


def test_logs_of_earlier_ranks_are_gone_and_other_files_are_not(success: Outcome) -> None:
    names = {path.name for path in success.logs.iterdir()}
    assert names == {"launcher.log", "rank0.log", "rank1.log", "kept.txt"}


def test_the_caller_gets_a_tick_twice_a_second_in_its_own_thread(success: Outcome) -> None:
    assert set(success.ticks) == {threading.get_ident()}
    assert success.seconds / 2 - 1 <= len(success.ticks) / 2 <= success.seconds


def test_ranks_share_the_processors(success: Outcome) -> None:
    threads = {success.seen(rank)["environment"]["OMP_NUM_THREADS"] for rank in (0, 1)}
    assert threads == {str(PROCESSORS // 2)}


def test_a_users_number_of_threads_is_respected(refusal: Outcome) -> None:
    assert refusal.seen(1)["environment"]["OMP_NUM_THREADS"] == "5"


def test_an_error_raised_on_purpose_is_told_without_its_traceback(refusal: Outcome) -> None:
    assert refusal.message == (
        "rank_of_a_test: rank1 failed:\ndata.train_path = 'x': no such file\n"
        f"Its log: {refusal.logs / 'rank1.log'}"
    )
    assert "Traceback" in refusal.log("rank1.log")


def test_any_other_error_is_told_with_its_traceback(breakdown: Outcome) -> None:
    head, _, rest = breakdown.message.partition("\n")
    assert head == "rank_of_a_test: rank1 failed:"
    assert rest.startswith("Traceback (most recent call last)")
    assert 'in work\n    raise ValueError("seven is not eight")' in rest
    assert rest.endswith(
        f"ValueError: seven is not eight\n\nIts log: {breakdown.logs / 'rank1.log'}"
    )


def test_a_killed_rank_is_told_with_its_signal(kill: Outcome) -> None:
    assert type(kill.error) is WorkerError
    assert kill.message == (
        "rank_of_a_test: rank1 was killed by SIGKILL (out of memory? see `dmesg`)\n"
        f"Its log: {kill.logs / 'rank1.log'}"
    )


def test_a_rank_in_a_collective_ends_when_its_sibling_dies(kill: Outcome) -> None:
    """torchrun's SIGTERM would find it in C code, and torchrun wait 30 s before it kills."""
    assert "another rank of this node died: this one ends, too" in kill.log("rank0.log")
    assert kill.seconds < 25


def test_ranks_that_are_asked_to_stop_end_by_themselves(stop: Outcome) -> None:
    assert type(stop.error) is StoppedError and isinstance(stop.error.__cause__, KeyboardInterrupt)
    assert stop.message == "rank 0 stopped after step 7"
    assert stop.log("rank1.stopped") == "rank 1 stopped after step 7"
    assert not list(stop.logs.glob("*.error"))
    assert stop.error.exit_code == STOPPED_EXIT_CODE == 5


def test_hanging_ranks_write_their_stacks_and_are_killed_at_once(hang: Outcome) -> None:
    assert type(hang.error) is RanksHangError and hang.message == "no step for 3 s"
    for rank in (0, 1):
        log = hang.log(f"rank{rank}.log")
        assert "most recent call first" in log and "in wait_in_a_collective" in log
        assert process_started(hang.seen(rank)["pid"]) is None
    assert hang.seconds < 25 < 40


@pytest.mark.parametrize("outcome", ["refusal", "breakdown", "kill"])
def test_a_rank_that_waits_for_a_failed_one_is_ended(
    outcome: str, request: pytest.FixtureRequest
) -> None:
    found: Outcome = request.getfixturevalue(outcome)
    assert found.seconds < 60
    assert "rank 0 prints" in found.log("rank0.log")
    assert not (found.logs / "rank0.error").exists()


def test_ranks_that_do_not_end_are_killed_after_the_grace(rank_module: str, tmp_path: Path) -> None:
    folder = RunFolder.of("run", tmp_path)
    seen = folder.path / "seen0.json"
    started: list[psutil.Process] = []

    def interrupt() -> None:
        if seen.exists():
            started.extend(set(psutil.Process().children(recursive=True)) - before)
            raise KeyboardInterrupt

    folder.path.mkdir(parents=True)
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(KeyboardInterrupt):
        launch(
            rank_module, folder, "stay",
            world_size=1, logs=tmp_path / "logs", on_tick=interrupt, grace_seconds=1.0,
        )  # fmt: skip
    assert len(started) == 2  # torchrun and its rank
    assert not any(process.is_running() for process in started)
    assert "Unable to shutdown process" in (tmp_path / "logs" / "launcher.log").read_text()


def run_rank(rank_module: str, folder: RunFolder, rank: int, how: str) -> int:
    """One rank without torchrun; its exit code."""
    environment = {
        **os.environ, "RANK": str(rank), "WORLD_SIZE": "2",
        LOGS_VARIABLE: str(folder.path), LAUNCHER_VARIABLE: str(os.getpid()),
    }  # fmt: skip
    command = [sys.executable, "-m", rank_module, str(folder.path), how]
    return subprocess.run(command, env=environment, start_new_session=True).returncode


@pytest.mark.parametrize(
    ("how", "code", "error"),
    [("succeed", 0, None), ("refuse", 1, "data.train_path = 'x': no such file")],
)
def test_a_rank_leaves_its_message_and_ends_with_a_code(
    rank_module: str, tmp_path: Path, how: str, code: int, error: str | None
) -> None:
    folder = RunFolder.of("run", tmp_path)
    folder.path.mkdir(parents=True)
    (folder.path / "seen0.json").touch()
    assert run_rank(rank_module, folder, 1, how) == code
    found = folder.path / "rank1.error"
    assert (found.read_text() if found.exists() else None) == error


def test_ranks_start_without_torch_until_they_need_it() -> None:
    code = "import sys, internlm_lib.ranks.rank; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n"


def test_a_process_that_runs_has_a_start_and_one_that_ended_has_none() -> None:
    assert process_started(os.getpid()) == process_started(os.getpid()) is not None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    alive = process_started(child.pid)
    assert alive is not None and int(alive) >= int(process_started(os.getpid()) or 0)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_started(child.pid) is None  # a zombie
    child.wait()
    assert process_started(child.pid) is None  # gone


def test_a_processs_name_may_hold_anything() -> None:
    """The name stands in brackets, unescaped, before the fields that are read."""
    code = "import ctypes; ctypes.CDLL(None).prctl(15, b'a) Z 1 ('); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as named:
        assert named.stdout and named.stdout.readline()
        assert "(a) Z 1 ()" in Path(f"/proc/{named.pid}/stat").read_text()
        since_boot = psutil.Process(named.pid).create_time() - psutil.boot_time()
        ticks = int(process_started(named.pid) or 0)
        named.kill()
    assert ticks / os.sysconf("SC_CLK_TCK") == pytest.approx(since_boot, abs=1)
