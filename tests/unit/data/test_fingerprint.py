"""The hash of token files is never an earlier file's, and hardly ever costs a reading."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from internlm_lib.data import fingerprint
from internlm_lib.data.fingerprint import content_sha256
from internlm_lib.errors import InputError
from internlm_lib.files import sha256_of, write_json


class Corpus:
    """Two files, and how often they are read."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir()
        self.files = [folder / "corpus.bin", folder / "corpus.idx"]
        for file in self.files:
            file.write_bytes(file.suffix.encode() * 100)
        self.card, self.notes = folder / "corpus.json", folder / "index"
        self.read: list[str] = []

        def counted(path: Path) -> str:
            self.read.append(path.suffix)
            return sha256_of(path)

        monkeypatch.setattr(fingerprint, "sha256_of", counted)

    def sha256(self) -> str:
        return content_sha256(self.files, self.card, self.notes)

    def write_card(self, **others: Any) -> None:
        hashes = {file.name: sha256_of(file) for file in self.files} | others
        named = [{"name": name, "sha256": sha256} for name, sha256 in hashes.items()]
        write_json(self.card, {"files": named})


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    return Corpus(tmp_path / "a", monkeypatch)


def test_it_is_the_contents_and_not_the_paths(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert corpus.sha256() == Corpus(tmp_path / "b", monkeypatch).sha256()
    corpus.files.reverse()
    assert corpus.sha256() != Corpus(tmp_path / "c", monkeypatch).sha256()


def test_files_are_read_once(corpus: Corpus) -> None:
    first = corpus.sha256()
    assert corpus.read == [".bin", ".idx"]
    assert corpus.sha256() == first
    assert corpus.read == [".bin", ".idx"]


def test_files_of_one_name_in_two_folders_are_noted_apart(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Corpus(tmp_path / "b", monkeypatch)
    other.notes = corpus.notes
    for _ in range(2):
        corpus.sha256()
        other.sha256()
    assert other.read == [".bin", ".idx"] * 2  # the latest count of both


@pytest.mark.parametrize("with_card", [False, True])
def test_a_file_written_over_is_read_again_whatever_its_times_say(
    corpus: Corpus, with_card: bool
) -> None:
    """Same size, and the modification time put back."""
    if with_card:
        time.sleep(0.02)
        corpus.write_card()
    before, (path, _) = corpus.sha256(), corpus.files
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    time.sleep(0.02)
    path.write_bytes(b"other" * 80)
    os.utime(path, ns=times)
    if with_card:
        with pytest.raises(InputError, match=r"corpus.bin: its sha256 is .*corpus.json says"):
            corpus.sha256()
    else:
        assert corpus.sha256() != before
    assert corpus.read[-1] == ".bin"


def test_a_file_moved_into_place_is_noticed_though_it_is_old(corpus: Corpus) -> None:
    old = corpus.files[0].with_name("old")
    old.write_bytes(b"other" * 80)
    os.utime(old, (1e9, 1e9))
    time.sleep(0.02)
    corpus.write_card()
    time.sleep(0.02)
    old.replace(corpus.files[0])
    with pytest.raises(InputError, match="damaged or replaced"):
        corpus.sha256()


def test_a_card_written_after_the_files_vouches_for_them(corpus: Corpus) -> None:
    read = corpus.sha256()
    corpus.read.clear()
    time.sleep(0.02)
    corpus.write_card()
    assert corpus.sha256() == read
    corpus.write_card(**{"corpus.bin": "f" * 64})
    assert corpus.sha256() != read  # it was believed
    assert corpus.read == []


def test_a_card_older_than_the_files_does_not(corpus: Corpus) -> None:
    """As after copying: the card keeps its time, or is copied first."""
    corpus.write_card()
    os.utime(corpus.card, (1e9, 1e9))
    with_card = corpus.sha256()
    assert corpus.read == [".bin", ".idx"]
    corpus.card.unlink()
    assert corpus.sha256() == with_card


def test_a_file_that_the_card_does_not_name_is_read(corpus: Corpus) -> None:
    time.sleep(0.02)
    write_json(corpus.card, {"files": [{"name": "corpus.idx", "sha256": "0" * 64}]})
    corpus.sha256()
    assert corpus.read == [".bin"]


@pytest.mark.parametrize("text", ["", "[1]", '{"files": 3}', '{"files": [{"name": "a"}]}'])
def test_something_else_in_the_cards_place_is_bad_input(corpus: Corpus, text: str) -> None:
    corpus.card.write_text(text)
    with pytest.raises(InputError, match="corpus.json is not a dataset card"):
        corpus.sha256()


@pytest.mark.parametrize("text", ["", "[1]", '{"sha256": "0"}'])
def test_a_damaged_note_is_written_anew(corpus: Corpus, text: str) -> None:
    first = corpus.sha256()
    notes = sorted(corpus.notes.iterdir())
    assert len(notes) == 2
    notes[0].write_text(text)
    assert corpus.sha256() == first
    assert corpus.read == [".bin", ".idx", ".bin"]


def test_a_file_that_is_still_being_written_is_bad_input(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(path: Path) -> str:
        found = sha256_of(path)
        path.write_bytes(path.read_bytes() + b"more")
        return found

    monkeypatch.setattr(fingerprint, "sha256_of", meanwhile)
    with pytest.raises(InputError, match="still being written"):
        corpus.sha256()
