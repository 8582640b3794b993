"""NVIDIA GPUs. megatron-core is written for them: only its choice of AdamW is adapted."""

from typing import TYPE_CHECKING

from internlm_lib.devices.base import Device, Memory
from internlm_lib.devices.megatron_modules import import_megatron

if TYPE_CHECKING:
    import torch


class CudaDevice(Device):
    name = "cuda"
    backend = "nccl"

    def available(self) -> bool:
        import torch

        return torch.cuda.is_available()

    def count(self) -> int:
        import torch

        return torch.cuda.device_count()

    def bind(self, local_rank: int) -> None:
        import torch

        torch.cuda.set_device(local_rank)

    def current(self) -> "torch.device":
        import torch

        return torch.device("cuda", torch.cuda.current_device())

    def description(self) -> str:
        import torch

        return torch.cuda.get_device_name()

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def memory(self) -> Memory:
        import torch

        return Memory.of_allocator(torch.cuda.memory_stats_as_nested_dict())

    def adapt_megatron(self) -> None:
        from internlm_lib.devices.megatron_points import use_fused_adam

        import_megatron()
        use_fused_adam()
