"""Tensors as bytes in files: rows read and written in place, no file ever held in memory.

Not by memory mapping: the pages touched would count as this process's memory until they are
evicted, and peak memory would grow with the model.
"""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm_lib.errors import InputError


@dataclass(frozen=True)
class Run:
    """Consecutive elements of a tensor that lie one after the other in a file."""

    start: int
    """First element, counted in row-major order over the tensor."""
    stop: int
    file: Path
    offset: int
    """Byte of the first element."""


@dataclass(frozen=True)
class StoredTensor:
    """A row-major tensor in one run, or in several where ranks hold parts of its elements."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    runs: tuple[Run, ...]

    @property
    def row_elements(self) -> int:
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_elements * self.dtype.itemsize

    @property
    def files(self) -> set[Path]:
        return {run.file for run in self.runs}


class OpenFiles:
    """File handles by path, opened once; every method may be called from several threads.

    Raises InputError if a file cannot be read or ends too early.
    """

    def __init__(self, *, writable: bool = False) -> None:
        self._flags = os.O_RDWR if writable else os.O_RDONLY
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read_rows(self, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a stored tensor."""
        values = torch.empty((stop - start, *tensor.shape[1:]), dtype=tensor.dtype)
        self.read_into(values, tensor, start)
        return values

    def read_into(self, values: Tensor, tensor: StoredTensor, start: int) -> None:
        """Fill a contiguous tensor with the rows from `start` on."""
        into = bytes_of(values)
        for run, offset, where in _overlaps(tensor, start, start + len(values)):
            self._read_exactly(run.file, into[where], offset)

    def read_columns(self, tensor: StoredTensor, start: int, stop: int, columns: slice) -> Tensor:
        """Some columns of rows [start, stop); of a tensor in one run, nothing else is read."""
        width = columns.stop - columns.start
        if len(tensor.runs) > 1 or width == tensor.row_elements:
            return self.read_rows(tensor, start, stop)[:, columns]
        run, size = tensor.runs[0], tensor.dtype.itemsize
        stride = tensor.row_elements * size
        first = run.offset + start * stride + columns.start * size
        values = torch.empty((stop - start, width), dtype=tensor.dtype)
        into = bytes_of(values)
        for row in range(stop - start):
            part = into[row * width * size : (row + 1) * width * size]
            self._read_exactly(run.file, part, first + row * stride)
        return values

    def write_rows(self, tensor: StoredTensor, start: int, values: Tensor) -> None:
        """Write rows from `start` on; their dtype must be the stored tensor's."""
        data = bytes_of(values.contiguous())
        for run, offset, where in _overlaps(tensor, start, start + len(values)):
            self.write(run.file, data[where], offset)

    def write(self, file: Path, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at a byte of a file."""
        view = memoryview(data)
        while view:
            done = os.pwrite(self._handle(file), view, offset)
            view, offset = view[done:], offset + done

    def sync(self) -> None:
        """Wait until everything written so far is on the disk."""
        with self._lock:
            handles = list(self._handles.values())
        for handle in handles:
            os.fsync(handle)

    def close(self) -> None:
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _handle(self, file: Path) -> int:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = os.open(file, self._flags)
            return self._handles[file]

    def _read_exactly(self, file: Path, into: memoryview, offset: int) -> None:
        while into:
            done = os.preadv(self._handle(file), [into], offset)
            if not done:
                raise InputError(
                    f"{file} ends at byte {offset:,}, {len(into):,} bytes too early: it is "
                    "truncated; copy or download it again"
                )
            into, offset = into[done:], offset + done


def _overlaps(tensor: StoredTensor, start: int, stop: int) -> Iterator[tuple[Run, int, slice]]:
    """Run, byte in its file, and bytes among those of rows [start, stop)."""
    size, first = tensor.dtype.itemsize, start * tensor.row_elements
    last = stop * tensor.row_elements
    for run in tensor.runs:
        low, high = max(run.start, first), min(run.stop, last)
        if low < high:
            where = slice((low - first) * size, (high - first) * size)
            yield run, run.offset + (low - run.start) * size, where


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal byte by byte: 0 is not -0, and a NaN is itself."""
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and torch.equal(
            one.contiguous().view(-1).view(torch.uint8),
            other.contiguous().view(-1).view(torch.uint8),
        )
    )


def bytes_of(values: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    array: Any = values.view(-1).view(torch.uint8).numpy()
    return memoryview(array)
