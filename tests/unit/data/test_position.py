"""The position moves with what is read, whoever reads it."""

import gzip
from pathlib import Path

import pyarrow
import pyarrow.parquet

from internlm_lib.data.position import Position


def test_it_follows_the_files_in_order(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(bytes(1000))
    position = Position(files)
    assert (position(), position.total) == (0, 2000)
    with files[0].open("rb", buffering=0) as stream:
        stream.read(300)
        assert position() == 300
    assert position() == 300
    with files[1].open("rb", buffering=0) as stream:
        stream.read(1)
        assert position() == 1001
        stream.seek(0)
        assert position() == 1001  # never backwards


def test_it_counts_bytes_as_they_lie_on_the_disk(tmp_path: Path) -> None:
    packed = tmp_path / "a.gz"
    packed.write_bytes(gzip.compress(bytes(range(256)) * 4000))
    position = Position([packed])
    with pyarrow.input_stream(str(packed), compression="gzip") as stream:
        stream.read()
        assert position() == packed.stat().st_size == position.total


def test_it_sees_what_a_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{n} and {n * n % 997}" for n in range(60_000)]})
    pyarrow.parquet.write_table(table, path, row_group_size=20_000, compression="none")
    position, seen = Position([path]), []
    with path.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as parquet:
        for group in range(3):
            parquet.read_row_group(group)
            seen.append(position())
    assert [round(3 * place / position.total, 1) for place in seen] == [1.0, 2.0, 3.0]
