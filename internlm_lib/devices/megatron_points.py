"""Points of megatron-core that more than one device adapts. Call after `import_megatron`."""

import inspect
import types
from typing import Any

import torch

_CUDA_TYPES = "torch.cuda."


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW in one pass over memory instead of a dozen; the same formula.

    Every device has a kernel for it (`aten::_fused_adamw_`), torch_npu's too. Its own NpuFusedAdamW
    is no choice: it moves the storage of parameters and gradients (`npu_change_data_ptr`), which
    here are views into Megatron's buffers, and computes in a dozen operators.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **{"fused": True, **settings})


class _FusedOptimizers(types.ModuleType):
    """`torch.optim` as `megatron.core.optimizer` sees it."""

    AdamW = FusedAdamW

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.optim, name)


class _TorchWithFusedAdam(types.ModuleType):
    """`torch` as `megatron.core.optimizer` sees it: what it saw before, but for the optimizers."""

    def __init__(self, before: types.ModuleType) -> None:
        super().__init__("torch")
        self.before = before
        self.optim = _FusedOptimizers("torch.optim")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.before, name)


def use_fused_adam() -> None:
    """What megatron takes where neither Apex nor TransformerEngine is installed is torch's AdamW,
    and not its fused form."""
    from megatron.core import optimizer

    if not isinstance(optimizer.torch, _TorchWithFusedAdam):
        optimizer.torch = _TorchWithFusedAdam(optimizer.torch)


def name_tensor_types(package: str) -> None:
    """Let `param.type() == "torch.cuda.FloatTensor"`, and the same for half and bfloat16, ask for
    the tensors of another device.

    Args:
        package: what their names begin with, e.g. `torch.npu`; of a CPU's just `torch`.
    """
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    functions = [
        clip_grads.clip_grad_by_total_norm_fp32,
        optimizer.Float16OptimizerWithFloat16Params.__init__,
        *_methods(distrib_optimizer.DistributedOptimizer),
    ]
    for function in functions:
        function.__code__ = _renamed(function.__code__, f"{package}.")


def _methods(cls: type) -> list[types.FunctionType]:
    plain = (inspect.unwrap(getattr(v, "__func__", v)) for v in vars(cls).values())
    return [function for function in plain if isinstance(function, types.FunctionType)]


def _renamed(value: Any, package: str) -> Any:
    """The same constant or code object with the names of CUDA's tensor types replaced, at any
    depth."""
    if isinstance(value, types.CodeType):
        return value.replace(co_consts=tuple(_renamed(c, package) for c in value.co_consts))
    if isinstance(value, (tuple, frozenset)):
        return type(value)(_renamed(item, package) for item in value)
    is_type = isinstance(value, str) and value.startswith(_CUDA_TYPES) and "Tensor" in value
    return value.replace(_CUDA_TYPES, package) if is_type else value
