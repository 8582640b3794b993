"""The meta device: tensors with shapes and without values, to build any rank of any layout in one
process. No device to train on: `select_device` never gives it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from internlm_lib.devices.base import Memory
from internlm_lib.devices.cpu import CpuDevice

if TYPE_CHECKING:
    import torch


class MetaDevice(CpuDevice):
    """Queues nothing and holds nothing, as a CPU; and computes nothing either."""

    name = "meta"
    backend = "fake"

    def __init__(self, kernels: str = "meta") -> None:
        """Args:
        kernels: see `kernels.kernels_of`; another device's need its package, and that to have
            kernels for the meta device.
        """
        self._kernels = kernels

    @property
    def kernels(self) -> str:
        return self._kernels

    def current(self) -> "torch.device":
        import torch

        return torch.device("meta")

    def description(self) -> str:
        return "meta"

    def memory(self) -> Memory:
        return Memory(0, None, 0)

    def adapt_megatron(self) -> None:
        from internlm_lib.devices.cpu_megatron import adapt

        adapt("meta")


@contextmanager
def pretend_to_be(rank: int, world_size: int) -> Iterator[None]:
    """This process as one rank of many: collectives return at once and exchange nothing."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
