"""What doctor finds of an NPU, on machines as files and variables make them look."""

import os
from pathlib import Path
from typing import Any

import pytest

from internlm_lib.devices import cann
from internlm_lib.doctor import ascend
from internlm_lib.doctor.ascend import npu_findings
from internlm_lib.doctor.finding import Finding, probe
from internlm_lib.experiment.variables import variables


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without anything of Ascend's, whatever this one is."""
    for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH", "LD_LIBRARY_PATH", *variables()):
        monkeypatch.delenv(name, raising=False)
    roots = (tmp_path / "Ascend",)
    for name in ("set_env_scripts", "how_to_source", "driver_version"):
        original = getattr(cann, name)
        monkeypatch.setattr(cann, name, lambda given=roots, f=original: f(given))
    (tmp_path / "dev").mkdir()
    nodes = cann.device_nodes
    monkeypatch.setattr(cann, "device_nodes", lambda folder: nodes(tmp_path / "dev"))
    monkeypatch.setattr(ascend.shutil, "which", lambda name: None)
    installed(monkeypatch, torch="2.13.0+cpu")
    monkeypatch.setattr(ascend, "probe", lambda code: "ImportError: libhccl.so: cannot open")


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CANN 9.1.0 on disk, of whose set_env.sh nothing has been sourced yet."""
    folder = tmp_path / "Ascend" / "cann"
    (folder / "lib64").mkdir(parents=True)
    (folder / "lib64" / "libhccl.so").touch()
    (folder / "set_env.sh").touch()
    (folder / "aarch64-linux").mkdir()
    info = "package_name=Ascend-cann-toolkit\nversion=9.1.0\ninnerversion=V100\narch=aarch64\n"
    (folder / "aarch64-linux" / "ascend_toolkit_install.info").write_text(info)
    return folder


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    monkeypatch.setattr(ascend, "version_of", versions.get)


def source(monkeypatch: pytest.MonkeyPatch, toolkit: Path) -> None:
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(toolkit))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(toolkit / "lib64"))


def found(required: bool = False) -> dict[str, Finding]:
    return {finding.name: finding for finding in npu_findings(required)}


def statuses(required: bool = False) -> dict[str, str]:
    return {name: finding.status for name, finding in found(required).items()}


def test_nothing_of_ascend_is_nothing_to_complain_about() -> None:
    assert npu_findings() == [Finding("npu", "ok", "none here")]


def test_asked_for_an_npu_it_names_all_that_is_missing() -> None:
    assert statuses(required=True) == {
        "torch_npu": "fail", "CANN": "fail", "driver": "warn", "npu-smi": "warn",
        "npu devices": "fail", "npu variables": "ok",
    }  # fmt: skip
    findings = found(required=True)
    assert all(f.fix for f in findings.values() if f.status != "ok")
    assert "pip install 'torch_npu==2.13.0'" in findings["torch_npu"].fix
    assert "whl/cpu" in findings["torch_npu"].fix and "install CANN" in findings["CANN"].fix


def test_an_ascend_machine_without_torch_npu_is_told_which_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ascend.shutil, "which", lambda name: f"/usr/local/sbin/{name}")
    (npu,) = npu_findings()
    assert npu.status == "warn" and "make env NPU=1" in npu.fix


def test_without_cann_it_says_what_to_source(
    monkeypatch: pytest.MonkeyPatch, toolkit: Path
) -> None:
    installed(monkeypatch, torch="2.13.0+cpu", torch_npu="2.13.0")
    assert statuses() == {"torch_npu": "ok", "CANN": "fail", "npu": "fail"}
    findings = found()
    for name in ("CANN", "npu"):
        assert findings[name].fix.startswith(f"source {toolkit / 'set_env.sh'};")
    assert "libhccl.so" in findings["npu"].found


def test_versions_that_do_not_go_together(monkeypatch: pytest.MonkeyPatch, toolkit: Path) -> None:
    source(monkeypatch, toolkit)
    installed(monkeypatch, torch="2.13.0+cpu", torch_npu="2.12.0")
    fatal = found()["torch_npu"]
    assert (fatal.status, fatal.fix) == ("fail", "pip install 'torch_npu==2.13.0'")
    installed(monkeypatch, torch="2.9.0+cpu", torch_npu="2.9.0")
    doubtful = found()["torch_npu"]
    assert doubtful.status == "warn" and "CANN 9.1.0" in doubtful.found
    assert "pip install 'torch_npu==2.9.0.post6'" in doubtful.fix
    installed(monkeypatch, torch="2.9.0+cpu", torch_npu="2.9.0.post6")
    assert found()["torch_npu"] == Finding("torch_npu", "ok", "2.9.0.post6")
    assert found()["CANN"] == Finding("CANN", "ok", f"9.1.0 at {toolkit}")


def test_a_whole_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toolkit: Path) -> None:
    source(monkeypatch, toolkit)
    installed(monkeypatch, torch="2.13.0+cpu", torch_npu="2.13.0")
    driver = tmp_path / "Ascend" / "driver"
    driver.mkdir()
    (driver / "version.info").write_text("Version=24.1.rc3\nascendhal_version=7.35.23\n")
    for name in ("davinci0", "davinci1", "davinci_manager", "devmm_svm", "hisi_hdc", "null"):
        (tmp_path / "dev" / name).touch()
    monkeypatch.setattr(ascend.shutil, "which", lambda name: f"/usr/local/sbin/{name}")
    monkeypatch.setattr(ascend, "probe", lambda code: {"npu": 2, "name": "Ascend910B1"})
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    assert {(f.name, f.status, f.found) for f in npu_findings(required=True)} == {
        ("torch_npu", "ok", "2.13.0"),
        ("CANN", "ok", f"9.1.0 at {toolkit}"),
        ("driver", "ok", "24.1.rc3"),
        ("npu-smi", "ok", "/usr/local/sbin/npu-smi"),
        ("npu devices", "ok", "davinci0, davinci1"),
        ("npu variables", "ok", "TASK_QUEUE_ENABLE=2"),
        ("npu", "ok", "2 x Ascend910B1"),
    }


def test_devices_that_may_not_be_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("davinci0", "davinci_manager"):
        (tmp_path / "dev" / name).touch()

    def may(path: Path, mode: int) -> bool:
        return path.name == "davinci0" or not mode & os.W_OK

    monkeypatch.setattr(ascend.os, "access", may)
    devices = found(required=True)["npu devices"]
    assert devices.status == "fail" and "HwHiAiUser" in devices.fix
    assert devices.found == f"no permission: {tmp_path / 'dev' / 'davinci_manager'}"


def test_a_variable_that_is_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "60")
    variable = found(required=True)["npu variables"]
    assert variable.status == "fail" and "120 to 7200" in variable.found and variable.fix


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        ("RuntimeError: Two accelerators cannot be used at the same time", "torch==2.13.0+cpu"),
        ("ImportError: libascend_hal.so: cannot open shared object file", "driver"),
        ("ImportError: undefined symbol: _ZN2at", "versions that do not fit"),
    ],
)
def test_each_way_in_which_torch_npu_fails_has_its_fix(
    monkeypatch: pytest.MonkeyPatch, toolkit: Path, error: str, fix: str
) -> None:
    source(monkeypatch, toolkit)
    installed(monkeypatch, torch="2.13.0", torch_npu="2.13.0")
    monkeypatch.setattr(ascend, "probe", lambda code: error)
    npu = found()["npu"]
    assert (npu.status, npu.found) == ("fail", error) and fix in npu.fix


@pytest.mark.parametrize(("required", "status"), [(False, "warn"), (True, "fail")])
def test_no_device_is_a_failure_only_if_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, toolkit: Path, required: bool, status: str
) -> None:
    source(monkeypatch, toolkit)
    installed(monkeypatch, torch="2.13.0+cpu", torch_npu="2.13.0")
    monkeypatch.setattr(ascend, "probe", lambda code: {"npu": 0, "name": ""})
    assert found(required)["npu"].status == status


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('noise'); print('{\"npu\": 1}')", {"npu": 1}),
        ("raise ValueError('first line\\nsecond line')", "ValueError: first line"),
        ("import sys; sys.exit(3)", "ended with code 3"),
        ("import torch._no_such_thing", "ModuleNotFoundError: No module named"),
    ],
)
def test_a_probe_gives_what_it_printed_or_the_error(code: str, expected: Any) -> None:
    answer = probe(code)
    assert answer == expected or (isinstance(answer, str) and answer.startswith(expected))
