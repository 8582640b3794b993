"""Ascend NPUs, through torch_npu; megatron-core adapted by `npu_megatron`."""

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING

from internlm_lib.devices import cann
from internlm_lib.devices.base import Device, Memory

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
            import torch_npu

            return torch_npu.npu.is_available()
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
        import torch_npu

        return torch_npu.npu.device_count()

    def bind(self, local_rank: int) -> None:
        import torch_npu

        torch_npu.npu.set_device(local_rank)

    def current(self) -> "torch.device":
        import torch
        import torch_npu

        return torch.device("npu", torch_npu.npu.current_device())

    def description(self) -> str:
        import torch_npu

        return torch_npu.npu.get_device_name()

    def synchronize(self) -> None:
        import torch_npu

        torch_npu.npu.synchronize()

    def memory(self) -> Memory:
        import torch_npu

        return Memory.of_allocator(torch_npu.npu.memory_stats_as_nested_dict())

    def adapt_megatron(self) -> None:
        from internlm_lib.devices.npu_megatron import adapt

        adapt()
