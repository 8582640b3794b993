"""CANN as files tell, and torch_npu kept from those who would fail on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from internlm_lib.devices import base, cann, select_device
from internlm_lib.devices.npu import NpuDevice
from internlm_lib.errors import InputError

INSTALL_INFO = (
    "package_name=Ascend-cann-toolkit\nversion=8.1.RC1\ninnerversion=V100R001C21SPC001B212\n"
    "compatible_version=[V100R001C15],[V100R001C18]\narch=x86_64\nos=linux\n"
    "path=/usr/local/Ascend/ascend-toolkit/8.1.RC1/x86_64-linux\n"
)
VERSION_CFG = (
    "# version: 1.0\nruntime_running_version=[7.6.0.1.220:8.0.0]\n"
    "toolkit_running_version=[7.7.T20.0.B210:8.0.RC2]\n"
)
"""As published in bug reports."""


@pytest.mark.parametrize(
    ("files", "version"),
    [
        ({"x86_64-linux/ascend_toolkit_install.info": INSTALL_INFO}, "8.1.RC1"),
        ({"aarch64-linux/ascend_nnae_install.info": "version=9.1.0\n"}, "9.1.0"),
        ({"version.cfg": VERSION_CFG}, "8.0.RC2"),
        ({"version.cfg": VERSION_CFG.replace("toolkit", "opp")}, "8.0.0"),
        ({"version.cfg": "# version: 1.0\n"}, None),
        ({}, None),
    ],
)
def test_the_version_of_cann(tmp_path: Path, files: dict[str, str], version: str | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cann.version(tmp_path) == version


def test_the_script_to_source_is_one_that_exists(tmp_path: Path) -> None:
    roots = (tmp_path / "usr", tmp_path / "home")
    assert cann.how_to_source(roots) == (
        f"install CANN (none is in {roots[0]} or {roots[1]}), then: "
        f"source {roots[0]}/ascend-toolkit/set_env.sh"
    )
    made = [roots[1] / "ascend-toolkit/set_env.sh", roots[1] / "cann-8.5.0/set_env.sh"]
    for script in made:
        script.parent.mkdir(parents=True)
        script.touch()
    assert cann.how_to_source(roots) == f"source {made[0]} (or {made[1]})"
    newest = roots[0] / "cann/set_env.sh"
    newest.parent.mkdir(parents=True)
    newest.touch()
    assert cann.set_env_scripts(roots) == [newest, *made]


def test_the_home_is_what_set_env_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    monkeypatch.setenv("ASCEND_HOME_PATH", "/opt/cann")
    assert cann.home() == Path("/opt/cann")
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", "/opt/toolkit")
    assert cann.home() == Path("/opt/toolkit")


def test_the_loader_finds_cann_where_set_env_has_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}")
    assert not cann.is_loadable()
    (tmp_path / "libhccl.so").touch()
    assert cann.is_loadable()


@pytest.fixture
def broken_torch_npu(tmp_path: Path) -> dict[str, str]:
    """An environment with a torch_npu that, as the real one, cannot be imported without CANN, and
    that torch would import by itself."""
    package, info = tmp_path / "torch_npu", tmp_path / "torch_npu-2.13.0.dist-info"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libhccl.so: cannot open')\n")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    kept = {
        k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", cann.AUTOLOAD_VARIABLE)
    }
    return {**kept, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def test_the_kit_keeps_a_broken_torch_npu_from_everyone(broken_torch_npu: dict[str, str]) -> None:
    alone = run("import torch", broken_torch_npu)
    assert alone.returncode == 1 and "torch_npu" in alone.stderr
    code = """
import internlm_lib, importlib.util, json, os, torch
from internlm_lib.devices import select_device
try:
    select_device("npu")
except Exception as error:
    refusal = str(error)
try:
    import torch_npu
except ImportError as error:
    hidden = type(error).__name__
print(json.dumps([importlib.util.find_spec("torch_npu"), hidden, select_device().name, refusal,
                  os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]]))
"""
    done = run(code, broken_torch_npu)
    assert done.returncode == 0, done.stderr
    spec, hidden, device, refusal, autoload = json.loads(done.stdout)
    assert (spec, hidden, device, autoload) == (None, "ModuleNotFoundError", "cpu", "0")
    assert "CANN is not in this process's environment" in refusal and "set_env.sh" in refusal


def test_with_cann_on_the_loaders_path_torch_npu_is_left_alone(
    broken_torch_npu: dict[str, str], tmp_path: Path
) -> None:
    """Half a CANN is found out by whoever asks for an NPU; then nobody else runs into it."""
    (tmp_path / "libhccl.so").touch()
    environment = {**broken_torch_npu, "LD_LIBRARY_PATH": str(tmp_path)}
    code = """
import internlm_lib, importlib.util, json
from internlm_lib.devices.npu import NpuDevice
before = importlib.util.find_spec("torch_npu") is not None
npu = NpuDevice()
print(json.dumps([before, npu.available(), npu.advice(), importlib.util.find_spec("torch_npu")]))
"""
    done = run(code, environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        True, False, "torch_npu cannot be imported, libhccl.so: cannot open", None
    ]  # fmt: skip


def test_what_the_user_has_said_about_autoloading_stays(broken_torch_npu: dict[str, str]) -> None:
    code = "import internlm_lib, os; print(os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'])"
    assert run(code, {**broken_torch_npu, cann.AUTOLOAD_VARIABLE: "1"}).stdout == "1\n"


def test_a_device_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise cann.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", nothing)
    monkeypatch.setattr(NpuDevice, "available", lambda self: False)
    with pytest.raises(InputError, match="torch_npu is not installed.*make env NPU=1; found: "):
        select_device("npu")
    assert base.Device.advice(NpuDevice()) == ""
