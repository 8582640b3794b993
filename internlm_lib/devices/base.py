"""What the rest of the kit may ask of a device. One implementation per device, no global state."""

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from internlm_lib.devices.visible import visible_devices
from internlm_lib.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Memory:
    """What one rank holds, in bytes: of its device, or of the machine on a CPU."""

    allocated_bytes: int
    """Now, in tensors; on a CPU the whole process, resident."""
    reserved_bytes: int | None
    """Now, by torch's allocator, in use or not; None on a CPU, whose allocator does not tell."""
    peak_bytes: int
    """The highest that `allocated_bytes` has been."""

    @classmethod
    def of_allocator(cls, nested: dict[str, Any]) -> "Memory":
        """From the `memory_stats_as_nested_dict()` of torch.cuda or torch.npu: one call, where the
        functions for single numbers ask for all of them each time."""
        allocated = nested["allocated_bytes"]["all"]
        reserved = nested["reserved_bytes"]["all"]["current"]
        return cls(allocated["current"], reserved, allocated["peak"])


class Device(abc.ABC):
    """One kind of device, seen from one rank."""

    name: str
    """`cpu`, `cuda` or `npu`: also torch's device type."""
    backend: str
    """torch.distributed backend that ranks on this device talk through."""

    @property
    def kernels(self) -> str:
        """Whose implementations of `kernels.Kernels` a model on this device computes with."""
        return self.name

    @abc.abstractmethod
    def available(self) -> bool:
        """Whether this machine can run on it now; an error while finding out is a no."""

    def advice(self) -> str:
        """Where it is not available: what is missing, and what to do."""
        return ""

    @abc.abstractmethod
    def count(self) -> int | None:
        """Devices on this machine; None where ranks do not own one each (cpu)."""

    @abc.abstractmethod
    def bind(self, local_rank: int) -> None:
        """Make the device of this local rank current."""

    @abc.abstractmethod
    def current(self) -> "torch.device":
        """The device this rank is bound to."""

    @abc.abstractmethod
    def description(self) -> str:
        """Product name, e.g. `NVIDIA H100 80GB HBM3` or the processor's."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait until all queued work is done, so that a clock may be read."""

    @abc.abstractmethod
    def memory(self) -> Memory:
        """What this rank holds now, and has held at most. Quick enough for every step."""

    @abc.abstractmethod
    def adapt_megatron(self) -> None:
        """Make megatron-core run on this device. Call before anything imports `megatron`."""


def select_device(name: str = "auto") -> Device:
    """The device asked for, or with `auto` the first present of npu, cuda, cpu.

    Raises InputError if the device asked for is not usable on this machine.
    """
    from internlm_lib.devices.cpu import CpuDevice
    from internlm_lib.devices.cuda import CudaDevice
    from internlm_lib.devices.npu import NpuDevice

    devices: list[Device] = [NpuDevice(), CudaDevice(), CpuDevice()]
    found = [device for device in devices if device.available()]
    for device in found:
        if name in ("auto", device.name):
            return device
    advice = next((f": {d.advice()}" for d in devices if d.name == name and d.advice()), "")
    raise InputError(
        f"parallel.device = {name!r} is not usable here{advice}; found: "
        f"{', '.join(d.name for d in found)}. Use one of these or auto; "
        f"`internlm doctor --device {name}` says more"
    )


def check_world_size(device: Device, world_size: int, key: str) -> None:
    """Raises InputError if a layout asks for more ranks than this node has devices, or shows."""
    limits: list[tuple[int | None, str]] = [(device.count(), "")]
    if shown := visible_devices(device.name):
        limits.insert(0, (shown.count, f" ({shown.said})"))
    for count, because in limits:
        if count is not None and world_size > count:
            raise InputError(
                f"{key} needs {world_size} {device.name} devices "
                f"(tensor × pipeline × data parallel size), this node has {count}{because}; lower "
                "the sizes, or train on several nodes: `internlm launch`"
            )
