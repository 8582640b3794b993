"""Weights on disk as logical tensors, in whichever format, layout and number of files they lie."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.weights.layout import Piece
from internlm_lib.weights.plan import PlannedTensor
from internlm_lib.weights.storage import OpenFiles, StoredTensor

BLOCK_BYTES = 16 << 20
"""Largest part of a tensor that is held in memory at a time, per thread."""

_LISTED = 5


@dataclass(frozen=True)
class Part:
    """A stored tensor and the rows of a logical one that lie in it."""

    stored: StoredTensor
    piece: Piece


@dataclass
class LogicalTensor:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[Part] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def block_rows(self) -> int:
        """Rows that fit into `BLOCK_BYTES`."""
        return max(1, BLOCK_BYTES * self.shape[0] // max(1, self.nbytes))

    @property
    def copies(self) -> list[Part]:
        return [part for part in self.parts if part.piece.role == "copy"]

    @property
    def is_whole(self) -> bool:
        """Whether its data make up every element exactly once: stripes of columns, of rows each."""
        stripes: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for part in self.parts:
            if part.piece.role == "data":
                left = part.piece.columns.start or 0
                stripe = (left, left + part.stored.row_elements)
                rows = (part.piece.rows.start, part.piece.rows.stop)
                stripes.setdefault(stripe, []).append(rows)
        width = [*self.shape[1:], 1][0]
        return _is_filled(stripes, width) and all(
            _is_filled(rows, self.shape[0]) for rows in stripes.values()
        )


class Checkpoint:
    """Every logical tensor of a model: where its rows lie, and how to read and write them.

    Read slice by slice; nothing is held in memory. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        path: Path,
        format_name: str,
        layout: str,
        model: ModelSection,
        tensors: Mapping[str, LogicalTensor],
        files: Iterable[Path],
        *,
        writable: bool = False,
    ) -> None:
        self.path = path
        self.format_name = format_name
        self.layout = layout
        """Human-readable, e.g. `TP4 PP2`."""
        self.model = model
        self.tensors = dict(tensors)
        self.files = sorted(set(files))
        """The files that hold tensors."""
        self._files = OpenFiles(writable=writable)

    @property
    def nbytes(self) -> int:
        """Of all logical tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> str:
        """Of all tensors, or of each kind of them: `float16`, or `float16, float32`."""
        names = {str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()}
        return ", ".join(sorted(names))

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """A part of a logical tensor, in its stored dtype; one-dimensional tensors have rows only.

        Raises InputError if a file ends too early.
        """
        tensor = self.tensors[name]
        wanted = range(*rows.indices(tensor.shape[0]))
        width = [range(*columns.indices(size)) for size in tensor.shape[1:]]
        values = torch.empty([len(wanted), *map(len, width)], dtype=tensor.dtype)
        for part in tensor.parts:
            if part.piece.role == "data":
                self._read_part(values, part, wanted, *width)
        return values

    def read_stored(self, part: Part) -> Tensor:
        """The rows of one part, as they are stored."""
        piece = part.piece
        count = piece.rows.stop - piece.rows.start
        return self._files.read_rows(part.stored, piece.start, piece.start + count)

    def write(self, name: str, first_row: int, block: Tensor) -> None:
        """Write rows of a logical tensor, in its dtype, to every place that holds them."""
        for part in self.tensors[name].parts:
            piece = part.piece
            low = max(piece.rows.start, first_row)
            high = min(piece.rows.stop, first_row + len(block))
            if low < high:
                values = block[low - first_row : high - first_row]
                values = values[:, piece.columns] if values.dim() > 1 else values
                start = piece.start + low - piece.rows.start
                self._files.write_rows(part.stored, start, values)

    def sync(self) -> None:
        """Wait until everything written so far is on the disk."""
        self._files.sync()

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_part(
        self, values: Tensor, part: Part, wanted: range, width: range | None = None
    ) -> None:
        """Fill in what a part has of the wanted rows and, of a matrix, columns."""
        piece, own = part.piece, part.stored.row_elements
        low, high = max(piece.rows.start, wanted.start), min(piece.rows.stop, wanted.stop)
        if low >= high:
            return
        first = piece.start + low - piece.rows.start
        into = values[low - wanted.start : high - wanted.start]
        if width is None or (piece.columns == slice(None) and len(width) == own):
            self._files.read_into(into, part.stored, first)
            return
        offset = piece.columns.start or 0
        left, right = max(width.start, offset), min(width.stop, offset + own)
        if left < right:
            columns = slice(left - offset, right - offset)
            read = self._files.read_columns(part.stored, first, first + high - low, columns)
            into[:, left - width.start : right - width.start] = read


def assemble(
    shapes: Mapping[str, tuple[int, ...]],
    stored: Iterable[tuple[PlannedTensor, StoredTensor]],
) -> dict[str, LogicalTensor]:
    """Logical tensors from what lies in the files.

    Raises InputError if a logical tensor is stored in more than one dtype.
    """
    tensors: dict[str, LogicalTensor] = {}
    for planned, where in stored:
        for piece in planned.pieces:
            tensor = tensors.setdefault(
                piece.name, LogicalTensor(piece.name, shapes[piece.name], where.dtype)
            )
            if tensor.dtype != where.dtype:
                raise InputError(
                    f"{piece.name} is stored in {tensor.dtype} and, in "
                    f"{', '.join(str(file) for file in where.files)}, in {where.dtype}: ranks of "
                    "one checkpoint must have one precision"
                )
            tensor.parts.append(Part(where, piece))
    return tensors


def check_tensors(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    other_problems: Iterable[str] = (),
) -> None:
    """Raises InputError listing everything in which `found` is not `expected`."""
    problems = [*other_problems]
    missing, unexpected = sorted(expected.keys() - found), sorted(found.keys() - expected.keys())
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors are unexpected: {_some(unexpected)}")
    for name in sorted(expected.keys() & found.keys()):
        if tuple(found[name]) != tuple(expected[name]):
            problems.append(
                f"{name} has the shape {tuple(found[name])}, expected is {tuple(expected[name])}"
            )
    if problems:
        raise InputError(
            "\n  - ".join([f"{path} does not hold the model that is expected:", *problems])
            + "\nSet the keys of `model` to what the folder holds, or give other weights."
        )


def _is_filled(ranges: Iterable[tuple[int, int]], size: int) -> bool:
    """Whether ranges lie end to end from 0 to `size`."""
    end = 0
    for start, stop in sorted(ranges):
        if start != end:
            return False
        end = stop
    return end == size


def _some(names: list[str]) -> str:
    more = f" … and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
