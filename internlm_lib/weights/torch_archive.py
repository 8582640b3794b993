"""torch.save's files, without their data: what tensors a file has, and where their bytes lie.

Read with `weights_only=True`: a pickle that would run code is refused. Written with holes, which
the tensors are then streamed into; torch documents both (`torch.serialization.skip_data`, and the
`_checkpoint_offset` of storages loaded to the meta device). As with torch's own
`set_crc32_options(False)`, the records carry no checksum of the data: torch never checks it, and
the manifest has a better one.
"""

import errno
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm_lib.errors import InputError
from internlm_lib.weights.storage import Run, StoredTensor

_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")


def read_archive(file: Path, allowed: Sequence[Any] = (), start: int = 0, length: int = 0) -> Any:
    """The object a file holds, its tensors as `StoredTensor`s.

    Args:
        allowed: classes and functions that training checkpoints hold beside tensors.
        start, length: of an archive inside of a larger file.
    Raises:
        InputError: for a damaged file, one from before torch 1.6, and any pickle that holds more
            than tensors, numbers, texts and what is `allowed`.
    """
    try:
        with file.open("rb") as stream, torch.serialization.safe_globals(list(allowed)):
            source: Any = stream
            if length:
                from torch.distributed.checkpoint.utils import _create_file_view

                source = _create_file_view(stream, start, length)
            return _located(torch.load(source, map_location="meta", weights_only=True), file, start)
    except InputError:
        raise
    except Exception as error:  # what a damaged pickle raises cannot be foreseen
        text = str(error)
        if found := _FORBIDDEN.search(text):
            raise InputError(
                f"{file} is refused: it is no file of weights alone, and opening it could run "
                f"code: it names {found[1]}"
            ) from error
        reason = (text.splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{file} cannot be read: {reason}; it is truncated, damaged, or was not written by "
            "torch.save; copy or download it again"
        ) from error


def create_archive(file: Path, tree: Any) -> Any:
    """Write `tree` with holes for its tensors' bytes; returns it as `read_archive` does.

    Args:
        tree: nested dicts and lists; tensors as `(shape, dtype)` pairs.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = _mapped(tree, _is_specification, lambda spec: torch.empty(spec[0], dtype=spec[1]))
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        try:
            torch.save(fake, file)
        except RuntimeError as error:
            _raise_why_not_written(file)
            raise OSError(errno.EIO, str(error), str(file)) from error
    return read_archive(file)


def _raise_why_not_written(file: Path) -> None:
    """torch's writer hides the system's error: meet it again, with Python's."""
    with file.open("ab") as stream:
        stream.write(bytes(1 << 16))
        stream.flush()
        os.fsync(stream.fileno())


def flatten(tree: Mapping[str, Any], file: Path, prefix: str = "") -> dict[str, StoredTensor]:
    """Nested dicts → dotted names of the tensors in them; everything else is left out.

    Raises InputError for a tensor whose elements do not lie in row-major order.
    """
    found: dict[str, StoredTensor] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flatten(value, file, f"{prefix}{key}.")
        elif isinstance(value, StoredTensor):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, Tensor) and value.numel() > 1:
            raise InputError(
                f"{file}: {prefix}{key} does not lie in row-major order; save it .contiguous()"
            )
    return found


def _located(value: Any, file: Path, start: int) -> Any:
    return _mapped(
        value, lambda part: isinstance(part, Tensor), lambda tensor: _stored(tensor, file, start)
    )


def _stored(tensor: Tensor, file: Path, start: int) -> Any:
    """Where a tensor's bytes lie; a non-contiguous one stays what it is: nobody streams it."""
    if tensor.numel() == 0 or not tensor.is_contiguous():
        return tensor
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise InputError(
            f"{file} was written before torch 1.6, in a format that cannot be streamed; load and "
            "save it with a newer torch"
        )
    first = start + offset + tensor.storage_offset() * tensor.element_size()
    return StoredTensor(tuple(tensor.shape), tensor.dtype, (Run(0, tensor.numel(), file, first),))


def _is_specification(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.dtype)


def _mapped(value: Any, chosen: Any, change: Any) -> Any:
    """A copy of nested dicts and lists with some of their leaves changed."""
    if chosen(value):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, chosen, change) for key, part in value.items()}
    if isinstance(value, list):
        return [_mapped(part, chosen, change) for part in value]
    return value
