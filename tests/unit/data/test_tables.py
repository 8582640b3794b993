"""Readers of parquet and arrow: damage stays in its row, or stops; nothing crashes the process."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internlm_lib.data import tables
from internlm_lib.data.records import Damage, RecordError, read_rows
from internlm_lib.errors import InputError

ROWS = [{"text": f"{n} é", "turns": [{"n": n}] * (n % 3), "none": None} for n in range(3000)]
FORMS = ["a.parquet", "file.arrow", "stream.arrow", "zstd.arrow"]
CODECS = {"file.arrow": None, "stream.arrow": None, "zstd.arrow": "zstd"}


def write(file: Path, table: pyarrow.Table) -> Path:
    if file.suffix == ".parquet":
        # Without statistics, which would show bad UTF-8 as soon as the file is opened.
        pyarrow.parquet.write_table(table, file, row_group_size=1000, write_statistics=False)
        return file
    new = pyarrow.ipc.new_stream if file.name == "stream.arrow" else pyarrow.ipc.new_file
    options = pyarrow.ipc.IpcWriteOptions(compression=CODECS[file.name])
    with new(str(file), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=2000)
    return file


def values(file: Path, **options: Any) -> list[Any]:
    return [row.values for row in read_rows([file], **options)]


def strings(*raw: bytes) -> pyarrow.Array:
    """A column of text, whose bytes nobody checks."""
    binary = pyarrow.array(raw, pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(raw), binary.buffers())


@pytest.mark.parametrize("form", FORMS)
def test_all_rows_of_all_groups_and_batches(tmp_path: Path, form: str) -> None:
    file = write(tmp_path / form, pyarrow.Table.from_pylist(ROWS))
    assert values(file) == ROWS
    assert [row.where for row in read_rows([file])][2999] == f"{file}, row 2999"


@pytest.mark.parametrize("form", FORMS)
def test_large_rows_are_handed_out_a_few_at_a_time(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    batch_values = tables._batch_values
    monkeypatch.setattr(
        tables, "_batch_values", lambda batch: sizes.append(batch.num_rows) or batch_values(batch)
    )
    rows = [{"text": str(n) * (1 << 20)} for n in range(9)]
    assert values(write(tmp_path / form, pyarrow.Table.from_pylist(rows))) == rows
    assert max(sizes) <= 4


@pytest.mark.parametrize("form", FORMS)
def test_text_that_is_not_utf8(tmp_path: Path, form: str) -> None:
    table = pyarrow.table({"text": strings(b"0", b"1\xff", b"2", b"\xed\xa0\xbd", b"4")})
    file = write(tmp_path / form, table)
    with pytest.raises(RecordError, match=f"{form}, row 1: .*(UTF8|UTF-8|utf-8)"):
        values(file)
    damage = Damage()
    assert values(file, on_damage="count", damage=damage) == [{"text": t} for t in "024"]
    assert damage.count == 2 and [m.split(":")[0][-5:] for m in damage.first] == ["row 1", "row 3"]


@pytest.mark.parametrize("form", FORMS)
def test_dates_that_python_does_not_know(tmp_path: Path, form: str) -> None:
    days = pyarrow.array([0, 10**7, 1], pyarrow.date32())
    damage = Damage()
    file = write(tmp_path / form, pyarrow.table({"day": days}))
    assert len(values(file, on_damage="count", damage=damage)) == 2
    assert damage.first[0].startswith(f"{file}, row 1: ")


@pytest.mark.parametrize("form", FORMS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(kept=st.floats(0, 1, exclude_max=True))
def test_files_that_are_cut_off_stop_whatever_is_chosen(
    tmp_path: Path, form: str, kept: float
) -> None:
    content = write(tmp_path / form, pyarrow.Table.from_pylist(ROWS)).read_bytes()
    # The last 8 bytes of a stream say that it ends, which its end says as well.
    cut = int((len(content) - 8) * kept)
    (tmp_path / form).write_bytes(content[:cut])
    with pytest.raises(InputError, match=rf"{form}: (not a readable|holds no records)"):
        values(tmp_path / form, on_damage="count", damage=Damage())


@pytest.mark.parametrize("form", ["a.parquet", "file.arrow"])
def test_columns_of_the_same_name(tmp_path: Path, form: str) -> None:
    table = pyarrow.Table.from_arrays([strings(b"a"), strings(b"b")], ["text", "text"])
    with pytest.raises(InputError, match="two columns have the same name; found text, text"):
        values(write(tmp_path / form, table))


def test_pages_are_checked_where_they_have_checksums(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["find me here"] * 10})
    for checksum, caught in ((False, False), (True, True)):
        pyarrow.parquet.write_table(
            table, file, compression="none", write_page_checksum=checksum, write_statistics=False
        )
        content = file.read_bytes()
        file.write_bytes(content.replace(b"find me here", b"find it here"))
        if caught:
            with pytest.raises(InputError, match="not a readable parquet file.*CRC"):
                values(file)
        else:
            assert values(file)[0] == {"text": "find it here"}


def test_folders_that_datasets_writes(tmp_path: Path) -> None:
    """The format of `datasets`' own files, and of the folders of `save_to_disk`."""
    import datasets

    rows = [{"text": str(n), "turns": [{"n": n}]} for n in range(10)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    assert values(tmp_path / "saved") == rows
    data.to_parquet(tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == rows


FLIP = """
import random, sys
from pathlib import Path
from internlm_lib.data.records import Damage, read_rows
from internlm_lib.errors import InputError
file, draw = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
content, refused = file.read_bytes(), 0
for _ in range(150):
    damaged = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        damaged[draw.randrange(len(damaged))] = draw.randrange(256)
    file.write_bytes(damaged)
    try:
        list(read_rows([file], on_damage="count", damage=(damage := Damage())))
        refused += damage.count > 0
    except InputError:
        refused += 1
print(refused)
"""


@pytest.mark.parametrize("form", FORMS)
def test_wrong_bytes_anywhere_never_crash(tmp_path: Path, form: str) -> None:
    file = write(tmp_path / form, pyarrow.Table.from_pylist(ROWS[:200]))
    seed = str(random.randrange(10**6))
    done = subprocess.run(
        [sys.executable, "-c", FLIP, str(file), seed], capture_output=True, text=True
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    assert int(done.stdout) > 10
