"""Looks at this machine and this environment: what is there, what is missing, what to do.

Whatever imports torch runs in a process of its own: a broken torch_npu, which torch loads by
itself, must not be able to end the examination.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from internlm_lib.run_folder import project_root

if TYPE_CHECKING:
    from rich.console import Console

KERNEL = "internlm"
PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers", "lm-eval", "mlflow", "papermill")

_GIB = 1 << 30
_DISK_BYTES, _MEMORY_BYTES = 4 * _GIB, 4 * _GIB
"""What the tiny experiment needs at most."""
_SUBPROCESS_SECONDS = 120
_PYTHONS = ((3, 10), (3, 13))
_INSTALL = "make env"

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    name: str
    status: Status
    found: str
    fix: str = ""
    """What to do; empty where nothing is needed."""


def examine() -> list[Finding]:
    """All findings, in the order a reader would check them."""
    checks: tuple[Callable[[], list[Finding]], ...] = (
        _python, _packages, _devices, _npu, _memory, _disk, _kernel, _mlflow_store,
    )  # fmt: skip
    return [finding for check in checks for finding in check()]


def print_findings(findings: Sequence[Finding], console: "Console") -> None:
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table("check", "status")
    table.add_column("found", overflow="fold")
    table.add_column("fix", overflow="fold")
    for finding in findings:
        mark = f"[{colours[finding.status]}]{finding.status}[/]"
        table.add_row(finding.name, mark, escape(finding.found), escape(finding.fix))
    console.print(table)


def _python() -> list[Finding]:
    low, high = _PYTHONS
    good = low <= sys.version_info[:2] < high
    found = f"{sys.version.split()[0]} at {sys.prefix}"
    fix = "make env PYTHON=python3.11 (3.10, 3.11 and 3.12 are supported)"
    return [Finding("python", "ok" if good else "fail", found, "" if good else fix)]


def _packages() -> list[Finding]:
    """Versions installed against those of requirements.lock."""
    lock = Path(__file__).resolve().parents[1] / "requirements.lock"
    if not lock.exists():
        return [Finding("packages", "fail", f"{lock} is missing", "run from a checkout of the kit")]
    locked = locked_versions(lock.read_text(encoding="utf-8"))
    return [_package(name, locked.get(name)) for name in PACKAGES]


def locked_versions(text: str) -> dict[str, str]:
    """Versions that a lock file pins for this Python and platform, by distribution name."""
    from packaging.requirements import Requirement

    versions = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith(("#", "-")):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            versions[requirement.name] = str(requirement.specifier).removeprefix("==")
    return versions


def _package(name: str, wanted: str | None) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, "fail", "not installed", _INSTALL)
    if wanted is None or version.split("+")[0] == wanted:
        return Finding(name, "ok", version)
    return Finding(
        name, "warn", f"{version}, locked is {wanted}", f"{_INSTALL}, or test what you changed"
    )


_PROBE = """
import json, torch
found = {"cpu": 1, "cuda": torch.cuda.device_count()}
if found["cuda"]:
    found["name"] = torch.cuda.get_device_name(0)
