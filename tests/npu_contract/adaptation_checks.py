"""What `devices/npu_megatron.py` says it adapts, in a process that has torch_npu and no device.

Import only after `NpuDevice().adapt_megatron()`. A call that would reach the device is recorded
instead, or fails with the name of the function of CANN that is not there.
"""

import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch_npu

from internlm_lib.devices.npu import NpuDevice
from internlm_lib.devices.npu_megatron import adapt
from internlm_lib.errors import InputError
from tests.npu_contract import cuda_points

PACKAGE = Path(__file__).resolve().parents[2] / "internlm_lib"


def everything_that_ranks_import_is_importable() -> None:
    """Also what they import inside of functions, where megatron must be adapted first."""
    for module in sorted(
        _reached("internlm_lib.training.worker", "internlm_lib.generation.driver")
    ):
        importlib.import_module(module)
    for name in ("internlm_lib.engines.zero", "internlm_lib.engines.megatron", "deepspeed"):
        assert name in sys.modules


def megatron_sees_the_npu_where_it_asks_for_cuda() -> None:
    from megatron.core import parallel_state

    for name in (
        "Stream",
        "Event",
        "FloatTensor",
        "HalfTensor",
        "BFloat16Tensor",
        "is_initialized",
    ):
        assert getattr(parallel_state.torch.cuda, name) is getattr(torch_npu.npu, name), name
    for name in ("current_device", "synchronize", "manual_seed", "max_memory_allocated"):
        seen = getattr(parallel_state.torch.cuda, name)
        assert getattr(seen, "__wrapped__", seen) is getattr(torch_npu.npu, name), name


def tensors_made_for_cuda_are_made_for_the_npu() -> None:
    for make in (
        lambda: torch.zeros(2, device="cuda"),
        lambda: torch.ones(2).cuda(),
        lambda: torch.ones(2).to("cuda"),
        lambda: torch.full((2,), 1.0, device=torch.device("cuda", 0)),
    ):
        _reaches_cann(make)


def types_are_told_apart_by_the_npus_names() -> None:
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.transformer import module

    assert module._FLOAT_TYPES[1] is torch_npu.npu.FloatTensor
    assert module._HALF_TYPES[1] is torch_npu.npu.HalfTensor
    methods = vars(distrib_optimizer.DistributedOptimizer).values()
    codes = [
        clip_grads.clip_grad_by_total_norm_fp32.__code__,
        optimizer.Float16OptimizerWithFloat16Params.__init__.__code__,
        *(m.__func__.__code__ for m in methods if isinstance(m, (classmethod, staticmethod))),
    ]
    constants = {text for code in codes for text in _strings(code)}
    assert {f"torch.npu.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")} <= constants
    assert not {text for text in constants if text.startswith("torch.cuda.") and "Tensor" in text}


def generators_are_the_npus() -> None:
    """The original puts its work off until torch.cuda is initialised, which never happens here."""
    from megatron.core.tensor_parallel import random

    state = torch.zeros(16, dtype=torch.uint8)
    with mock.patch.object(torch.npu, "set_rng_state") as put:
        random._set_cuda_rng_state(state)
        random._set_cuda_rng_state(state, "npu:1")
    assert [call.args[1] for call in put.call_args_list] == ["npu", "npu:1"]
    assert all(call.args[0] is state for call in put.call_args_list)
    with mock.patch.object(torch.npu, "get_rng_state", return_value=state) as got:
        assert random._get_cuda_rng_state() is state and got.call_args.args == ("npu",)


def adam_is_torchs_fused_one() -> None:
    from megatron.core import optimizer

    made = optimizer.torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    assert made.param_groups[0]["fused"] and isinstance(made, torch.optim.AdamW)
    assert optimizer.USING_PYTORCH_OPTIMIZER


def adam_of_torch_npu_would_move_megatrons_buffers() -> None:
    """Why it is not taken: it changes where parameters and gradients lie."""
    from torch_npu.optim import npu_fused_optim_base
    from torch_npu.utils import combine_tensors

    assert "npu_combine_tensors" in _names(npu_fused_optim_base.NpuFusedOptimizerBase)
    assert "npu_change_data_ptr" in combine_tensors.npu_combine_tensors.__code__.co_names


def deepspeed_takes_the_npu() -> None:
    from deepspeed.accelerator import get_accelerator

    chosen = get_accelerator()
    assert chosen.device_name() == "npu" and chosen.communication_backend_name() == "hccl"


