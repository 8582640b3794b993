"""Any format to any other: streamed block by block, hashed on the way, whole or absent.

Everything is written into a working folder beside the target, `.NAME.converting`, with a journal of
the tensors that are done and on the disk. A conversion that was interrupted goes on from there; the
folder gets its name only when every file is complete, hashed and synced.
"""

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from internlm_lib import __version__
from internlm_lib.errors import InputError, KitError
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.files import remove_abandoned, sha256_of, sync
from internlm_lib.model.precision import STORED_DTYPES
from internlm_lib.weights.checkpoint import Checkpoint
from internlm_lib.weights.formats import FORMATS, open_checkpoint, open_for_writing
from internlm_lib.weights.manifest import (
    MANIFEST,
    TensorHasher,
    read_manifest,
    tensor_entry,
    tensor_hash,
    write_manifest,
)
from internlm_lib.weights.model_config import carry_tokenizer, find_tokenizer, write_model
from internlm_lib.weights.plan import PlannedFile, Target, partition
from internlm_lib.weights.storage import same_bits

THREADS = min(4, os.cpu_count() or 1)
"""Tensors in work at the same time. Hashing and copying release Python's lock."""

SYNC_BYTES = 256 << 20
"""Written bytes after which what is done is synced and noted: at most this is done again."""

Progress = Callable[[str, int, int], None]
"""Told what is being done, bytes done and bytes in all; from any thread."""

_JOURNAL = "conversion.jsonl"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Order:
    """What the user asks for."""

    to: str
    """A name of `FORMATS`."""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    num_layer_list: tuple[int, ...] = ()
    """Layers of each pipeline stage; empty for even stages."""
    make_vocab_size_divisible_by: int = 1
    merge_mlp: bool = False
    dtype: str | None = None
    """A name of `STORED_DTYPES`; None keeps each tensor's own."""


@dataclass(frozen=True)
class Plan:
    """A conversion that has been checked and can begin."""

    source: Checkpoint
    target_path: Path
    order: Order
    target: Target
    files: list[PlannedFile]
    tokenizer: Path | None
    """A tokenizer.model that the target gets, too."""
    overwrite: bool
    """Replace a folder that is already there."""

    def file_rows(self) -> list[dict[str, Any]]:
        """One table row per file that is going to be written."""
        return [
            {"file": file.path, "tensors": len(file.tensors), "bytes": self.target.nbytes(file)}
            for file in self.files
        ]

    @property
    def nbytes(self) -> int:
        """Of all tensors as they will lie in the files, copies and padding included."""
        return sum(self.target.nbytes(file) for file in self.files)


def plan_conversion(
    source: Path,
    target: Path,
    order: Order,
    *,
    model: ModelSection | None = None,
    tokenizer: Path | None = None,
    overwrite: bool = False,
) -> Plan:
    """Check source, target and layout against each other; nothing is written.

    Args:
        model: what the source holds, where it does not say so itself.
        tokenizer: a tokenizer.model or its folder; by default the source's, if it has one.
        overwrite: replace a folder that is already there.
    Raises:
        InputError: saying what cannot be read, does not fit, or is in the way.
    """
    if order.to not in FORMATS:
        raise InputError(f"--to {order.to!r}: choose one of {', '.join(FORMATS)}")
    if order.dtype is not None and order.dtype not in STORED_DTYPES:
        raise InputError(f"--dtype {order.dtype!r}: choose one of {', '.join(STORED_DTYPES)}")
    _check_free(target, overwrite)
    inside, outside = target.resolve(), source.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise InputError(f"the target {target} and the source {source} lie within each other")
    weights = open_checkpoint(source, model)
    changes = {"make_vocab_size_divisible_by": order.make_vocab_size_divisible_by}
    written = weights.model.model_copy(update=changes)
    split = partition(
        written, order.tensor_parallel, order.pipeline_parallel,
        num_layer_list=order.num_layer_list,
    )  # fmt: skip
    dtypes = {
        name: STORED_DTYPES[order.dtype] if order.dtype else tensor.dtype
        for name, tensor in weights.tensors.items()
    }
    wanted = Target(written, split, dtypes, order.merge_mlp)
    files = FORMATS[order.to].plan(wanted)
    found = find_tokenizer(source, written, tokenizer)
    plan = Plan(weights, target, order, wanted, files, found, overwrite)
    _ = plan.nbytes  # every file's tensors must have one dtype
    return plan


def convert(plan: Plan, progress: Progress | None = None) -> dict[str, Any]:
    """Carry out a plan; returns what `internlm convert --json` prints.

    Raises:
        InputError: if the source is damaged.
        KitError: if the target cannot be written; the same conversion started again goes on.
    """
    started = time.monotonic()
    with plan.source, _work(plan) as work:
        manifest = work.run(progress or (lambda what, done, total: None))
    return {
        "from": plan.source.format_name,
        "to": plan.order.to,
        "tensors": len(manifest["tensors"]),
        "bytes": plan.nbytes,
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_mib": peak_rss_mib(),
        "tensor_hash": manifest["tensor_hash"],
    }