print(json.dumps({"torch": torch.__version__, **found}))
"""
_NPU_PROBE = """
import json, torch, torch_npu
count = torch_npu.npu.device_count()
name = torch_npu.npu.get_device_name(0) if count else ""
print(json.dumps({"torch_npu": torch_npu.__version__, "npu": count, "name": name}))
"""


def _devices() -> list[Finding]:
    """What torch sees on its own, without torch_npu."""
    done = _probe(_PROBE, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    if isinstance(done, str):
        return [Finding("import torch", "fail", done, f"{_INSTALL}; torch must import by itself")]
    cpu = Finding("cpu", "ok", f"{os.cpu_count()} cores")
    if done["cuda"]:
        return [cpu, Finding("cuda", "ok", f"{done['cuda']} x {done['name']}")]
    if shutil.which("nvidia-smi"):
        fix = "match driver and torch: `nvidia-smi` shows the driver's CUDA version"
        return [cpu, Finding("cuda", "warn", "nvidia-smi is there, torch sees no GPU", fix)]
    return [cpu, Finding("cuda", "ok", "none here")]


def _npu() -> list[Finding]:
    """torch_npu and CANN, if this is or wants to be an NPU machine."""
    toolkit = os.environ.get("ASCEND_TOOLKIT_HOME") or os.environ.get("ASCEND_HOME_PATH")
    version = _version("torch_npu")
    if version is None:
        return [_without_torch_npu(toolkit)]
    findings = [_matching_torch(version)]
    if toolkit:
        findings.append(Finding("CANN", "ok", toolkit))
    else:
        fix = "source /usr/local/Ascend/ascend-toolkit/set_env.sh, in the shell that runs the kit"
        findings.append(Finding("CANN", "fail", "ASCEND_TOOLKIT_HOME is not set", fix))
    done = _probe(_NPU_PROBE, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    if isinstance(done, str):
        fix = (
            "source CANN's set_env.sh; until then set TORCH_DEVICE_BACKEND_AUTOLOAD=0 or remove "
            "torch_npu, which otherwise makes `import torch` itself fail"
        )
        return [*findings, Finding("npu", "fail", done, fix)]
    if not done["npu"]:
        fix = (
            "`npu-smi info` must list the devices; check driver and permissions (group HwHiAiUser)"
        )
        return [*findings, Finding("npu", "warn", "torch_npu imports, no device", fix)]
    return [*findings, Finding("npu", "ok", f"{done['npu']} x {done['name']}")]


def _without_torch_npu(toolkit: str | None) -> Finding:
    if toolkit or shutil.which("npu-smi"):
        torch = _torch_release()
        fix = f"pip install torch_npu=={torch} (same version as torch, which must be its cpu build)"
        return Finding("npu", "warn", "an Ascend machine without torch_npu", fix)
    return Finding("npu", "ok", "none here")


def _matching_torch(version: str) -> Finding:
    """torch_npu 2.13.0.post1 belongs to torch 2.13.0, and to no other."""
    torch = _torch_release()
    release = re.match(r"\d+\.\d+\.\d+", version)
    if release and release.group() == torch:
        return Finding("torch_npu", "ok", version)
    fix = f"pip install 'torch_npu=={torch}.*' (torch and torch_npu go in pairs)"
    return Finding("torch_npu", "fail", f"{version} with torch {torch}", fix)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch_release() -> str:
    """Installed torch without its build, e.g. `2.13.0` of `2.13.0+cpu`."""
    return (_version("torch") or "none").split("+")[0]


def _probe(code: str, environment: dict[str, str]) -> dict[str, Any] | str:
    """What `code`, run by a fresh interpreter, prints as JSON; or the last line of its error."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_SUBPROCESS_SECONDS,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_SUBPROCESS_SECONDS} s"
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"ended with code {done.returncode}"


def _memory() -> list[Finding]:
    import psutil

    free = psutil.virtual_memory().available
    fix = "close other programs: the tiny experiment needs up to 4 GiB"
    return [_enough("memory", free, _MEMORY_BYTES, fix)]


def _disk() -> list[Finding]:
    fix = "free some space: runs/ and reports/ lie in this folder; big checkpoints need far more"
    return [_enough("disk", shutil.disk_usage(project_root()).free, _DISK_BYTES, fix)]


def _enough(name: str, free: int, needed: int, fix: str) -> Finding:
    good = free >= needed
    found = f"{free / _GIB:.1f} GiB free"
    return Finding(name, "ok" if good else "warn", found, "" if good else fix)


def _kernel() -> list[Finding]:
    """Notebooks must run in this environment, not in whichever came first on Jupyter's path."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    fix = f"{_INSTALL} (or: python -m ipykernel install --sys-prefix --name {KERNEL})"
    try:
        spec = KernelSpecManager().get_kernel_spec(KERNEL)
    except NoSuchKernel:
        return [Finding("kernel", "fail", f"no kernel named {KERNEL!r}", fix)]
    python = Path(spec.argv[0])
    here = {Path(sys.executable), *Path(sys.prefix, "bin").glob("python*")}
    if python in here or not python.is_absolute():
        return [Finding("kernel", "ok", spec.resource_dir)]
    return [Finding("kernel", "fail", f"{spec.resource_dir} starts {python}", fix)]


def _mlflow_store() -> list[Finding]:
    folder = project_root() / "mlflow"
    existing = folder if folder.exists() else folder.parent
    database = folder / "mlflow.db"
    places = [existing, database] if database.exists() else [existing]
    if all(os.access(place, os.W_OK) for place in places):
        return [Finding("mlflow store", "ok", str(folder))]
    fix = "make the folder writable, or set tracking.uri in the params file to a server"
    return [Finding("mlflow store", "fail", f"{folder} cannot be written", fix)]
