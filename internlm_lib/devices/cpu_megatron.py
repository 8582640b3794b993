"""megatron-core on a CPU (or on torch's meta device): every point where it insists on CUDA, and
what stands there instead.

megatron's modules reach CUDA through their module-global name `torch`. After all of them are
imported, that name is rebound to a proxy; `torch` itself, and everyone else's, stays as it is.
Five points lie deeper and are adapted one by one. The last three are there for speed alone: torch's
AdamW takes its fused form, as Apex's is; a weight's gradient is added to the accumulated one by the
product that makes it, as Apex's extension does; and a collective of one rank into its own input is
left out, where gloo would copy it. All points:

| point                                                | stands in for it                         |
|------------------------------------------------------|------------------------------------------|
| torch.cuda.current_device                            | torch.device("cpu")                      |
| torch.cuda.synchronize, empty_cache, set_device      | nothing to do                            |
| torch.cuda.device_count                              | 1                                        |
| torch.cuda streams and events                        | null objects                             |
| torch.cuda RNG state, manual_seed                    | the CPU generator                        |
| torch.tensor, zeros, ones … with device="cuda"       | the same on "cpu"                        |
| tensor_parallel.random._set/_get_cuda_rng_state      | the CPU generator                        |
| `param.type() == "torch.cuda.FloatTensor"` constants | "torch.FloatTensor" (same for half, bf16)|
| `.cuda()` of a loss scale that is loaded             | nothing to do                            |
| torch.optim.AdamW                                    | the same with fused=True                 |
| fused_weight_gradient_mlp_cuda                       | `addmm_` into the accumulated gradient   |
| reduce-scatter, all-gather of buffers of one rank    | nothing to do                            |
"""

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from internlm_lib.devices.megatron_modules import import_megatron
from internlm_lib.devices.megatron_points import name_tensor_types, use_fused_adam

_FACTORIES = (
    "tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint",
    "zeros_like", "ones_like", "empty_like", "full_like",
)  # fmt: skip


def adapt(device: str = "cpu") -> None:
    """Import megatron-core and adapt it; a second call does nothing new.

    Args:
        device: where tensors lie that megatron would put on a CUDA device: "cpu" or "meta". One
            process has one; RuntimeError if it already has the other.
    """
    import_megatron()
    _rebind_torch(device)
    _rebind_rng()
    name_tensor_types("torch")
    _load_loss_scale_in_place()
    _accumulate_gradients_in_products()
    _leave_out_copies()
    use_fused_adam()


class _NullStream:
    """Stands for a CUDA stream or event: there is one queue, and it is always drained."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class CpuInPlaceOfCuda(types.ModuleType):
    """`torch.cuda` as megatron's modules see it; names not listed are torch.cuda's own."""

    Stream = Event = _NullStream

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def __init__(self, name: str, device: str) -> None:
        super().__init__(name)
        self._device = torch.device(device)

    def current_device(self) -> torch.device:
        return self._device

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def set_device(device: Any) -> None: ...

    @staticmethod
    def synchronize(device: Any = None) -> None: ...

    @staticmethod
    def empty_cache() -> None: ...

    @staticmethod
    def current_stream(device: Any = None) -> _NullStream:
        return _NullStream()

    default_stream = current_stream

    @staticmethod
    @contextlib.contextmanager
    def stream(stream: Any) -> Iterator[None]:
        yield

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)


class TorchOnCpu(types.ModuleType):
    """`torch` as megatron's modules see it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on(device: str, factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = device
        return factory(*args, **kwargs)

    return create


@functools.cache
def _proxy(device: str) -> TorchOnCpu:
    proxy = TorchOnCpu("torch")
    proxy.cuda = CpuInPlaceOfCuda("torch.cuda", device)  # type: ignore[attr-defined]
    for name in _FACTORIES:
        setattr(proxy, name, _on(device, getattr(torch, name)))
    return proxy


def megatron_modules() -> list[types.ModuleType]:
    """All loaded modules of megatron-core."""
    return [m for name, m in list(sys.modules.items()) if name.startswith("megatron.core") and m]


def _rebind_torch(device: str) -> None:
    proxy = _proxy(device)
    for module in megatron_modules():
        seen = vars(module).get("torch")
        if isinstance(seen, TorchOnCpu) and seen is not proxy:
            raise RuntimeError(f"megatron-core already runs on another device than {device}")
        if seen is torch:
            module.torch = proxy  # type: ignore[attr-defined]


def _rebind_rng() -> None:
    from megatron.core.tensor_parallel import random

    def set_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    random._set_cuda_rng_state = set_state
    random._get_cuda_rng_state = get_state


def _load_loss_scale_in_place() -> None:
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        self._scale = state_dict["scale"]
        self._growth_tracker = state_dict["growth_tracker"]
        self._hysteresis_tracker = state_dict["hysteresis_tracker"]

    DynamicGradScaler.load_state_dict = load_state_dict


def _accumulate_gradients_in_products() -> None:
    from megatron.core.tensor_parallel import layers

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=_add_weight_gradient
    )
    layers._grad_accum_fusion_available = True


def _add_weight_gradient(inputs: torch.Tensor, gradient: torch.Tensor, total: torch.Tensor) -> None:
    """Add gradientᵀ · inputs, of [tokens, out] and [tokens, in], to total [out, in] in fp32."""
    if inputs.dtype == total.dtype:
        total.addmm_(gradient.t(), inputs)
    else:
        total.add_(gradient.t() @ inputs)


def _leave_out_copies() -> None:
    from megatron.core.distributed import param_and_grad_buffer as buffers

    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        collective = getattr(buffers, name)
        if not isinstance(collective, _UnlessAlone):
            setattr(buffers, name, _UnlessAlone(collective))


@dataclass(frozen=True)
class _UnlessAlone:
    """A collective, but nothing where a group's only rank would copy a buffer onto itself.

    An asynchronous one is done all the same: its caller waits for a handle.
    """

    collective: Callable[..., Any]

    def __call__(
        self, output: torch.Tensor, source: torch.Tensor, *, group: Any, **options: Any
    ) -> Any:
        in_place = output.data_ptr() == source.data_ptr()
        if group.size() == 1 and in_place and not options.get("async_op"):
            return None
        return self.collective(output, source, group=group, **options)