def peak_rss_mib() -> float | None:
    """Most memory this process has had resident since it started, in MiB; None but on Linux.

    Not `ru_maxrss`, which begins with the peak of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kib = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return round(int(kib) / 1024, 1)


def blocks(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, Tensor]]:
    """First row and values of consecutive parts of a tensor, none larger than `BLOCK_BYTES`."""
    tensor = checkpoint.tensors[name]
    for start in range(0, tensor.shape[0], tensor.block_rows):
        yield start, checkpoint.read(name, slice(start, start + tensor.block_rows))


def hash_files(
    files: Sequence[Path], advance: Callable[[int], None] = lambda nbytes: None
) -> dict[Path, str]:
    """SHA-256 of files, several at once."""

    def hashed(file: Path) -> tuple[Path, str]:
        digest = sha256_of(file)
        advance(file.stat().st_size)
        return file, digest

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(pool.map(hashed, files))


@contextmanager
def _work(plan: Plan) -> Iterator["_Work"]:
    folder = plan.target_path.with_name(f".{plan.target_path.name}.converting")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder), (folder / _JOURNAL).open("a+", errors="replace") as journal:
            yield _Work(plan, folder, journal)
    except OSError as error:
        raise KitError(_what_to_do(error, plan, folder)) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder, under whatever name, against other conversions; the lock dies with us."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(f"{folder} is being written by another conversion; wait for it") from None
    finally:
        os.close(handle)


class _Work:
    """One conversion in its working folder."""

    def __init__(self, plan: Plan, folder: Path, journal: IO[str]) -> None:
        self._plan = plan
        self._folder = folder
        self._journal = journal
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._expected = _expected_hashes(plan.source)

    def run(self, progress: Progress) -> dict[str, Any]:
        plan, kind = self._plan, FORMATS[self._plan.order.to]
        done = self._resume()
        if not done:
            _check_space(plan, self._folder)
            for file in plan.files:
                kind.create(self._folder, file, plan.target)
            sync(self._folder)  # a note that a tensor is done must not outlive its file
        with open_for_writing(self._folder, plan.order.to, plan.files, plan.target) as target:
            hashes = {**done, **self._copy(target, done, progress)}
            entries = {name: tensor_entry(target, name, hashes[name]) for name in sorted(hashes)}
        kind.finish(self._folder, plan.files, plan.target)
        dtype = next(iter(entries.values()))["dtype"]
        write_model(self._folder, plan.target.model, dtype)
        if plan.tokenizer:
            carry_tokenizer(plan.tokenizer, self._folder)
        open_checkpoint(self._folder).close()
        manifest = self._manifest(entries, progress)
        self._publish()
        return manifest

    def _resume(self) -> dict[str, str]:
        """Hashes of the tensors that an earlier, equal conversion has finished."""
        self._journal.seek(0)
        text = self._journal.read()
        lines, head = text.splitlines(), json.dumps({"conversion": _fingerprint(self._plan)})
        if lines and lines[0] == head:
            if not text.endswith("\n"):  # torn: what follows must not be read as part of it
                self._note([""])
            remove_abandoned(self._folder)
            return {entry["tensor"]: entry["sha256"] for entry in map(_entry, lines[1:]) if entry}
        for path in self._folder.iterdir():
            if path.name != _JOURNAL:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._journal.truncate(0)
        self._note([head])
        return {}

    def _copy(
        self, target: Checkpoint, done: Mapping[str, str], progress: Progress
    ) -> dict[str, str]:
        """Stream every tensor that is not done yet; returns their hashes."""
        source = self._plan.source
        todo = [name for name in _in_file_order(self._plan) if name not in done]
        total = source.nbytes
        moved = total - sum(source.tensors[name].nbytes for name in todo)

        def advance(nbytes: int) -> None:
            nonlocal moved
            with self._lock:
                moved += nbytes
                progress("converting", moved, total)

        hashes: dict[str, str] = {}
        unsynced: dict[str, str] = {}
        waiting = 0
        with ThreadPoolExecutor(THREADS) as pool:
            futures = {pool.submit(self._copy_tensor, target, n, advance): n for n in todo}
            try:
                for future in as_completed(futures):
                    name = futures.pop(future)
                    hashes[name] = unsynced[name] = future.result()
                    waiting += source.tensors[name].nbytes
                    if waiting >= SYNC_BYTES or not futures:
                        self._settle(target, unsynced)
                        unsynced, waiting = {}, 0
            except BaseException:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
        return hashes

    def _copy_tensor(self, target: Checkpoint, name: str, advance: Callable[[int], None]) -> str:
        source, dtype = self._plan.source, target.tensors[name].dtype
        _check_copies(source, name)
        read, written = TensorHasher(), TensorHasher()
        cast = source.tensors[name].dtype != dtype
        for start, block in blocks(source, name):
            if self._stopped.is_set():
                raise KitError("stopped")
            values = _cast(block, dtype, name) if cast else block
            if cast and name in self._expected:
                read.update(block)
            written.update(values)
            target.write(name, start, values)
            advance(block.nbytes)
        found = (read if cast else written).hexdigest()
        if self._expected.get(name, found) != found:
            raise InputError(
                f"{source.path}: {name} is not what its {MANIFEST} says; internlm verify says more"
            )
        return written.hexdigest()

    def _settle(self, target: Checkpoint, hashes: Mapping[str, str]) -> None:
        target.sync()
        self._note([json.dumps({"tensor": n, "sha256": digest}) for n, digest in hashes.items()])

    def _note(self, lines: Sequence[str]) -> None:
        self._journal.write("".join(f"{line}\n" for line in lines))
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _manifest(self, entries: dict[str, Any], progress: Progress) -> dict[str, Any]:
        plan, hashed = self._plan, 0
        files = sorted(
            path for path in self._folder.rglob("*") if path.is_file() and path.name != _JOURNAL
        )
        total = sum(path.stat().st_size for path in files)

        def advance(nbytes: int) -> None:
            nonlocal hashed
            with self._lock:
                hashed += nbytes
                progress("checksums", hashed, total)

        digests = hash_files(files, advance)
        manifest = {
            "kit": __version__,
            "format": plan.order.to,
            "layout": plan.target.split.label if FORMATS[plan.order.to].layouts else "whole",
            "model": plan.target.model.model_dump(mode="json", exclude={"weights"}),
            "source": {"path": str(plan.source.path), "format": plan.source.format_name,
                       "layout": plan.source.layout, "dtype": plan.source.dtype},
            "tensor_hash": tensor_hash(entries),
            "tensors": entries,
            "files": {
                path.relative_to(self._folder).as_posix(): {
                    "bytes": path.stat().st_size, "sha256": digests[path],
                }
                for path in files
            },
        }  # fmt: skip
        write_manifest(self._folder, manifest)
        return manifest

    def _publish(self) -> None:
        """Give the folder its name; from here on it counts."""
        target = self._plan.target_path
        _check_free(target, self._plan.overwrite)
        (self._folder / _JOURNAL).unlink()
        sync(self._folder)
        replaced = target.with_name(f".{target.name}.replaced")
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        self._folder.replace(target)
        sync(target.parent, recursive=False)
        shutil.rmtree(replaced, ignore_errors=True)


def _check_free(target: Path, overwrite: bool) -> None:
    if target.is_file() or (target.exists() and not overwrite):
        advice = "remove it, or choose another name"
        raise InputError(
            f"{target} exists; {advice if target.is_file() else advice + ', or say --overwrite'}"
        )


def _in_file_order(plan: Plan) -> list[str]:
    """Names in the order the target's files hold them, so that each is written front to back."""
    pieces = (p for file in plan.files for tensor in file.tensors for p in tensor.pieces)
    return list(dict.fromkeys(piece.name for piece in pieces))


