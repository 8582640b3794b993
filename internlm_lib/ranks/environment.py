"""What ranks need in their environment, per device; each variable with its source.

What is set where the plan is made wins over every value here.
"""

import os
from collections.abc import Mapping

from internlm_lib.errors import InputError

DEVICE_VARIABLES: Mapping[str, Mapping[str, str]] = {
    "npu": {
        # Seconds for devices to find each other before the first collective, [120, 7200]. The
        # default of 120 is too short for ranks that load weights at different speeds; 1200 is what
        # AscendSpeed's examples/intern set. Source: CANN, envref_07_0077.
        "HCCL_CONNECT_TIMEOUT": "1200",
        # Overflow gives inf and nan instead of the largest number, or fp16's loss scaling and a
        # nan check see nothing. Source: AscendSpeed, pretrain_internlm_7b.
        "INF_NAN_MODE_ENABLE": "1",
        # Fuses pairs of operators on tensors that are not contiguous. Source: AscendSpeed,
        # pretrain_internlm_65b; MindSpeed-LLM, environment_variable.md.
        "COMBINED_ENABLE": "1",
    },
    "cuda": {},
    "cpu": {},
}

_INTERFACE_VARIABLES: Mapping[str, tuple[str, ...]] = {
    # Megatron's groups on the host talk gloo on every device; it takes the interface on which the
    # host's name resolves, often loopback. Source: torch.distributed's documentation; MindSpeed-LLM
    # lists the pair for NPUs.
    "npu": ("GLOO_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"),
    "cuda": ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    "cpu": ("GLOO_SOCKET_IFNAME",),
}


def rank_environment(
    device: str | None, ranks_per_node: int, interface: str | None = None
) -> dict[str, str]:
    """Variables for the ranks of one node.

    Args:
        device: `npu`, `cuda` or `cpu`; None sets no variable of a device.
        interface: network interface between the nodes, e.g. `eth0`.
    Raises:
        InputError: the device is none of these.
    """
    if device not in (None, *DEVICE_VARIABLES):
        allowed = ", ".join(DEVICE_VARIABLES)
        raise InputError(f"device = {device!r}: ranks run on {allowed}; set parallel.device")
    names = _INTERFACE_VARIABLES[device or "cpu"] if interface else ()
    values = {
        # torchrun sets 1 where nothing is set: processors would lie idle. Nodes are taken to be
        # like the one that the plan is made on.
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks_per_node)),
        **DEVICE_VARIABLES.get(device or "cpu", {}),
        **{name: str(interface) for name in names},
    }
    return {
        **{name: os.environ.get(name, value) for name, value in values.items()},
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
