"""Where a corpus is written until it is whole: a hidden folder beside it, which one process owns.

It stays when the work is interrupted, for the same work to go on from.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from internlm_lib.data.card import Card, card_path, read_card
from internlm_lib.errors import InputError, KitError
from internlm_lib.files import sync

_LOCK = "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
"""Said by network file systems that know no locks; there is none then."""
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


@contextlib.contextmanager
def working_folder(prefix: Path) -> Iterator[Path]:
    """Own `.<prefix>.preprocessing/`, which is made if need be.

    It is removed when the block ends, or ends with bad input: the same input would be bad again.

    Raises:
        InputError: it cannot be written, or another process works there.
        KitError: the disk is full.
    """
    folder = _folder(prefix)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            try:
                yield folder
            except InputError:
                shutil.rmtree(folder)
                raise
            shutil.rmtree(folder)
    except OSError as error:
        raise _told(error, folder) from error


def remove_working_folder(prefix: Path) -> None:
    """Remove what a process left that was killed when all was done. Raises as `working_folder`."""
    if _folder(prefix).exists():
        with working_folder(prefix):
            pass


def clear(folder: Path) -> None:
    """Remove what an earlier work has left."""
    for path in folder.iterdir():
        if path.name != _LOCK:
            path.unlink()


def publish(folder: Path, prefix: Path, card: Card) -> None:
    """Move a whole corpus to its place; does the rest where that was interrupted.

    An earlier card goes first, with the files that only it names, and the new one comes last, and
    is newer than they are: it then vouches for them (see `fingerprint`).
    """
    names = [file.name for file in card.files]
    for name in _names_of_earlier(prefix) - set(names):
        prefix.with_name(name).unlink(missing_ok=True)
    card_path(prefix).unlink(missing_ok=True)
    sync(prefix.parent, recursive=False)
    for name in names:
        if (folder / name).exists():
            (folder / name).replace(prefix.with_name(name))
    sync(prefix.parent, recursive=False)
    os.utime(folder / card_path(prefix).name)
    (folder / card_path(prefix).name).replace(card_path(prefix))
    sync(prefix.parent, recursive=False)


def _folder(prefix: Path) -> Path:
    return prefix.with_name(f".{prefix.name}.preprocessing")


def _names_of_earlier(prefix: Path) -> set[str]:
    try:
        card = read_card(prefix)
    except InputError:  # of another version
        return set()
    return {file.name for file in card.files} if card else set()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / _LOCK).open("w") as file:
        if not _is_mine(file):
            raise InputError(f"{folder}: another process is preprocessing to this prefix")
        yield


def _is_mine(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:  # or did its last owner remove it just now?
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


def _told(error: OSError, folder: Path) -> Exception:
    if error.errno in _FULL:
        written = sum(path.stat().st_size for path in folder.glob("*"))
        return KitError(
            f"{folder.parent}: no space left ({error.strerror}) after {written:,} bytes. Make "
            "room and give the same command again: it goes on from there. Or remove "
            f"{folder}"
        )
    if error.errno in _FORBIDDEN:
        return InputError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); give another prefix"
        )
    return error
