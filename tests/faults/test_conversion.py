"""However a conversion ends, there is the whole target or none, and the same command goes on."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from internlm_lib.errors import InputError, KitError
from internlm_lib.weights import convert as conversion
from internlm_lib.weights.checkpoint import Checkpoint
from internlm_lib.weights.convert import Order, convert, plan_conversion
from internlm_lib.weights.formats import FORMATS, open_checkpoint
from internlm_lib.weights.verify import verify
from tests.conftest import heed_interrupts
from tests.unit.weights.conftest import drawn, small, write_source

SECONDS_TO_START = 120.0
SECONDS_TO_STOP = 5.0
FILE_LIMIT = 1500
ORDERS = {
    "huggingface": {"to": "huggingface"},
    "megatron": {"to": "megatron"},
    "classic": {"to": "classic", "tensor_parallel": 4, "pipeline_parallel": 2},
    "deepspeed": {"to": "deepspeed", "tensor_parallel": 2, "merge_mlp": True},
}
ENTRY = re.compile(r'\{"tensor": "([^"]+)", "sha256": "[0-9a-f]{64}"\}')
CLASSIC = Order(**ORDERS["classic"])  # type: ignore[arg-type]


class Stop(BaseException):
    """Ends a conversion in the middle, as a kill would, but within this process."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder; only to be read."""
    weights = drawn(small(), torch.float16)
    return write_source(tmp_path_factory.mktemp("faults") / "source", small(), weights)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, source: Path) -> dict[str, Path]:
    """What every order gives when nothing happens."""
    root = tmp_path_factory.mktemp("uninterrupted")
    for name, order in ORDERS.items():
        convert(plan_conversion(source, root / name, Order(**order)))  # type: ignore[arg-type]
    return {name: root / name for name in ORDERS}


@pytest.fixture
def notes_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is synced and noted as soon as it is done."""
    monkeypatch.setattr(conversion, "SYNC_BYTES", 1)


@pytest.fixture
def were_read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the tensors that are read from here on."""
    names: set[str] = set()
    read = Checkpoint.read

    def noted(self: Checkpoint, name: str, *place: slice) -> Tensor:
        names.add(name)
        return read(self, name, *place)

    monkeypatch.setattr(Checkpoint, "read", noted)
    return names


def working_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.converting")


def noted_tensors(target: Path) -> list[str]:
    """Names in the journal of an unfinished conversion, of whole entries only."""
    journal = working_folder(target) / "conversion.jsonl"
    return ENTRY.findall(journal.read_text()) if journal.is_file() else []


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_no_target(target: Path) -> None:
    """Nothing beside it could be taken for a checkpoint, either."""
    with pytest.raises(InputError):
        open_checkpoint(target)
    visible = [path.name for path in target.parent.iterdir() if not path.name.startswith(".")]
    assert target.name not in visible
    for name in visible:
        with pytest.raises(InputError):
            open_checkpoint(target.parent / name)


