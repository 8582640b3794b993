"""What goes wrong while preprocessing leaves nothing half-written, and says what to do."""

import ctypes
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from internlm_lib.data.tokenizer import train_tokenizer
from internlm_lib.files import sha256_of
from tests.conftest import heed_interrupts

RECORDS = [
    {"instruction": f"What is {n} plus {n}?", "input": "", "output": f"It is {2 * n}, twice {n}."}
    for n in range(6000)
]
MARK = "INTERNLM_TEST_FAMILY"
SECONDS = 120.0
SECONDS_TO_DIE = 5.0
PROCESSES = ("--handler", "tests.faults.preprocess_worker:Own", "--workers", "3")
THREADS = ("--handler", "alpaca_instruction", "--workers", "2", "--pack-to", "200")


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


@dataclass(frozen=True)
class Place:
    """A folder with a tokenizer and records, and the command that preprocesses them into it."""

    folder: Path

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.model"

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def start(
        self, source: Path, *options: str, prepare: Callable[[], None] | None = None
    ) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [
                sys.executable, "-m", "tests.faults.preprocess_worker", str(source),
                "--tokenizer", str(self.tokenizer), "--output-prefix", str(self.output / "c"),
                "--json", *options,
            ],
            env={**os.environ, MARK: str(self.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,
        )  # fmt: skip

    def run(self, source: Path, *options: str, prepare: Callable[[], None] | None = None) -> Ended:
        process = self.start(source, *options, prepare=prepare)
        out, err = process.communicate(timeout=SECONDS)
        return Ended(process.returncode, out, err)

    def write(self, name: str, records: Sequence[Any] = RECORDS) -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    def wait_for_commits(self, process: "subprocess.Popen[str]", count: int) -> None:
        """Until a running command has made so many more: nobody knows how far seconds go."""
        before, deadline = self._commits(), time.monotonic() + SECONDS
        while self._commits() < before + count:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)

    def _commits(self) -> int:
        journal = self.output / ".c.preprocessing" / "journal.jsonl"
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    def left(self) -> list[str]:
        """Files at the prefix, hidden ones included."""
        return sorted(path.name for path in self.output.iterdir()) if self.output.exists() else []

    def family(self) -> list[psutil.Process]:
        """Every living process that a command here started, at any remove."""
        found = []
        for process in psutil.process_iter():
            try:
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.environ().get(MARK) == str(self.folder):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t") / "tokenizer.model"
    train_tokenizer((json.dumps(record) for record in RECORDS[:500]), 320, path)
    return path


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Place:
    place = Place(tmp_path)
    place.tokenizer.symlink_to(model)
    return place


# --- damaged records -----------------------------------------------------------------------------


def bad_utf8(place: Place) -> Path:
    path = place.write("bad.jsonl", RECORDS[:20])
    path.write_bytes(path.read_bytes().replace(b"What is 7 ", b"What is \xff "))
    return path


def null_field(place: Place) -> Path:
    records = [dict(record) for record in RECORDS[:20]]
    records[7]["output"] = None
    return place.write("bad.jsonl", records)


def missing_column(place: Place) -> Path:
    records = [dict(record) for record in RECORDS[:20]]
    del records[7]["instruction"]
    return place.write("bad.jsonl", records)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (bad_utf8, "bad.jsonl, line 8: not UTF-8: byte 0xff"),
        (null_field, "bad.jsonl, line 8: column 'output' = None is not text"),
        (missing_column, "bad.jsonl, line 8: column 'instruction' is missing; found"),
    ],
)
def test_a_damaged_record_is_named_and_stops_or_is_counted(
    place: Place, damage: Callable[[Place], Path], message: str
) -> None:
    source = damage(place)
    ended = place.run(source)
    assert ended.code == 2 and ended.result["error"]["exit_code"] == 2
    assert message in ended.result["error"]["message"] and "Traceback" not in ended.err
    assert place.left() == []
    counted = place.run(source, "--on-damage", "count")
    assert counted.code == 0, counted.err
    assert (counted.result["documents"], counted.result["damaged"]) == (19, 1)
    card = json.loads((place.output / "c.json").read_text())
    assert len(card["damage"]) == 1 and message in card["damage"][0]


def empty_file(place: Place) -> Path:
    return place.write("bad.jsonl", [])


