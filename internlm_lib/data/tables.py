"""Readers of files that are tables: parquet and arrow."""

import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from internlm_lib.data.columns import Columns, Fault, Found, Values
from internlm_lib.data.files import open_seekable

_BUFFER_BYTES = 1 << 20
_BATCH_ROWS, _BATCH_BYTES = 1024, 4 << 20
"""Rows that become Python objects at a time: so many, or so large."""


def read_parquet(file: Path, columns: Columns) -> Iterator[Found]:
    """Page by page: a row group may be as large as the file."""
    import pyarrow.parquet

    with (
        open_seekable(file) as stream,
        pyarrow.parquet.ParquetFile(
            stream, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        ) as parquet,
    ):
        wanted = columns.of(file, parquet.schema_arrow.names)
        about = parquet.metadata
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        rows = min(
            (_batch_rows(g.num_rows, g.total_byte_size) for g in groups if g.num_rows), default=1
        )
        batches = parquet.iter_batches(batch_size=rows, columns=wanted, use_threads=False)
        yield from _table_rows(batches)


def read_arrow(file: Path, columns: Columns) -> Iterator[Found]:
    """IPC files and streams; `datasets` writes streams. Sliced, as a batch may be the whole file.

    https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format
    """
    import pyarrow

    with open_seekable(file) as stream:
        if not os.fstat(stream.fileno()).st_size:
            return  # which cannot be mapped
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        source = pyarrow.BufferReader(pyarrow.py_buffer(mapped))
        if mapped[:6] == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            reader = pyarrow.ipc.open_stream(source)
            batches = iter(reader)
        wanted = columns.of(file, reader.schema.names)
        yield from _table_rows(_slices((b.select(wanted) for b in batches), mapped))


def _slices(batches: Iterator[Any], mapped: mmap.mmap) -> Iterator[Any]:
    for batch in batches:
        rows = _batch_rows(batch.num_rows, batch.nbytes)
        for start in range(0, batch.num_rows, rows):
            yield batch.slice(start, rows)
            # Or what was read would count as this process's memory for as long as it is mapped.
            mapped.madvise(mmap.MADV_DONTNEED)


def _batch_rows(rows: int, size: int) -> int:
    """How many rows to turn into Python objects at a time where `rows` take `size` bytes."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(1, size)))


def _table_rows(batches: Iterator[Any]) -> Iterator[Found]:
    number = 0
    for batch in batches:
        for found in _batch_values(batch):
            yield f"row {number}", found
            number += 1


def _batch_values(batch: Any) -> Sequence[Values | Fault]:
    try:
        batch.validate(full=True)  # offsets that point anywhere would crash the process
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:  # ArrowInvalid, bad UTF-8; dates Python lacks
        if batch.num_rows == 1:
            return [Fault(str(error))]
    return [_batch_values(batch.slice(row, 1))[0] for row in range(batch.num_rows)]
