"""Work that is done is not done twice, and what was interrupted goes on to the same files."""

import errno
import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internlm_lib.data import encoding
from internlm_lib.data.card import card_path, read_card
from internlm_lib.data.fingerprint import content_sha256
from internlm_lib.data.handlers import handler
from internlm_lib.data.indexed import corpus_files
from internlm_lib.data.inputs import Options
from internlm_lib.data.preprocess import Corpus, Progress, preprocess
from internlm_lib.data.tokenizer import Tokenizer, train_tokenizer
from internlm_lib.errors import InputError, KitError

RECORDS = [{"instruction": f"What is {n} plus {n}?", "output": str(2 * n)} for n in range(1000)]
PACKED = Options(pack_to=100)
Make = Callable[..., Corpus]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("t") / "tokenizer.model"
    return train_tokenizer((json.dumps(record) for record in RECORDS), 300, path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture
def make(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Make:
    """Preprocesses into `<tmp_path>/<name>`, committed every 100 rows."""
    monkeypatch.setattr(encoding, "_BATCH_ROWS", 25)
    monkeypatch.setattr("internlm_lib.data.corpus._PACKED_BATCHES", 4)
    monkeypatch.setattr("internlm_lib.data.corpus._COMMIT_SECONDS", 0)

    def make(name: str = "c", how: str = "alpaca_instruction", **options: Any) -> Corpus:
        options = {"options": PACKED, **options}
        return preprocess([source], tmp_path / name, handler(how, tokenizer), tokenizer, **options)

    return make


def contents(corpus: Corpus) -> list[bytes]:
    return [corpus.prefix.with_name(file.name).read_bytes() for file in corpus.card.files]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- not twice -----------------------------------------------------------------------------------


def test_a_second_call_does_nothing(make: Make, tmp_path: Path) -> None:
    first = make()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = make()
    assert (first.unchanged, second.unchanged) == (False, True)
    assert second.card == first.card == read_card(tmp_path / "c")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    forced = make(force=True)
    assert not forced.unchanged and contents(forced) == contents(first)


def test_data_that_were_moved_are_the_same_data(
    make: Make, source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    make()
    other = shutil.copy(source, tmp_path / "moved.jsonl")
    made = handler("alpaca_instruction", tokenizer)
    assert preprocess([Path(other)], tmp_path / "c", made, tokenizer, PACKED).unchanged


def test_what_has_changed_is_made_again(make: Make, source: Path, tmp_path: Path) -> None:
    before = contents(make())
    text = source.read_text()
    source.write_text(text.replace("plus 7?", "plus 8?"))
    assert source.stat().st_size == len(text)
    after = make()
    assert not after.unchanged and contents(after) != before
    assert not make(options=Options(pack_to=99)).unchanged
    assert not make(how="alpaca", options=Options()).unchanged
    # The files of the other kind, of which the new card knows nothing, are gone.
    assert names(tmp_path) == ["c.bin", "c.idx", "c.json", "records.jsonl"]


@pytest.mark.parametrize("number", range(6))
def test_a_damaged_file_is_made_again(make: Make, number: int) -> None:
    first = make()
    files = corpus_files(first.prefix, "instruction")
    before = files[number].read_bytes()
    files[number].write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert not make().unchanged
    assert files[number].read_bytes() == before
    assert make().unchanged


def test_a_handlers_code_counts(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make()
    own = tmp_path / "own.py"
    own.write_text("# a handler")
    monkeypatch.setattr("inspect.getfile", lambda _: str(own))
    assert not make().unchanged
    assert make().unchanged
    own.write_text("# another")
    assert not make().unchanged


def test_a_file_of_somebody_elses_is_not_overwritten(make: Make, tmp_path: Path) -> None:
    card_path(tmp_path / "c").write_text('{"mine": true}')
    with pytest.raises(InputError, match="c.json: not a dataset card"):
        make()
    assert card_path(tmp_path / "c").read_text() == '{"mine": true}'


def test_the_card_vouches_for_the_files(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = make().card
    read = []
    monkeypatch.setattr("internlm_lib.data.fingerprint.sha256_of", read.append)
    files = [tmp_path / file.name for file in card.files]
    content_sha256(files, card_path(tmp_path / "c"), tmp_path / "notes")
    assert read == []  # none of them is older than its card


# --- interrupted ---------------------------------------------------------------------------------


class Interruption(BaseException):
    """As Ctrl-C is one."""


def stop_at(documents: int) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if progress.documents >= documents:
            raise Interruption

    return on_progress


def test_it_goes_on_from_the_last_commit(make: Make, tmp_path: Path) -> None:
    whole = make("whole")
    for documents, kept in ((350, 300), (30, 300), (720, 700), (1000, 1000)):
        with pytest.raises(Interruption):
            make(on_progress=stop_at(documents))
        assert names(tmp_path)[0] == ".c.preprocessing" and "c.json" not in names(tmp_path)
        journal = (tmp_path / ".c.preprocessing" / "journal.jsonl").read_text().splitlines()
        assert len(journal) == kept // 100
    resumed = make()
    assert (resumed.resumed_documents, whole.resumed_documents) == (1000, 0)
    assert resumed.resumed_tokens == whole.card.counts.tokens
    assert contents(resumed) == contents(whole)
    unlike = {"created", "seconds"}
    assert resumed.card.model_dump(exclude=unlike) | {"files": ()} == whole.card.model_dump(
        exclude=unlike
    ) | {"files": ()}
    assert ".c.preprocessing" not in names(tmp_path)


@pytest.mark.parametrize("file", ["c_packed_labels_document.bin", "rows", "documents"])
@pytest.mark.parametrize("how", ["changed", "cut off", "gone"])
def test_what_is_damaged_meanwhile_is_made_anew(
    make: Make, tmp_path: Path, file: str, how: str
) -> None:
    whole = make("whole")
    with pytest.raises(Interruption):
        make(on_progress=stop_at(350))
    path = tmp_path / ".c.preprocessing" / file
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(b"\7" + content[1:] if how == "changed" else content[:8])
    resumed = make()
    assert resumed.resumed_documents == 0
    assert contents(resumed) == contents(whole)


def test_what_was_written_after_the_last_commit_is_cut_off(make: Make, tmp_path: Path) -> None:
    whole = make("whole")
    with pytest.raises(Interruption):
        make(on_progress=stop_at(350))
    for path in (tmp_path / ".c.preprocessing").iterdir():
        if path.suffix not in (".json", ".jsonl"):
            path.write_bytes(path.read_bytes() + bytes(1000))
    resumed = make()
    assert resumed.resumed_documents == 300
    assert contents(resumed) == contents(whole)


def test_a_disk_that_is_full_at_the_end_costs_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("internlm_lib.data.corpus._COMMIT_SECONDS", 1e9)
    with monkeypatch.context() as patch, pytest.raises(KitError, match="no space left"):
        patch.setattr("internlm_lib.data.corpus.write_index", full)
        make()
    assert make().resumed_documents == len(RECORDS)


def test_other_work_starts_anew(make: Make) -> None:
    whole = make("whole", options=Options())
    with pytest.raises(Interruption):
        make(on_progress=stop_at(350))
    other = make(options=Options())
    assert other.resumed_documents == 0 and contents(other) == contents(whole)


def test_force_starts_anew(make: Make) -> None:
    with pytest.raises(Interruption):
        make(on_progress=stop_at(350))
    assert make(force=True).resumed_documents == 0


@pytest.mark.parametrize("moved", range(9))
def test_moving_the_files_is_finished(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    whole = make("whole")
    make(options=Options(pack_to=50))  # an earlier corpus, to be replaced
    replace, calls = Path.replace, []

    def interrupted(self: Path, target: Path) -> Path:
        if ".c.preprocessing" in str(self.parent) and target.parent == tmp_path:
            calls.append(target)
            if len(calls) > moved:
                raise Interruption
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(Interruption):
            make()
    assert not card_path(tmp_path / "c").exists()  # no card beside files that are not its own
    assert len(calls) == moved + 1
    corpus = make()
    assert contents(corpus) == contents(whole) and make().unchanged
    assert ".c.preprocessing" not in names(tmp_path)


def test_what_is_left_of_finished_work_is_removed(make: Make, tmp_path: Path) -> None:
    make()
    left = tmp_path / ".c.preprocessing"
    left.mkdir()
    (left / "rows").write_text("")
    assert make().unchanged and not left.exists()


def test_two_do_not_work_at_once(make: Make, tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        make(on_progress=stop_at(350))
    with (tmp_path / ".c.preprocessing" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is preprocessing to this prefix"):
            make()
    assert make().resumed_documents == 300