def truncated_parquet(place: Place) -> Path:
    import pyarrow
    import pyarrow.parquet

    path = place.folder / "bad.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty_file, "bad.jsonl: holds no records"),
        (truncated_parquet, "bad.parquet: not a readable parquet file"),
        (lambda place: place.folder / "none.jsonl", "none.jsonl: no such file or folder"),
    ],
)
@pytest.mark.parametrize("on_damage", ["stop", "count"])
def test_a_file_that_cannot_be_read_is_bad_input(
    place: Place, damage: Callable[[Place], Path], message: str, on_damage: str
) -> None:
    ended = place.run(damage(place), "--on-damage", on_damage)
    assert ended.code == 2 and message in ended.result["error"]["message"]
    assert "Traceback" not in ended.err and place.left() == []


# --- interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [PROCESSES, THREADS], ids=["processes", "threads"])
def test_killed_at_any_moment_it_goes_on_to_the_same_files(
    place: Place, tmp_path: Path, options: tuple[str, ...]
) -> None:
    source = place.write("records.jsonl")
    whole = place.run(source, *options)
    hashes = {path.name: sha256_of(path) for path in place.output.glob("c*.[bi]*")}
    assert len(hashes) in (2, 8)
    place.output.rename(tmp_path / "whole")

    moments = random.Random(len(options))
    most = 0
    for _ in range(5):
        process = place.start(source, *options)
        place.wait_for_commits(process, moments.randrange(1, 9))
        time.sleep(moments.uniform(0, 0.02))
        most = max(most, len(place.family()))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=SECONDS)
        deadline = time.monotonic() + SECONDS_TO_DIE
        while place.family() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [child.cmdline() for child in place.family()] == []
        # Whole or absent: the card stands where all files stand.
        assert "c.json" not in place.left() or set(hashes) < set(place.left())
    assert most == (3 if options == PROCESSES else 1)
    ended = place.run(source, *options)
    assert ended.code == 0, ended.err
    assert ended.result["bin_sha256"] == whole.result["bin_sha256"]
    assert {path.name: sha256_of(path) for path in place.output.glob("c*.[bi]*")} == hashes
    assert place.left() == sorted([*hashes, "c.json"])
    assert ended.result["unchanged"] or ended.result["resumed_documents"] > 0


def test_an_interrupted_call_ends_its_workers_and_keeps_its_work(place: Place) -> None:
    source = place.write("records.jsonl", RECORDS * 4)
    process = place.start(source, *PROCESSES, prepare=heed_interrupts)
    place.wait_for_commits(process, 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1 and json.loads(out)["error"]["kind"] == "Interrupted", err
    assert place.family() == [] and place.left() == [".c.preprocessing"]


# --- the disk ------------------------------------------------------------------------------------


def little_space() -> None:
    """No file may grow over 150 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))


@pytest.mark.parametrize("options", [PROCESSES, THREADS], ids=["processes", "threads"])
def test_a_full_disk_is_told_and_the_rest_done_later(
    place: Place, options: tuple[str, ...]
) -> None:
    source = place.write("records.jsonl")
    ended = place.run(source, *options, prepare=little_space)
    assert ended.code == 1, ended.err
    message = ended.result["error"]["message"]
    assert "no space left (File too large)" in message and "goes on from there" in message
    assert place.left() == [".c.preprocessing"] and place.family() == []
    rest = place.run(source, *options)
    assert 0 < rest.result["resumed_documents"] < rest.result["documents"] == len(RECORDS)
    fresh = place.run(source, *options, "--force")
    assert fresh.result["bin_sha256"] == rest.result["bin_sha256"]
    assert fresh.result["resumed_documents"] == 0


def as_a_mere_user() -> None:
    """Also for root a folder without the right to write is one (prctl PR_CAPBSET_DROP,
    CAP_DAC_OVERRIDE; whoever is not root has no such capability)."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def test_a_read_only_folder_is_bad_input(place: Place) -> None:
    source = place.write("records.jsonl", RECORDS[:20])
    place.output.mkdir()
    place.output.chmod(0o555)
    ended = place.run(source, prepare=as_a_mere_user)
    place.output.chmod(0o755)
    assert ended.code == 2 and place.left() == []
    assert "cannot be written (Permission denied)" in ended.result["error"]["message"]
