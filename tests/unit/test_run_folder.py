"""Where a run lies, what it may be called, and which project it belongs to."""

from pathlib import Path
from typing import Any

import pytest

from internlm_lib.errors import InputError
from internlm_lib.run_folder import RunFolder, project_root


def make_project(folder: Path) -> Path:
    for part in ("notebooks", "params"):
        (folder / part).mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", ["tiny", "7b", "a.b-c_d", "A" * 100, "internlm_7b.2024-01-31"])
def test_a_runs_work_and_report_lie_under_the_root(tmp_path: Path, name: str) -> None:
    folder = RunFolder.of(name, tmp_path)
    assert folder.path == tmp_path / "runs" / name
    assert folder.report == tmp_path / "reports" / name
    assert folder.training("candidate").path == folder.path / "training" / "candidate"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "-x", "_x", "a/b", "../a", "/a", "a b", "a\n", "é", "a" * 101,
     7, 1.5, None, True],
)  # fmt: skip
def test_a_name_that_cannot_be_a_folders_is_bad_input(tmp_path: Path, name: Any) -> None:
    with pytest.raises(InputError, match="letters, digits") as caught:
        RunFolder.of(name, tmp_path)
    assert str(caught.value).startswith(f"run_name = {name!r}: ")


def test_a_run_is_found_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.of("tiny", tmp_path)
    assert RunFolder.at(folder.path) == folder
    monkeypatch.chdir(tmp_path)
    assert RunFolder.at(Path("runs/tiny")) == folder
    folder.data.mkdir(parents=True)
    monkeypatch.chdir(folder.data)
    assert RunFolder.at(Path("..")) == folder


def test_a_run_keeps_to_its_own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank is told a path: what the environment says of the project does not count."""
    monkeypatch.setenv("INTERNLM_HOME", str(tmp_path / "other"))
    assert RunFolder.at(tmp_path / "runs" / "tiny").root == tmp_path


def test_a_path_whose_name_no_run_can_have_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run_name = 'not a run'"):
        RunFolder.at(tmp_path / "runs" / "not a run")


def test_the_root_is_the_one_of_the_environment_before_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_project(tmp_path / "here"))
    monkeypatch.setenv("INTERNLM_HOME", "../elsewhere")
    assert project_root() == tmp_path / "elsewhere"
    assert RunFolder.of("tiny").root == tmp_path / "elsewhere"


@pytest.mark.parametrize("below", ["", "notebooks", "runs/tiny/data"])
@pytest.mark.parametrize("home", [None, ""])
def test_then_the_nearest_project_at_or_above_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str, home: str | None
) -> None:
    project = make_project(make_project(tmp_path / "outer") / "inner")
    (project / below).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(project / below)
    monkeypatch.delenv("INTERNLM_HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("INTERNLM_HOME", home)
    assert project_root() == project


@pytest.mark.parametrize("only", ["notebooks", "params"])
def test_then_the_checkout_this_package_lies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path, only: str
) -> None:
    (tmp_path / only).mkdir()  # half a project is none
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INTERNLM_HOME", raising=False)
    assert project_root() == repository


def test_and_at_last_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the package is installed outside a checkout."""
    from internlm_lib import run_folder

    installed = tmp_path / "site-packages" / "internlm_lib" / "run_folder.py"
    monkeypatch.setattr(run_folder, "__file__", str(installed))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INTERNLM_HOME", raising=False)
    assert project_root() == tmp_path