def _expected_hashes(source: Checkpoint) -> dict[str, str]:
    manifest = read_manifest(source.path)
    return {n: entry["sha256"] for n, entry in manifest["tensors"].items()} if manifest else {}


def _check_copies(source: Checkpoint, name: str) -> None:
    """Raises InputError if ranks that hold the same tensor hold different values."""
    for part in source.tensors[name].copies:
        if not same_bits(source.read_stored(part), source.read(name, part.piece.rows)):
            files = ", ".join(sorted(str(file) for file in part.stored.files))
            raise InputError(
                f"{name} must be the same on all tensor parallel ranks, but differs in {files}: "
                "these files are not of one checkpoint, or damaged"
            )


def _cast(block: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    values = block.to(dtype)
    if not torch.equal(values.isfinite(), block.isfinite()):
        raise InputError(
            f"{name} has values up to {block.abs().max().item():.3g}, more than "
            f"{str(dtype).removeprefix('torch.')} can hold ({torch.finfo(dtype).max:.3g}); "
            "choose bfloat16 or float32"
        )
    return values


def _check_space(plan: Plan, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < plan.nbytes:
        shutil.rmtree(folder)
        raise KitError(
            f"{plan.target_path} needs {plan.nbytes:,} bytes, {free:,} are free on its disk; free "
            "some, or write to another disk"
        )


def _fingerprint(plan: Plan) -> dict[str, Any]:
    """What must not have changed for a conversion to be gone on with."""
    files = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in plan.source.files]
    model = plan.target.model.model_dump(mode="json", exclude={"weights"})
    order = [value if not isinstance(value, tuple) else list(value)
             for value in vars(plan.order).values()]  # fmt: skip
    return {"kit": __version__, "files": files, "order": order, "model": model}


def _entry(line: str) -> dict[str, str]:
    """A line of the journal; {} for one that was cut off."""
    try:
        found: dict[str, str] = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and {"tensor", "sha256"} <= found.keys() else {}


def _what_to_do(error: OSError, plan: Plan, folder: Path) -> str:
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return (
            f"{plan.target_path} could not be written to the end: {reason} ({plan.nbytes:,} bytes "
            f"are needed). What is done is kept in {folder}; free some space and give the same "
            "command again to go on, or remove that folder"
        )
    return (
        f"{error.filename or plan.target_path}: {reason}. The source is untouched; make the folder "
        "writable, or choose another, and give the same command again"
    )
