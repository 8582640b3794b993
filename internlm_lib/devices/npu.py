"""Ascend NPUs, through torch_npu; megatron-core adapted by `npu_megatron`."""

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

from internlm_lib.devices import cann
from internlm_lib.devices.base import Device

if TYPE_CHECKING:
    import torch


class NpuDevice(Device):
    name = "npu"
    backend = "hccl"

    def __init__(self) -> None:
        self._error = ""
        """Of importing torch_npu."""

    def available(self) -> bool:
        if importlib.util.find_spec("torch_npu") is None:
            return False
        try:
            return _npu().is_available()
        except (ImportError, RuntimeError) as error:  # half of CANN, or torch's build for CUDA
            self._error = str(error).splitlines()[0]
            cann.hide_torch_npu()  # from transformers, which would fail on it, too
            return False

    def advice(self) -> str:
        if self._error:
            return f"torch_npu cannot be imported, {self._error}"
        try:
            importlib.metadata.version("torch_npu")
        except importlib.metadata.PackageNotFoundError:
            return "torch_npu is not installed; on an Ascend machine: make env NPU=1"
        if not cann.is_loadable():
            return f"CANN is not in this process's environment; {cann.how_to_source()}"
        return "torch_npu sees no device"

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
