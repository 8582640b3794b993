"""What doctor finds of packages and of what torch sees by itself."""

import pytest

from internlm_lib import doctor
from internlm_lib.doctor import machine


def test_it_compares_with_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = (
        "# comment\nmlflow==3.17.2\nnumpy==2.2.6 ; python_full_version < '3.0'\n"
        "numpy==2.4.6 ; python_full_version >= '3.0'\n"
    )
    assert doctor.locked_versions(lock) == {"mlflow": "3.17.2", "numpy": "2.4.6"}
    monkeypatch.setattr(machine, "version_of", {"a": "1.0+cpu", "b": "2.0"}.get)
    assert machine._package("a", "1.0").status == "ok"
    assert machine._package("b", "1.0").status == "warn"
    assert machine._package("c", "1.0").status == "fail"


def test_it_finds_the_checkouts_own_lock() -> None:
    assert {finding.name for finding in machine._packages()} == set(machine.PACKAGES)


def test_it_survives_a_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PROBE", "raise RuntimeError('libhccl.so: cannot open')")
    (finding,) = machine._devices()
    assert finding.status == "fail" and "libhccl.so" in finding.found
    monkeypatch.setattr(machine, "_PROBE", "import os; os.abort()")
    assert machine._devices()[0].status == "fail"


@pytest.mark.parametrize(
    ("smi", "required", "status", "found"),
    [
        (None, False, "ok", "none here"),
        (None, True, "fail", "no GPU"),
        ("/bin/nvidia-smi", False, "warn", "torch sees no GPU"),
        ("/bin/nvidia-smi", True, "fail", "torch sees no GPU"),
    ],
)
def test_a_gpu_must_be_there_only_if_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, smi: str | None, required: bool, status: str, found: str
) -> None:
    monkeypatch.setattr(machine, "probe", lambda code: {"torch": "2.13.0+cpu", "cuda": 0})
    monkeypatch.setattr(machine.shutil, "which", lambda name: smi)
    cuda = machine._devices(required)[-1]
    assert (cuda.name, cuda.status) == ("cuda", status) and found in cuda.found
    assert bool(cuda.fix) == (status != "ok")
