"""Ascend NPUs, through torch_npu; megatron-core adapted by `npu_megatron`."""

import importlib.util
from typing import TYPE_CHECKING, Any

from internlm_lib.devices.base import Device

if TYPE_CHECKING:
    import torch


class NpuDevice(Device):
    name = "npu"
    backend = "hccl"

    def available(self) -> bool:
        return importlib.util.find_spec("torch_npu") is not None and _npu().is_available()

    def count(self) -> int:
        return _npu().device_count()

    def bind(self, local_rank: int) -> None:
        _npu().set_device(local_rank)

    def current(self) -> "torch.device":
        import torch

        return torch.device("npu", _npu().current_device())

    def description(self) -> str:
        return _npu().get_device_name()

    def synchronize(self) -> None:
        _npu().synchronize()

    def peak_memory_bytes(self) -> int:
        return _npu().max_memory_allocated()

    def adapt_megatron(self) -> None:
        from internlm_lib.devices.npu_megatron import adapt

        adapt()


def _npu() -> Any:
    import torch_npu

    return torch_npu.npu
