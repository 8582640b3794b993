"""Which files a source means, what is refused rather than half read, and unpacking."""

import errno
import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from internlm_lib.data.files import (
    compression_of,
    find_sources,
    kind_of,
    open_bytes,
    open_seekable,
    source_files,
)
from internlm_lib.errors import InputError

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda raw: pyarrow.compress(raw, codec="zstd", asbytes=True),
}
TEXT = b"".join(b"%d: not all alike\n" % number for number in range(200_000))
"""Larger than the buffers that it is read through."""


def touch(folder: Path, *names: str) -> list[Path]:
    files = [folder / name for name in names]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return files


@pytest.mark.parametrize(
    ("name", "kind", "compression"),
    [
        ("a.parquet", "parquet", None),
        ("v1.2.train.JSONL", "jsonl", None),
        ("a.json.gz", "json", "gzip"),
        ("a.snappy.parquet.zst", "parquet", "zstd"),
        ("a.tsv", "", None),
        ("a.gz", "", "gzip"),
        ("jsonl", "", None),
        ("a.jsonl.bak", "", None),
    ],
)
def test_the_name_says_what_a_file_is(name: str, kind: str, compression: str | None) -> None:
    assert (kind_of(Path(name)), compression_of(Path(name))) == (kind, compression)


def test_a_folder_is_searched_through_in_the_order_of_paths(tmp_path: Path) -> None:
    files = touch(tmp_path, "a/2.jsonl", "a/b/1.jsonl.gz", "c.JSONL", "d/0.jsonl.zst")
    touch(tmp_path, ".hidden.jsonl", ".cache/a.jsonl", "a/.git/x/y.jsonl")
    others = touch(tmp_path, "LICENSE", "README.md", "a/load.py", "c.jsonl.sha256", "readme.txt")
    found = find_sources([tmp_path])
    assert found.files == tuple(files)
    assert found.ignored == tuple(others)
    assert source_files([tmp_path]) == files


def test_a_hidden_folder_can_be_given(tmp_path: Path) -> None:
    files = touch(tmp_path, ".cache/a.jsonl")
    assert source_files([tmp_path / ".cache"]) == files


def test_globs(tmp_path: Path) -> None:
    one, two, deep = touch(tmp_path, "a-1.csv", "a-2.csv", "x/y/a-3.csv")
    (other,) = touch(tmp_path, "a-1.txt")
    assert source_files([tmp_path / "*.csv"]) == [one, two]
    assert source_files([tmp_path / "**/*.csv"]) == [one, two, deep]
    assert source_files([tmp_path / "a-[2]*"]) == [two]
    assert source_files([tmp_path / "x*"]) == [deep], "a folder that matches is searched through"
    assert source_files([tmp_path / "x/**"]) == [deep], "also where it and its file match"
    assert source_files([tmp_path / "a-?.txt"]) == [other]
    with pytest.raises(InputError, match=r"holds \.csv and \.txt files"):
        source_files([tmp_path / "a-*"])
    with pytest.raises(InputError, match=r"b-\*: holds no records; their files are named \.parq"):
        source_files([tmp_path / "b-*"])