def stopped_after(plan: conversion.Plan, tensors: int) -> None:
    """Convert, and stop once so many tensors are noted, a few more or less done."""
    target = plan.target_path
    left = tensors - len(noted_tensors(target)) + conversion.THREADS

    def stop(what: str, done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            deadline = time.monotonic() + SECONDS_TO_START
            while len(noted_tensors(target)) < tensors and time.monotonic() < deadline:
                time.sleep(0.01)
            raise Stop

    with pytest.raises(Stop):
        convert(plan, progress=stop)


# --- in a process of its own ---------------------------------------------------------------------


def convert_slowly(told: str) -> None:
    """The other process: a conversion that takes its time."""
    order = json.loads(told)
    source, target = Path(order.pop("source")), Path(order.pop("target"))
    pause, linger = order.pop("pause"), order.pop("linger")
    conversion.SYNC_BYTES = 1
    write = Checkpoint.write

    def slow(self: Checkpoint, name: str, first_row: int, block: Tensor) -> None:
        time.sleep(pause)
        write(self, name, first_row, block)

    def wait(what: str, done: int, total: int) -> None:
        time.sleep(60 if what == linger else 0)

    Checkpoint.write = slow  # type: ignore[method-assign]
    convert(plan_conversion(source, target, Order(**order)), progress=wait)


def convert_on_a_full_disk(told: str) -> None:
    """The other process: every order, with files that may not grow past a limit.

    Prints what each ended with: its exit code, or the name of an error that is no KitError.
    """
    jobs = json.loads(told)
    conversion.SYNC_BYTES = 1
    write = Checkpoint.write
    ended = []
    for job in jobs:
        count = 0

        def fill() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, resource.RLIM_INFINITY))

        def counted(self: Checkpoint, name: str, first_row: int, block: Tensor) -> None:
            nonlocal count
            count += 1
            if count > job["writes"]:  # noqa: B023
                fill()  # noqa: B023
            write(self, name, first_row, block)

        Checkpoint.write = counted  # type: ignore[method-assign]
        if not job["writes"]:
            fill()
        try:
            order = Order(**job["order"])
            convert(plan_conversion(Path(job["source"]), Path(job["target"]), order))
            ended.append((0, ""))
        except KitError as error:
            ended.append((error.exit_code, str(error)))
        except Exception as error:
            ended.append((-1, f"{type(error).__name__}: {error}"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    print(json.dumps(ended))


def command(function: Callable[[str], None], told: Any) -> list[str]:
    imported = f"from tests.faults.test_conversion import {function.__name__} as function"
    code = f"import sys; {imported}; function(sys.argv[1])"
    return [sys.executable, "-c", code, json.dumps(told)]


class Told(NamedTuple):
    target: Path
    process: "subprocess.Popen[str]"


Start = Callable[..., Told]


@pytest.fixture
def start(repository: Path, source: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a conversion in a process of its own; ends it with the test."""
    started: list[Told] = []

    def start(name: str, pause: float = 0.0, linger: str = "") -> Told:
        target = tmp_path / "target"
        told = {**ORDERS[name], "source": str(source), "target": str(target), "pause": pause,
                "linger": linger}  # fmt: skip
        process = subprocess.Popen(
            command(convert_slowly, told), cwd=repository, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts,
        )  # fmt: skip
        started.append(Told(target, process))
        return started[-1]

    yield start
    for _, process in started:
        process.kill()
        process.communicate()


def wait_until(there: Callable[[], bool], told: Told) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while not there():
        assert told.process.poll() is None, told.process.communicate()
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.01)


@pytest.mark.parametrize("name", ORDERS)
def test_a_killed_conversion_goes_on_where_it_was(
    name: str, start: Start, source: Path, uninterrupted: dict[str, Path], notes_each: None,
    were_read: set[str],
) -> None:  # fmt: skip
    told = start(name, pause=0.1)
    target = told.target
    wait_until(lambda: len(noted_tensors(target)) >= 8, told)
    told.process.kill()
    told.process.wait()
    finished = set(noted_tensors(target))
    assert 8 <= len(finished) < 50
    assert_no_target(target)
    convert(plan_conversion(source, target, Order(**ORDERS[name])))  # type: ignore[arg-type]
    assert not finished & were_read
    assert finished | were_read == set(drawn(small()))
    assert contents(target) == contents(uninterrupted[name])
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert verify(target)["ok"]


def test_a_conversion_killed_while_it_counts_checksums_reads_no_tensor_again(
    start: Start, source: Path, uninterrupted: dict[str, Path], were_read: set[str]
) -> None:
    told = start("classic", linger="checksums")
    target = told.target
    wait_until(lambda: (working_folder(target) / "config.json").is_file(), told)
    told.process.kill()
    told.process.wait()
    assert_no_target(target)
    # As if it had been killed a moment earlier, while it wrote.
    (working_folder(target) / ".config.4640.tmp.json").write_text("{")
    convert(plan_conversion(source, target, CLASSIC))
    assert were_read == set()
    assert contents(target) == contents(uninterrupted["classic"])


def test_ctrl_c_stops_within_seconds_and_the_same_command_goes_on(
    start: Start, source: Path, uninterrupted: dict[str, Path], were_read: set[str]
) -> None:
    told = start("classic", pause=0.2)
    target = told.target
    wait_until(lambda: len(noted_tensors(target)) >= 4, told)
    told.process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    _, errors = told.process.communicate(timeout=60)
    assert time.monotonic() - asked < SECONDS_TO_STOP
    assert told.process.returncode != 0 and "KeyboardInterrupt" in errors
    assert_no_target(target)
    finished = set(noted_tensors(target))
    convert(plan_conversion(source, target, CLASSIC))
    assert len(finished) >= 4 and not finished & were_read
    assert contents(target) == contents(uninterrupted["classic"])


FULL = [(name, writes) for name in ORDERS for writes in (0, 12)]
"""Formats, and after how many writes the disk is full: before the first, or in the middle."""


@pytest.fixture(scope="module")
def filled_up(tmp_path_factory: pytest.TempPathFactory, source: Path) -> dict[Any, Any]:
    """How each of `FULL` ended: target, exit code and message."""
    root = tmp_path_factory.mktemp("full")
    targets = [root / f"{name} {writes}" / "target" for name, writes in FULL]
    jobs = [
        {"order": ORDERS[name], "writes": writes, "source": str(source), "target": str(target)}
        for (name, writes), target in zip(FULL, targets, strict=True)
    ]
    before = contents(source)
    run = subprocess.run(
        command(convert_on_a_full_disk, jobs), cwd=Path(__file__).resolve().parents[2],
        capture_output=True, text=True, timeout=SECONDS_TO_START,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert contents(source) == before
    ended = zip(targets, json.loads(run.stdout), strict=True)
    return {key: (target, *end) for key, (target, end) in zip(FULL, ended, strict=True)}


@pytest.mark.parametrize("name, writes", FULL)
def test_a_full_disk_is_told_and_the_same_command_goes_on(
    name: str, writes: int, filled_up: dict[Any, Any], source: Path,
    uninterrupted: dict[str, Path], were_read: set[str],
) -> None:  # fmt: skip
    target, code, message = filled_up[name, writes]
    assert code == 1, message
    assert f"{target} could not be written to the end" in message
    assert "bytes are needed" in message and "same command again" in message
    assert_no_target(target)
    finished = set(noted_tensors(target))
    assert bool(finished) == bool(writes)
    convert(plan_conversion(source, target, Order(**ORDERS[name])))  # type: ignore[arg-type]
    assert not finished & were_read
    assert contents(target) == contents(uninterrupted[name])


# --- in this process -----------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KiB, less than one conversion needs in the end."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_on_the_way_is_told_and_goes_on_when_there_is_room(
    tiny_disk: Path, source: Path, uninterrupted: dict[str, Path], notes_each: None,
    were_read: set[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    target = tiny_disk / "target"
    monkeypatch.setattr(conversion, "THREADS", 1)
    plan = plan_conversion(source, target, Order("huggingface"))
    write = Checkpoint.write
    filler = tiny_disk / "filler"

    def fills(self: Checkpoint, name: str, first_row: int, block: Tensor) -> None:
        if len(noted_tensors(target)) >= 6 and not filler.exists():
            free = shutil.disk_usage(tiny_disk).free
            filler.write_bytes(b"\1" * (free - 4096))
        write(self, name, first_row, block)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "write", fills)
        with pytest.raises(KitError, match=r"No space left on device.*same command again"):
            convert(plan)
    assert_no_target(target)
    finished = set(noted_tensors(target))
    filler.unlink()
    were_read.clear()
    convert(plan_conversion(source, target, Order("huggingface")))
    assert len(finished) >= 6 and not finished & were_read
    assert contents(target) == contents(uninterrupted["huggingface"])


def test_too_little_free_space_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_conversion(source, tmp_path / "target", CLASSIC)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan.nbytes - 1))
        with pytest.raises(KitError, match=rf"needs {plan.nbytes:,} bytes, {plan.nbytes - 1:,}"):
            convert(plan)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan.nbytes))
    convert(plan_conversion(source, tmp_path / "target", CLASSIC))


@pytest.fixture(params=["below a file", "in /proc", "read-only"])
def unwritable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "below a file":
        (tmp_path / "file").write_text("x")
        yield tmp_path / "file" / "target"
    elif request.param == "in /proc":
        yield Path("/proc/self/target")
    elif os.geteuid() == 0:
        pytest.skip("permissions do not bind root")
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        yield tmp_path / "locked" / "target"


def test_a_folder_that_cannot_be_written_is_told(unwritable: Path, source: Path) -> None:
    before = contents(source)
    with pytest.raises(KitError, match="The source is untouched") as error:
        convert(plan_conversion(source, unwritable, CLASSIC))
    assert str(unwritable.parent) in str(error.value)
    assert contents(source) == before
    assert not unwritable.exists()


def test_a_torn_last_line_costs_its_tensor_alone(
    source: Path, uninterrupted: dict[str, Path], tmp_path: Path, notes_each: None,
    were_read: set[str],
) -> None:  # fmt: skip
    target = tmp_path / "target"
    stopped_after(plan_conversion(source, target, CLASSIC), 6)
    journal = working_folder(target) / "conversion.jsonl"
    torn = noted_tensors(target)[-1]
    journal.write_bytes(journal.read_bytes()[:-20])
    first = set(noted_tensors(target))
    were_read.clear()
    stopped_after(plan_conversion(source, target, CLASSIC), len(first) + 6)
    assert torn not in first and torn in were_read
    assert not first & were_read
    second = set(noted_tensors(target))
    assert len(second) >= len(first) + 6
    were_read.clear()
    convert(plan_conversion(source, target, CLASSIC))
    assert contents(target) == contents(uninterrupted["classic"])
    assert second & were_read == set()


@pytest.mark.parametrize(
    "rubbish", [b"", b"\n", b"\x00" * 4096, b"\xff\xfe\x81\n", b'{"tensor": "lm_head.weight", "sha']
)
@pytest.mark.parametrize("place", ["instead", "after"])
def test_a_journal_of_rubbish_harms_nothing(
    place: str, rubbish: bytes, source: Path, uninterrupted: dict[str, Path], tmp_path: Path,
    notes_each: None,
) -> None:  # fmt: skip
    target = tmp_path / "target"
    stopped_after(plan_conversion(source, target, CLASSIC), 6)
    journal = working_folder(target) / "conversion.jsonl"
    journal.write_bytes((journal.read_bytes() if place == "after" else b"") + rubbish)
    convert(plan_conversion(source, target, CLASSIC))
    assert contents(target) == contents(uninterrupted["classic"])


def test_a_changed_source_starts_over(
    source: Path, tmp_path: Path, notes_each: None, were_read: set[str]
) -> None:
    own, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(source, own)
    stopped_after(plan_conversion(own, target, CLASSIC), 6)
    assert len(noted_tensors(target)) >= 6
    changed = drawn(small(), torch.float16, seed=9)
    save_file(changed, own / "model.safetensors")
    were_read.clear()
    convert(plan_conversion(own, target, CLASSIC))
    assert were_read == set(changed)
    with open_checkpoint(target) as weights:
        for name, tensor in changed.items():
            assert torch.equal(weights.read(name), tensor)


@pytest.mark.parametrize(
    "other",
    [
        Order("classic", tensor_parallel=2),
        Order("classic", tensor_parallel=4, pipeline_parallel=2, dtype="float32"),
        Order("classic", tensor_parallel=4, pipeline_parallel=2, merge_mlp=True),
        Order("classic", tensor_parallel=4, pipeline_parallel=2, make_vocab_size_divisible_by=8),
        Order("huggingface"),
    ],
)
def test_another_order_starts_over(
    other: Order, source: Path, tmp_path: Path, notes_each: None, were_read: set[str]
) -> None:
    target = tmp_path / "target"
    stopped_after(plan_conversion(source, target, CLASSIC), 6)
    were_read.clear()
    convert(plan_conversion(source, target, other))
    assert were_read == set(drawn(small()))
    assert verify(target)["ok"]
    convert(plan_conversion(source, tmp_path / "fresh", other))
    assert contents(target) == contents(tmp_path / "fresh")


def test_of_two_conversions_into_one_target_the_second_is_refused(
    source: Path, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "target"
    begun, go_on = threading.Event(), threading.Event()

    def hold(what: str, done: int, total: int) -> None:
        begun.set()
        assert go_on.wait(60)

    plan = plan_conversion(source, target, CLASSIC)
    first = threading.Thread(target=convert, args=(plan,), kwargs={"progress": hold})
    first.start()
    try:
        assert begun.wait(60)
        with pytest.raises(InputError, match="being written by another conversion"):
            convert(plan_conversion(source, target, Order("huggingface")))
    finally:
        go_on.set()
        first.join(60)
    assert contents(target) == contents(uninterrupted["classic"])


def test_a_second_conversion_is_refused_until_the_first_has_published(
    source: Path, uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    second = plan_conversion(source, target, Order("huggingface"))
    refused = []
    sync = conversion.sync

    def meanwhile(path: Path, *arguments: Any, **more: Any) -> None:
        monkeypatch.setattr(conversion, "sync", sync)
        try:
            convert(second)
        except KitError as error:
            refused.append(str(error))
        sync(path, *arguments, **more)

    monkeypatch.setattr(conversion, "sync", meanwhile)
    convert(plan_conversion(source, target, CLASSIC))
    assert len(refused) == 1 and "another conversion" in refused[0]
    assert contents(target) == contents(uninterrupted["classic"])


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_conversion_that_dies_while_it_is_published_can_be_given_again(
    overwrite: bool, source: Path, uninterrupted: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    target = tmp_path / "target"
    if overwrite:
        shutil.copytree(uninterrupted["huggingface"], target)
    replace, rename, rmtree = Path.replace, Path.rename, shutil.rmtree

    def dies(*arguments: Any, **more: Any) -> None:
        raise Stop

    def at_publishing(original: Callable[..., Any]) -> Callable[..., Any]:
        def act(path: Path, *arguments: Any, **more: Any) -> Any:
            own = {target, working_folder(target), tmp_path / ".target.replaced"}
            return (dies if Path(path) in own else original)(path, *arguments, **more)

        return act

    for step in ("replace", "rename", "rmtree"):
        with monkeypatch.context() as patch:
            place = shutil if step == "rmtree" else Path
            original = {"replace": replace, "rename": rename, "rmtree": rmtree}[step]
            patch.setattr(place, step, at_publishing(original))
            try:
                convert(plan_conversion(source, target, CLASSIC, overwrite=True))
            except Stop:
                pass
        if target.exists():
            assert contents(target) in (
                contents(uninterrupted["classic"]), contents(uninterrupted["huggingface"])
            )  # fmt: skip
    convert(plan_conversion(source, target, CLASSIC, overwrite=True))
    assert contents(target) == contents(uninterrupted["classic"])
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_an_old_target_stays_until_the_new_one_is_whole(
    source: Path, uninterrupted: dict[str, Path], tmp_path: Path, notes_each: None
) -> None:
    target = tmp_path / "target"
    shutil.copytree(uninterrupted["huggingface"], target)
    stopped_after(plan_conversion(source, target, CLASSIC, overwrite=True), 6)
    assert contents(target) == contents(uninterrupted["huggingface"])
    convert(plan_conversion(source, target, CLASSIC, overwrite=True))
    assert contents(target) == contents(uninterrupted["classic"])


@pytest.mark.parametrize("to", FORMATS)
def test_a_source_that_ends_too_early_on_the_way_leaves_no_target(
    to: str, uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a source is being downloaded, or its disk is lost."""
    monkeypatch.setattr(conversion, "THREADS", 1)
    own, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(uninterrupted[to], own)
    (own / "manifest.json").unlink()
    plan = plan_conversion(own, target, Order("huggingface" if to != "huggingface" else "classic"))

    def cut(what: str, done: int, total: int) -> None:
        for file in plan.source.files:
            os.truncate(file, 10)

    with pytest.raises(InputError, match="truncated"):
        convert(plan, progress=cut)
    assert not target.exists()
