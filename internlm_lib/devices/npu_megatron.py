"""megatron-core and DeepSpeed on an Ascend NPU: what stands where they insist on CUDA.

torch_npu's `transfer_to_npu` does most of it, in all of this process: megatron binds names of
torch.cuda as it is imported, so that it must come first. What that does not reach is adapted one by
one. All points:

| point                                                | stands in for it                          |
|------------------------------------------------------|-------------------------------------------|
| torch.cuda's functions, streams, events, types       | torch.npu's (transfer_to_npu)             |
| Tensor.cuda, Module.cuda, is_cuda                    | npu, is_npu (transfer_to_npu)             |
| device="cuda" of factories, `to`, `load` …           | "npu" (transfer_to_npu)                   |
| backend "nccl", ProcessGroupNCCL                     | hccl's (transfer_to_npu)                  |
| torch.jit.script                                     | switched off (transfer_to_npu)            |
| `param.type() == "torch.cuda.FloatTensor"` constants | "torch.npu.FloatTensor" (half, bf16 too)  |
| tensor_parallel.random._set/_get_cuda_rng_state      | torch.npu's generator: the original hands |
|                                                      | its work to torch.cuda's own `_lazy_call` |
| torch.optim.AdamW                                    | the same with fused=True                  |
| DeepSpeed's choice of an accelerator                 | DS_ACCELERATOR=npu                        |

`tests/npu_contract/` holds each point against the real torch_npu and the pinned megatron-core.
"""

import importlib
import os
import sys
import warnings
from typing import Any

from internlm_lib.devices.megatron_modules import import_megatron
from internlm_lib.devices.megatron_points import name_tensor_types, use_fused_adam
from internlm_lib.errors import InputError

_DEEPSPEED_VARIABLE = "DS_ACCELERATOR"


def adapt() -> None:
    """Import megatron-core and adapt it; a second call does nothing new.

    Raises:
        InputError: the environment makes DeepSpeed choose another accelerator.
        RuntimeError: megatron-core was imported before, for another device.
    """
    _choose_accelerator()
    _transfer()
    import_megatron()
    name_tensor_types("torch.npu")
    _rebind_rng()
    use_fused_adam()


def _choose_accelerator() -> None:
    chosen = os.environ.setdefault(_DEEPSPEED_VARIABLE, "npu")
    if chosen != "npu":
        raise InputError(
            f"{_DEEPSPEED_VARIABLE} = {chosen!r} in the environment, but ranks run on npu; unset "
            "it, or set parallel.device to what it names"
        )


def _transfer() -> None:
    patch = "torch_npu.contrib.transfer_to_npu"
    if patch in sys.modules:
        return
    early = [name for name in sys.modules if name.startswith("megatron.core")]
    if early:
        raise RuntimeError(f"{early[0]} was imported before {patch}: it already holds CUDA's names")
    # It says on a page of text what it replaces, in every rank, whatever the filters are.
    with warnings.catch_warnings(record=True):
        importlib.import_module(patch)


def _rebind_rng() -> None:
    import torch
    from megatron.core.tensor_parallel import random

    npu: Any = torch.npu  # type: ignore[attr-defined]

    def set_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        npu.set_rng_state(state, "npu" if device == -1 else device)

    def get_state(device: Any = "npu", clone: bool = False, graph_safe: bool = False) -> Any:
        return npu.get_rng_state("npu" if device == "cuda" else device)

    random._set_cuda_rng_state = set_state
    random._get_cuda_rng_state = get_state