def test_a_name_with_marks_of_a_glob_is_a_name_first(tmp_path: Path) -> None:
    files = touch(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert source_files(files[:1]) == files[:1]


def test_sources_keep_their_order_and_may_differ_in_kind(tmp_path: Path) -> None:
    text, first, second = touch(tmp_path, "z.txt", "f/1.parquet", "f/2.parquet")
    assert source_files([text, tmp_path / "f"]) == [text, first, second]
    assert source_files([second, first, text]) == [second, first, text]


def test_several_kinds_in_a_folder_are_refused(tmp_path: Path) -> None:
    one, _, other = touch(tmp_path, "a.json", "b.json", "deep/down/c.parquet")
    with pytest.raises(InputError, match=r"holds \.json and \.parquet files; give one") as error:
        source_files([tmp_path])
    assert str(one) in str(error.value) and str(other) in str(error.value)


def test_records_given_twice_are_refused(tmp_path: Path) -> None:
    file, packed = touch(tmp_path, "a.jsonl", "b/a.jsonl.gz")
    with pytest.raises(InputError, match="the same records twice"):
        source_files([tmp_path, file])
    with pytest.raises(InputError, match="the same records twice"):
        source_files([file, tmp_path / "b" / ".." / "a.jsonl"])
    assert source_files([tmp_path]) == [file, packed]
    touch(tmp_path, "b/a.jsonl")
    with pytest.raises(InputError, match=r"a\.jsonl and .*a\.jsonl\.gz: the same records twice"):
        source_files([tmp_path / "b"])
    (tmp_path / "link.jsonl").symlink_to(file)
    with pytest.raises(InputError, match="the same records twice"):
        source_files([tmp_path / "*.jsonl"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("b.jsonl.bz2", "cannot tell whether it holds records"),
        ("b.ZIP", "cannot tell whether it holds records"),
        ("part-0000.gz", "cannot tell whether it holds records"),
        ("b.tar.zst", "cannot tell whether it holds records"),
        ("b.jsonl.part", "an unfinished download"),
        ("b.parquet.incomplete", "an unfinished download"),
    ],
)
def test_what_may_hold_a_part_of_the_records_is_refused(
    tmp_path: Path, name: str, message: str
) -> None:
    touch(tmp_path, "a.jsonl")
    (file,) = touch(tmp_path, name)
    with pytest.raises(InputError, match=message) as error:
        source_files([tmp_path])
    assert str(file) in str(error.value)


def test_sources_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no source of records is given"):
        source_files([])
    with pytest.raises(InputError, match=r"nowhere: no such file or folder; expected records as"):
        source_files([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="holds no records"):
        source_files([tmp_path])
    (file,) = touch(tmp_path, "a.tsv")
    with pytest.raises(InputError, match=r"records are read from \.parquet.*, not from '\.tsv'"):
        source_files([file])
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "gone")
    assert source_files([tmp_path]) == [tmp_path / "broken.jsonl"], "not silently left out"


def test_a_folder_that_cannot_be_searched_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.jsonl", "b/c.jsonl")

    def scandir(folder: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", folder)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(InputError, match="Permission denied; a part of the records would be miss"):
        source_files([tmp_path])


def test_linked_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    files = touch(tmp_path, "elsewhere/a.jsonl", "data/b.jsonl")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data")
    found = [file.resolve() for file in source_files([tmp_path / "data"])]
    assert found == [files[1], files[0]]


def test_bookkeeping_of_hugging_face_datasets_is_no_record(tmp_path: Path) -> None:
    (data,) = touch(tmp_path, "data-00000-of-00001.arrow")
    others = touch(tmp_path, "cache-0123.arrow", "dataset_info.json", "state.json")
    found = find_sources([tmp_path])
    assert (found.files, found.ignored) == ((data,), tuple(others))
    for file in others[1:]:
        assert source_files([file]) == [file], "who gives a file by its name means it"
        file.unlink()
    assert source_files([tmp_path]) == [others[0], data], "anybody's name without a state beside"


@pytest.mark.parametrize("suffix", PACK)
def test_packed_files_are_unpacked(tmp_path: Path, suffix: str) -> None:
    pack = PACK[suffix]
    file = tmp_path / f"a.txt{suffix}"
    # Several members one behind the other, one of them empty: what `cat` of packed files makes.
    file.write_bytes(pack(b"") + pack(TEXT[:1000]) + pack(TEXT[1000:]))
    with open_bytes(file) as stream:
        assert stream.read() == TEXT
    with open_bytes(file) as stream:
        assert b"".join(stream) == TEXT
    with open_seekable(file) as seekable:
        assert seekable.seek(1000) == 1000 and seekable.read() == TEXT[1000:]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kept", [1, 0.5, -1, -9])
def test_packed_files_that_are_cut_off(tmp_path: Path, suffix: str, kept: float) -> None:
    packed = PACK[suffix](TEXT)
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(packed[: int(len(packed) * kept) if kept == 0.5 else int(kept)])
    with open_bytes(file) as stream, pytest.raises(OSError, match="Truncated"):
        stream.read()


@pytest.mark.parametrize("suffix", PACK)
def test_files_that_are_not_packed_as_their_name_says(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(TEXT)
    with open_bytes(file) as stream, pytest.raises(OSError):
        stream.read()


def test_the_checksum_of_gzip_is_checked(tmp_path: Path) -> None:
    damaged = bytearray(gzip.compress(TEXT))
    damaged[-8] ^= 0xFF
    file = tmp_path / "a.txt.gz"
    file.write_bytes(damaged)
    with open_bytes(file) as stream, pytest.raises(OSError, match="incorrect data check"):
        stream.read()


@pytest.mark.parametrize("suffix", PACK)
def test_a_packed_file_under_a_plain_name(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(PACK[suffix](TEXT))
    with pytest.raises(InputError, match=rf"is packed; name it a\.jsonl\{suffix}"):
        with open_bytes(file):
            pass


def test_no_space_to_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet.gz"
    file.write_bytes(gzip.compress(TEXT))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(InputError, match="no space left to unpack it .* set TMPDIR"):
        with open_seekable(file):
            pass
