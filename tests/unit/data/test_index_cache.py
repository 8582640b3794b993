"""A cached index is whole, of the right key, and never unpickled."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from internlm_lib.data.index_cache import Index, cached_index, index_sha256
from internlm_lib.errors import InputError
from internlm_lib.files import read_json, write_json

FACTS = {"content_sha256": "abc", "seed": 1, "documents": [0, 40], "seq_length": 8, "samples": 96}
ARRAYS = {
    "documents": numpy.arange(40, dtype=numpy.int32),
    "samples": numpy.arange(30).reshape(15, 2),
}


class Cache:
    """A folder of indices, and how often one was built."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.built = folder, 0

    def get(self, first: bool = True, **facts: Any) -> Index:
        return cached_index(self.folder, "train", {**FACTS, **facts}, self._build, first=first)

    def _build(self) -> dict[str, Any]:
        self.built += 1
        return ARRAYS

    @property
    def path(self) -> Path:
        (path,) = self.folder.glob("train-*")
        return path


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "index")


def test_an_index_is_built_once_and_mapped_read_only(cache: Cache) -> None:
    built, again, elsewhere = cache.get(), cache.get(), cache.get(first=False)
    assert cache.built == 1
    for index in (built, again, elsewhere):
        assert index.sha256 == built.sha256 == index_sha256(FACTS, ARRAYS)
        assert index.arrays.keys() == ARRAYS.keys()
        for name, array in index.arrays.items():
            assert array.dtype == ARRAYS[name].dtype and numpy.array_equal(array, ARRAYS[name])
            assert isinstance(array, numpy.memmap) and not array.flags.writeable


@pytest.mark.parametrize("name", FACTS)
def test_every_fact_is_part_of_the_key(cache: Cache, name: str) -> None:
    other: Any = [0, 41] if name == "documents" else "other" if name == "content_sha256" else 7
    hashes = {cache.get().sha256, cache.get(**{name: other}).sha256}
    assert cache.built == 2 and len(hashes) == 2
    cache.get(), cache.get(**{name: other})
    assert cache.built == 2


def test_the_hash_is_of_the_arrays_too() -> None:
    turned = {**ARRAYS, "documents": ARRAYS["documents"][::-1]}
    assert index_sha256(FACTS, turned) != index_sha256(FACTS, ARRAYS)
    wider = {**ARRAYS, "documents": ARRAYS["documents"].astype(numpy.int64)}
    assert index_sha256(FACTS, wider) != index_sha256(FACTS, ARRAYS)


def cut_off(path: Path) -> None:
    os.truncate(path / "documents.npy", (path / "documents.npy").stat().st_size - 4)


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "samples.npy").read_bytes())
    content[-9] ^= 1
    (path / "samples.npy").write_bytes(content)


def reshape(path: Path) -> None:
    numpy.save(path / "samples.npy", ARRAYS["samples"].reshape(2, 15))


def remove_an_array(path: Path) -> None:
    (path / "samples.npy").unlink()


def remove_the_description(path: Path) -> None:
    (path / "index.json").unlink()


def break_the_description(path: Path) -> None:
    (path / "index.json").write_text("{")


def describe_nothing(path: Path) -> None:
    (path / "index.json").write_text("[]")


def take_anothers_place(path: Path) -> None:
    found = read_json(path / "index.json")
    write_json(path / "index.json", {**found, "facts": {**found["facts"], "seed": 2}})


DAMAGES = [
    cut_off, flip_a_bit, reshape, remove_an_array, remove_the_description, break_the_description,
    describe_nothing, take_anothers_place,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_made_again(cache: Cache, damage: Callable[[Path], None]) -> None:
    expected = cache.get().sha256
    damage(cache.path)
    with pytest.warns(UserWarning, match="train-.*: .*; it is made again"):
        found = cache.get()
    assert cache.built == 2 and found.sha256 == expected
    assert numpy.array_equal(found.arrays["documents"], ARRAYS["documents"])
    assert cache.get(first=False).sha256 == expected and cache.built == 2


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d is not flip_a_bit])
def test_other_ranks_refuse_what_the_first_cannot_have_seen(
    cache: Cache, damage: Callable[[Path], None]
) -> None:
    cache.get()
    damage(cache.path)
    with pytest.raises(InputError, match="the same path of one shared file system"):
        cache.get(first=False)
    assert cache.built == 1


def test_other_ranks_build_nothing(cache: Cache) -> None:
    with pytest.raises(InputError, match="shared file system"):
        cache.get(first=False)
    assert cache.built == 0


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_pickled_objects_are_never_opened(cache: Cache, tmp_path: Path) -> None:
    cache.get()
    trap = numpy.array([Trap(tmp_path / "trace")], dtype=object)
    numpy.save(cache.path / "documents.npy", trap, allow_pickle=True)
    with pytest.warns(UserWarning, match="made again"):
        cache.get()
    assert not (tmp_path / "trace").exists()
    with pytest.raises(ValueError, match="pickle"):
        cached_index(cache.folder, "other", FACTS, lambda: {"documents": trap}, first=True)
    assert not list(cache.folder.glob("other-*"))


def test_a_full_disk_leaves_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, array: Any, **_: Any) -> None:
        Path(path).write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numpy, "save", full)
    with pytest.raises(InputError, match="No space left on device.*leave room"):
        cache.get()
    assert list(cache.folder.iterdir()) == []


def test_a_build_that_is_killed_leaves_nothing_under_the_final_name(cache: Cache) -> None:
    code = (
        "import sys, time, numpy\nfrom pathlib import Path\n"
        "from internlm_lib.data import index_cache\n"
        "save = numpy.save\n"
        "def slow(*given, **named):\n"
        "    save(*given, **named); print('saved', flush=True); time.sleep(60)\n"
        "numpy.save = slow\n"
        f"facts = {FACTS!r}\n"
        "build = lambda: {'documents': numpy.arange(40), 'samples': numpy.arange(3)}\n"
        "index_cache.cached_index(Path(sys.argv[1]), 'train', facts, build, first=True)\n"
    )
    command = [sys.executable, "-c", code, str(cache.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "saved\n"
        process.send_signal(signal.SIGKILL)
    assert any(cache.folder.iterdir())  # what was begun
    assert list(cache.folder.glob("train-*")) == []
    assert cache.get().sha256 == index_sha256(FACTS, ARRAYS) and cache.built == 1


def test_an_index_in_use_survives_being_made_again(cache: Cache) -> None:
    """As when another training finds it damaged: pages that are mapped stay."""
    index = cache.get()
    remove_the_description(cache.path)
    with pytest.warns(UserWarning):
        cache.get()
    assert numpy.array_equal(index.arrays["samples"], ARRAYS["samples"])
