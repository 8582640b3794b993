"""Whole training steps of the published layouts through torch_npu's meta kernels."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.npu_contract.worker import STEPS

Part = Callable[[str], dict[str, Any]]

OUTER_NORMS = {"7B, ZeRO-2 DP8": 1, "65B, TP8 PP4 SP, last stage": 1}
"""The one behind the last layer."""
PARAMETERS = {
    "7B, ZeRO-2 DP8": 7_321_948_160,
    "65B, TP8 PP4 SP, first stage": 2_129_948_672,
    "65B, TP8 PP4 SP, inner stage": 2_024_304_640,
    "65B, TP8 PP4 SP, last stage": 2_129_956_864,
    "65B, as its script: RMSNorm spelled out": 2_024_304_640,
}


@pytest.mark.parametrize("name", STEPS)
def test_forward_and_backward_go_through_the_npus_operators(name: str, part: Part) -> None:
    step = part("layouts")[name]
    layers = step["layers"]
    assert step["parameters"] == PARAMETERS[name]
    assert step["without_gradient"] == step["wrong_gradient"] == []
    norms = 0 if "spelled out" in name else 2 * layers + OUTER_NORMS.get(name, 0)
    forward = {
        "npu_fusion_attention": layers,
        "npu_rms_norm": norms,
        "npu_rotary_mul": 2 * layers,
        "npu_swiglu": layers,
    }
    backward = {
        "npu_fusion_attention_grad": layers,
        "npu_rms_norm_backward": norms,
        "npu_rotary_mul_backward": 2 * layers,
        "npu_swiglu_backward": layers,
    }
    calls = {operator: n for operator, n in (forward | backward).items() if n}
    assert step["operators"] == calls


def test_the_fused_norm_keeps_less(part: Part) -> None:
    steps = part("layouts")
    spelled_out = steps["65B, as its script: RMSNorm spelled out"]["kept_mib"]
    assert steps["65B, TP8 PP4 SP, inner stage"]["kept_mib"] < 0.9 * spelled_out
