"""What ranks have in their environment, per device.

What a device's variables mean, and where that stands, is in `experiment/variables.yaml`. A value
set in the shell where the plan is made wins over the params file's, that over the kit's.
"""

import os
from collections.abc import Mapping
from typing import get_args

from internlm_lib.devices.cann import AUTOLOAD_VARIABLE
from internlm_lib.errors import InputError
from internlm_lib.experiment.variables import DeviceName, mistakes, those_of, variables_of

_DEVICES = get_args(DeviceName)


def rank_environment(
    device: str | None,
    ranks_per_node: int,
    interface: str | None = None,
    chosen: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Variables for the ranks of one node.

    Args:
        device: `npu`, `cuda` or `cpu`; None sets no variable of a device.
        interface: network interface between the nodes, e.g. `eth0`.
        chosen: the params file's `parallel.environment`; other devices' variables are left out.
    Raises:
        InputError: the device is none of these, or a variable may not have its value.
    """
    if device not in (None, *_DEVICES):
        allowed = ", ".join(_DEVICES)
        raise InputError(f"device = {device!r}: ranks run on {allowed}; set parallel.device")
    kind = device or "cpu"
    values = {
        # torchrun sets 1 where nothing is set: processors would lie idle. Nodes are taken to be
        # like the one that the plan is made on.
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks_per_node)),
        **_set_by_kit(kind, interface),
        **those_of(kind, chosen or {}),
        **those_of(kind, os.environ),
    }
    if wrong := mistakes(values):
        head = "the ranks' environment (this shell's, then parallel.environment):"
        raise InputError("\n  - ".join([head, *wrong]))
    return {**values, **_for_packages(device)}


def _set_by_kit(device: str, interface: str | None) -> dict[str, str]:
    table = variables_of(device)
    named = {v.name: v.interface.format(interface) for v in table if interface and v.interface}
    return {v.name: v.default for v in table if v.default is not None} | named


def _for_packages(device: str | None) -> dict[str, str]:
    """What is no device's own: how packages are kept from choosing by themselves."""
    defaults = {
        # torch would import torch_npu wherever it is installed, and fail where CANN is not. The kit
        # imports it where it is asked for an NPU. Source: torch/__init__.py.
        AUTOLOAD_VARIABLE: "0",
        # DeepSpeed would take the first device that it finds. Source: its real_accelerator.py.
        **({"DS_ACCELERATOR": device} if device else {}),
    }
    return {
        **{name: os.environ.get(name, value) for name, value in defaults.items()},
        # A tokenizer's own threads would multiply with the ranks, and warn after a fork.
        "TOKENIZERS_PARALLELISM": "false",
    }


def ranks_on_this_node() -> int | None:
    """How many this rank's launcher, torchrun or DeepSpeed's, started here; None without one."""
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(local) if local else None


def on_one_node() -> bool:
    """Whether this rank's launcher started all ranks of the job here."""
    local = ranks_on_this_node()
    return local is None or str(local) == os.environ.get("WORLD_SIZE")
