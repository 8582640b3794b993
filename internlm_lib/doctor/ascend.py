"""The checks of an Ascend NPU: torch_npu, CANN, driver, devices, environment variables."""

import os
import shutil
import sys
from pathlib import Path

from internlm_lib.devices import cann
from internlm_lib.devices.torch_npu_versions import install_cpu_build, install_for, misfits
from internlm_lib.doctor.finding import INSTALL, Finding, probe, version_of
from internlm_lib.experiment.variables import mistakes, those_of

_PROBE = """
import torch, torch_npu, json
count = torch_npu.npu.device_count()
name = torch_npu.npu.get_device_name(0) if count else ""
print(json.dumps({"npu": count, "name": name}))
"""
_DRIVER = "the NPU's driver and firmware (in a container: mount /usr/local/Ascend/driver)"


def npu_findings(required: bool = False) -> list[Finding]:
    """What there is of an NPU.

    Args:
        required: whether this machine is to be trained on with one: what is missing is then a
            failure, and driver, devices and variables are looked at, too.
    """
    torch_npu = version_of("torch_npu")
    if torch_npu is None and not required:
        return [_without_torch_npu()]
    findings = [_torch_npu(torch_npu), _cann()]
    if required:
        findings += [_driver(), _npu_smi(), _device_nodes(), _variables()]
    if torch_npu is not None:
        findings.append(_npu(required))
    return findings


def _without_torch_npu() -> Finding:
    if cann.home() or shutil.which("npu-smi"):
        return Finding("npu", "warn", "an Ascend machine without torch_npu", _install_torch_npu())
    return Finding("npu", "ok", "none here")


def _torch_npu(version: str | None) -> Finding:
    if version is None:
        return Finding("torch_npu", "fail", "not installed", _install_torch_npu())
    folder = cann.home()
    found = misfits(
        version_of("torch") or "none",
        version,
        f"{sys.version_info.major}.{sys.version_info.minor}",
        cann.version(folder) if folder else None,
    )
    if not found:
        return Finding("torch_npu", "ok", version)
    what, fix = ("; ".join(words) for words in zip(*((m.what, m.fix) for m in found), strict=True))
    fatal = any(misfit.fatal for misfit in found)
    return Finding("torch_npu", "fail" if fatal else "warn", what, fix)


def _install_torch_npu() -> str:
    torch = version_of("torch") or "none"
    by_hand = f"{install_cpu_build(torch)} && {install_for(torch)}"
    return f"{INSTALL} NPU=1, which is: {by_hand}"


def _cann() -> Finding:
    folder = cann.home()
    if not cann.is_loadable():
        place = f"; {folder} does not help" if folder else ""
        found = f"not in this shell's environment: the loader finds no libhccl.so{place}"
        return Finding("CANN", "fail", found, _source())
    if folder is None:
        found = "the loader finds it, but ASCEND_TOOLKIT_HOME is not set"
        return Finding("CANN", "warn", found, _source())
    return Finding("CANN", "ok", f"{cann.version(folder) or 'unknown version'} at {folder}")


def _source() -> str:
    return f"{cann.how_to_source()}; in the shell that runs the kit"


def _driver() -> Finding:
    version = cann.driver_version()
    if version is None:
        found = "no version.info below /usr/local/Ascend/driver"
        return Finding("driver", "warn", found, f"install {_DRIVER}")
    return Finding("driver", "ok", version)


def _npu_smi() -> Finding:
    path = shutil.which("npu-smi")
    if path is None:
        fix = "it comes with the driver: add its folder, often /usr/local/sbin, to PATH"
        return Finding("npu-smi", "warn", "not found; utilisation cannot be watched", fix)
    return Finding("npu-smi", "ok", path)


def _device_nodes(folder: Path = Path("/dev")) -> Finding:
    nodes = cann.device_nodes(folder)
    devices = [node for node in nodes if node.name.removeprefix("davinci").isdigit()]
    if not devices:
        fix = f"install {_DRIVER}; in a container, pass devices on: --device={folder}/davinci0 …"
        return Finding("npu devices", "fail", f"no {folder}/davinci0, davinci1 …", fix)
    closed = [str(node) for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    if closed:
        fix = "usermod -a -G HwHiAiUser $USER, then log in again (or the group of `ls -l /dev`)"
        return Finding("npu devices", "fail", f"no permission: {', '.join(closed)}", fix)
    return Finding("npu devices", "ok", ", ".join(node.name for node in devices))


def _variables() -> Finding:
    values = those_of("npu", os.environ)
    if wrong := mistakes(values):
        fix = "unset it, or set what is allowed"
        return Finding("npu variables", "fail", "; ".join(wrong), fix)
    shown = ", ".join(f"{name}={value}" for name, value in values.items())
    return Finding("npu variables", "ok", shown or "none set; the kit sets its own")


def _npu(required: bool) -> Finding:
    """What torch_npu sees."""
    done = probe(_PROBE)
    if isinstance(done, str):
        return Finding("npu", "fail", done, _fix_of_import(done))
    if not done["npu"]:
        fix = (
            "`npu-smi info` must list the devices; check driver and permissions (group HwHiAiUser)"
        )
        found = "torch_npu imports, no device"
        return Finding("npu", "fail" if required else "warn", found, fix)
    return Finding("npu", "ok", f"{done['npu']} x {done['name']}")


def _fix_of_import(error: str) -> str:
    if "Two accelerators" in error:
        return f"{install_cpu_build(version_of('torch') or 'none')}: torch_npu needs this build"
    if not cann.is_loadable():
        return f"{cann.how_to_source()}; until then the kit runs on the CPU"
    if "libascend_hal" in error:
        return f"install {_DRIVER}"
    return "versions that do not fit together (see torch_npu), or a CANN that is not complete"
