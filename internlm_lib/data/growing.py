"""Files that only grow: their length and hash are known at every moment, so that an interrupted
writer can cut them back to what it had committed, and go on."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from internlm_lib.data.indexed import read_blocks


class GrowingFile:
    """Numbers of one dtype, one after another."""

    def __init__(self, path: Path, dtype: numpy.dtype) -> None:
        """Open a new file, or one that is going to be restored."""
        self.path, self.dtype = path, dtype
        self._file = path.open("ab", buffering=0)
        self._digest = hashlib.sha256()
        self._bytes = 0

    def append(self, values: NDArray) -> None:
        """Write numbers that the dtype holds. Raises OSError; what was written of them is void."""
        data = numpy.ascontiguousarray(values, self.dtype).data.cast("B")
        self._digest.update(data)
        self._bytes += len(data)
        while data:
            data = data[self._file.write(data) :]

    def commit(self) -> dict[str, Any]:
        """Wait until all is on the disk; returns what `restore` needs."""
        os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def restore(self, committed: Mapping[str, Any], see: Callable[[NDArray], None]) -> bool:
        """Cut the file back to what was committed; False if that is not there any more.

        Args:
            see: is given all of it, block by block.
        """
        if self.path.stat().st_size < committed["bytes"]:
            return False
        self._bytes = self._file.truncate(committed["bytes"])
        with self.path.open("rb") as file:
            for block in read_blocks(file, self.dtype):
                self._digest.update(block.tobytes())
                see(block)
        return self._digest.hexdigest() == committed["sha256"]

    def close(self) -> None:
        self._file.close()
