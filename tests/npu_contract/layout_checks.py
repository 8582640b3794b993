"""A training step of the published layouts, rank by rank, through torch_npu's meta kernels.

Import only in a process that has torch_npu, after `MetaDevice().adapt_megatron()`.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from internlm_lib.devices.meta import MetaDevice
from internlm_lib.experiment.load import load_experiment
from internlm_lib.training.activations import counted, forward_pass
from internlm_lib.training.meta import rank_on_meta
from tests.npu_contract import stand_ins

PARAMS = Path(__file__).resolve().parents[2] / "params"
ALL_ON = dict.fromkeys(
    ("use_flash_attn", "use_fused_rmsnorm", "use_fused_rotary_pos_emb", "use_fused_swiglu"), True
)


def training_step(params: str, rank: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """One micro-batch of one rank, forward and backward, nothing recomputed."""
    keys = {f"training.{name}": value for name, value in {**ALL_ON, **overrides}.items()}
    _, experiment = load_experiment(PARAMS / f"{params}.yaml", keys)
    layout, training = experiment.layout("candidate"), experiment.training
    device = MetaDevice(kernels="npu")
    with rank_on_meta(experiment, layout, rank, device) as gpt, _OperatorCount() as seen:
        output, kept = counted(forward_pass(gpt, training, device), gpt.parameters())
        torch.autograd.backward(output, torch.empty_like(output))
        return {
            "layers": len(gpt.decoder.layers),
            "parameters": sum(p.numel() for p in gpt.parameters()),
            "without_gradient": [n for n, p in gpt.named_parameters() if p.grad is None],
            "wrong_gradient": [
                n for n, p in gpt.named_parameters()
                if p.grad is not None and (p.grad.shape != p.shape or p.grad.dtype != p.dtype)
            ],
            "output": list(output.shape),
            "kept_mib": kept / 2**20,
            "operators": dict(seen.operators),
        }  # fmt: skip


class _OperatorCount(TorchDispatchMode):
    """Counts calls of torch_npu's operators, those of backward passes too."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "npu":
            self.operators[func._schema.name.removeprefix("npu::")] += 1
        return func(*args, **(kwargs or {}))


assert stand_ins  # imported for the derivatives it registers
