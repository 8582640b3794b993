"""The table of torch_npu, torch, Python and CANN, and what it says of versions installed."""

import re
from pathlib import Path

import pytest

from internlm_lib.devices import torch_npu_versions
from internlm_lib.devices.torch_npu_versions import (
    install_cpu_build,
    install_for,
    misfits,
    row_of,
    rows,
    table,
)


def test_every_row_belongs_to_the_torch_in_its_name_and_stands_once() -> None:
    names = [row.torch_npu for row in rows()]
    assert len(names) == len(set(names)) > 30
    assert all(row.torch_npu.split(".post")[0] == row.torch for row in rows())
    assert {row.torch for row in rows()} == set(table().python.versions)
    assert all(group.source for group in table().releases)


def test_the_pinned_pair_is_in_the_table_and_fits(repository: Path) -> None:
    project = (repository / "pyproject.toml").read_text()
    (torch_npu,) = re.findall(r'"torch_npu==([^"]+)"', project)
    (torch,) = re.findall(r'"torch==([^"]+)"', project)
    row = row_of(torch_npu)
    assert row is not None and row.torch == torch
    for python in ("3.10", "3.11", "3.12"):
        assert misfits(f"{torch}+cpu", torch_npu, python, None) == []
    assert install_for(f"{torch}+cpu") == f"pip install 'torch_npu=={torch_npu}'"


@pytest.mark.parametrize(
    ("versions", "fatal", "fix"),
    [
        (("2.13.0+cpu", "2.12.0", "3.11", None), [True], "pip install 'torch_npu==2.13.0'"),
        (("2.9.0", "2.13.0", "3.11", "8.5.0"), [True], "pip install 'torch_npu==2.9.0'"),
        (("2.9.0", "2.13.0", "3.11", "9.0.0"), [True], "pip install 'torch_npu==2.9.0.post2'"),
        (("2.99.1", "2.13.0", "3.11", None), [True], "pip install 'torch_npu==2.99.1.*'"),
        (("2.9.0", "2.9.0", "3.11", "9.1.0"), [False],
         "pip install 'torch_npu==2.9.0.post6', or install CANN 8.5.0"),
        (("2.12.0", "2.12.0", "3.11", "9.0.0"), [False], "install CANN 9.1.0"),
        (("2.6.0", "2.6.0", "3.12", "8.2.RC1"), [False], "make env PYTHON=python3.9"),
        (("2.6.0", "2.6.0", "3.11", "8.2.rc1"), [], ""),
        (("2.12.0", "2.12.0.post3", "3.11", "9.1.0"), [], ""),
        (("2.13.0+cpu", "2.13.0", "3.11", "9.1.0"), [], ""),
    ],
    ids=["other torch", "for this CANN", "for a newer CANN", "unknown torch", "older CANN's",
         "no other pair", "Python", "spelled otherwise", "not in the table", "no CANN known"],
)  # fmt: skip
def test_what_does_not_go_together_has_its_fix(
    versions: tuple[str, str, str, str | None], fatal: list[bool], fix: str
) -> None:
    found = misfits(*versions)
    assert [misfit.fatal for misfit in found] == fatal
    assert fix in "".join(misfit.fix for misfit in found)


def test_the_cpu_build_is_the_same_release_from_torchs_own_index() -> None:
    expected = f"pip install 'torch==2.13.0+cpu' --index-url {torch_npu_versions.CPU_BUILDS}"
    assert install_cpu_build("2.13.0+cu130") == install_cpu_build("2.13.0") == expected
