"""`make env`: which packages it would install, with and without NPU=1."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from internlm_lib.devices.torch_npu_versions import CPU_BUILDS

VENV, CONDA = "CONDA=", "CONDA=conda"


def commands(repository: Path, *variables: str) -> list[str]:
    """What make would run, one line a command, whatever is built here already."""
    # Under `make test` make would take this one for a part of itself.
    environment = {n: v for n, v in os.environ.items() if n not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "env", *variables],
        cwd=repository, capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return done.stdout.replace("\\\n", " ").splitlines()


def pinned(repository: Path, name: str) -> str:
    (version,) = re.findall(
        rf'"{name}==([\d.]+)"', (repository / "pyproject.toml").read_text(encoding="utf-8")
    )
    return version


@pytest.mark.parametrize("where", [VENV, CONDA])
def test_the_plain_environment_has_nothing_of_an_npu(repository: Path, where: str) -> None:
    lines = commands(repository, where)
    assert not any("npu" in line or "index" in line.lower() for line in lines)
    assert lines[-1] == f"touch {'.venv' if where == VENV else '.conda'}/.installed"


@pytest.mark.parametrize("where", [VENV, CONDA])
def test_npu_adds_what_the_extra_pins_beside_torchs_cpu_build(repository: Path, where: str) -> None:
    lines = commands(repository, where, "NPU=1")
    *before, install, touch = lines
    folder = ".venv" if where == VENV else ".conda"
    assert touch == f"touch {folder}/.installed-npu"
    assert f"--extra-index-url {CPU_BUILDS}" in install
    words = subprocess.run(
        ["bash", "-c", install.replace(f"{folder}/bin/python", "printf '%s\\n'")],
        cwd=repository, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert words.stdout.splitlines()[-2:] == [
        f"torch=={pinned(repository, 'torch')}+cpu",
        f"torch_npu=={pinned(repository, 'torch_npu')}",
    ]
    # or torch's build for CUDA would be downloaded first, with all that belongs to it
    packages = next(line for line in before if "requirements.lock" in line or "conda env" in line)
    assert CPU_BUILDS in packages


def test_the_comment_by_hand_is_what_make_does(repository: Path) -> None:
    text = (repository / "environment.yml").read_text(encoding="utf-8")
    for name in ("torch", "torch_npu"):
        version = pinned(repository, name) + ("+cpu" if name == "torch" else "")
        assert f" {name}=={version}" in text
    assert CPU_BUILDS in text