def process_groups_of_nccl_are_hccls() -> None:
    assert torch.distributed.is_nccl_available is torch.distributed.is_hccl_available
    assert torch.distributed.ProcessGroupNCCL is torch_npu._C._distributed_c10d.ProcessGroupHCCL
    assert NpuDevice().backend == "hccl"


def what_is_listed_as_transferred_is_torch_npus() -> None:
    """`cuda_points.yaml` says of these points that transfer_to_npu answers them."""
    listed = cuda_points.read().answered("npu", "transferred")
    assert len(listed) > 10
    elsewhere = {what for what in listed if not _is_torch_npus(what)}
    assert not elsewhere, elsewhere


def a_second_call_changes_nothing() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    before = (optimizer.torch, clip_grad_by_total_norm_fp32.__code__, torch.Tensor.cuda)
    adapt()
    after = (optimizer.torch, clip_grad_by_total_norm_fp32.__code__, torch.Tensor.cuda)
    assert all(old == new for old, new in zip(before, after, strict=True))


def another_accelerator_in_the_environment_is_refused() -> None:
    with mock.patch.dict("os.environ", {"DS_ACCELERATOR": "cpu"}):
        try:
            adapt()
        except InputError as error:
            assert "DS_ACCELERATOR = 'cpu'" in str(error)
        else:
            raise AssertionError("DS_ACCELERATOR=cpu was accepted")


def the_device_is_not_available_and_nothing_raises() -> None:
    assert NpuDevice().available() is False


CHECKS: Sequence[Callable[[], None]] = (
    everything_that_ranks_import_is_importable,
    megatron_sees_the_npu_where_it_asks_for_cuda,
    tensors_made_for_cuda_are_made_for_the_npu,
    types_are_told_apart_by_the_npus_names,
    generators_are_the_npus,
    adam_is_torchs_fused_one,
    adam_of_torch_npu_would_move_megatrons_buffers,
    deepspeed_takes_the_npu,
    process_groups_of_nccl_are_hccls,
    what_is_listed_as_transferred_is_torch_npus,
    a_second_call_changes_nothing,
    another_accelerator_in_the_environment_is_refused,
    the_device_is_not_available_and_nothing_raises,
)


def _is_torch_npus(what: str) -> bool:
    """Whether a point, as `megatron_cuda.py` writes it, leads into torch_npu in this process."""
    if what == ".cuda":
        return torch.Tensor.cuda is torch.Tensor.npu  # type: ignore[attr-defined]
    if what == 'partial(device_type="cuda")':  # of torch.amp's decorators
        return _is_wrapped(torch.amp.custom_fwd) and _is_wrapped(torch.amp.custom_bwd)
    if what.endswith('(device="cuda")'):
        return _is_wrapped(getattr(torch, what.split("(")[0].removeprefix("torch.")))
    path = what.removeprefix("from ").replace(" import ", ".").removeprefix("torch.")
    found = functools.reduce(getattr, path.split("."), torch)
    return inspect.unwrap(found).__module__.startswith(("torch_npu.", "torch.npu"))


def _is_wrapped(function: Any) -> bool:
    """By transfer_to_npu, which replaces "cuda" in the arguments."""
    return Path(function.__code__.co_filename).stem == "transfer_to_npu"


def _reaches_cann(work: Callable[[], Any]) -> None:
    try:
        work()
    except RuntimeError as error:
        assert "Failed to find function acl" in str(error), error
    else:
        raise AssertionError("a tensor was made where there is no device")


def _reached(*roots: str) -> set[str]:
    """Modules of the kit and of the engines that these import, at any depth and in functions."""
    seen: set[str] = set()
    pending = list(roots)
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if name.startswith("internlm_lib"):
            pending += [found for found in _imports(name) if found not in seen]
    return seen


def _imports(name: str) -> Iterator[str]:
    path = PACKAGE.parent.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if _counts(a.name))
        elif isinstance(node, ast.ImportFrom) and node.module and _counts(node.module):
            yield node.module


def _counts(name: str) -> bool:
    heavy = ("megatron", "deepspeed", "torch_npu")
    kit = name.startswith("internlm_lib.") and not name.startswith("internlm_lib.tracking")
    return kit or name.split(".")[0] in heavy


def _strings(constant: Any) -> Iterator[str]:
    if hasattr(constant, "co_consts"):
        constant = constant.co_consts
    if isinstance(constant, (tuple, frozenset)):
        for item in constant:
            yield from _strings(item)
    elif isinstance(constant, str):
        yield constant


def _names(cls: type) -> set[str]:
    """Global names and attributes that a class's own methods use."""
    methods = (value for value in vars(cls).values() if hasattr(value, "__code__"))
    return {name for method in methods for name in method.__code__.co_names}
