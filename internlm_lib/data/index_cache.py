"""Arrays that take time to make, kept in folders: whole or absent, checked, never another key's.

A folder's name ends in the hash of all that its arrays follow from (`facts`), so that a change of
any of it leads to another folder. `index.json` repeats the facts and says each array's hash. The
first rank reads an index through before anybody uses it, and makes a damaged one again; the others
come after it. Arrays are `.npy` files without pickled objects.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from internlm_lib.errors import InputError
from internlm_lib.files import atomic_path, read_json, sha256_of_json, write_json

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Index:
    """Arrays of a cache, mapped into memory read-only."""

    arrays: Arrays
    sha256: str
    """Hash of the facts and of the arrays."""


class _DamagedError(Exception):
    """What is wrong with a cached index."""


def cached_index(
    folder: Path, name: str, facts: Mapping[str, Any], build: Callable[[], Arrays], *, first: bool
) -> Index:
    """The index that follows from `facts`, made by `build` if it is not there or damaged.

    Args:
        folder: of all indices.
        name: what the names of its folders begin with, for people.
        facts: JSON values; all that the arrays follow from.
        first: of the ranks of a job, the one that checks and builds; True in a process on its own.
    Raises:
        InputError: the folder cannot be written; or, not being the first rank, what that has
            checked or built is not here.
    """
    path = folder / f"{name}-{sha256_of_json(facts)[:16]}"
    if not first:
        try:
            return _read(path, facts, check=False)
        except _DamagedError as error:
            raise InputError(
                f"{path}: {error}, although the first rank has just read it: every node needs the "
                "data at the same path of one shared file system"
            ) from None
    if path.exists():
        try:
            return _read(path, facts, check=True)
        except _DamagedError as error:
            warnings.warn(f"{path}: {error}; it is made again", stacklevel=2)
    try:
        _write(path, facts, build())
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error}); the order of the samples is kept there: make "
            f"{folder} writable and leave room on its disk"
        ) from error
    return _read(path, facts, check=False)


def index_sha256(facts: Mapping[str, Any], arrays: Arrays) -> str:
    """`Index.sha256` of arrays that need no cache."""
    return sha256_of_json(_description(facts, arrays))


def _write(path: Path, facts: Mapping[str, Any], arrays: Arrays) -> None:
    with atomic_path(path) as temporary:
        temporary.mkdir()
        for name, array in arrays.items():
            numpy.save(temporary / f"{name}.npy", array, allow_pickle=False)
        write_json(temporary / "index.json", _description(facts, arrays))


def _read(path: Path, facts: Mapping[str, Any], *, check: bool) -> Index:
    """Raises _DamagedError; `check` reads all bytes, else only sizes are compared."""
    try:
        found = read_json(path / "index.json")
        if found["facts"] != facts:
            raise _DamagedError("it is the index of something else")
        arrays = {
            name: numpy.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in found["arrays"]
        }
        for name, array in arrays.items():
            expected = found["arrays"][name]
            seen = _described(array) if check else {**expected, **_form(array)}
            if seen != expected:
                raise _DamagedError(f"{name}.npy is not what was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _DamagedError(f"it cannot be read ({type(error).__name__}: {error})") from error
    return Index(arrays, sha256_of_json(found))


def _description(facts: Mapping[str, Any], arrays: Arrays) -> dict[str, Any]:
    described = {name: _described(array) for name, array in arrays.items()}
    return {"facts": dict(facts), "arrays": described}


def _described(array: NDArray[Any]) -> dict[str, Any]:
    digest = hashlib.sha256(numpy.ascontiguousarray(array).data)
    return {**_form(array), "sha256": digest.hexdigest()}


def _form(array: NDArray[Any]) -> dict[str, Any]:
    return {"dtype": array.dtype.str, "shape": list(array.shape)}
