"""The kernels' checks: green for a CPU's, red for faulty ones."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from internlm_lib.devices.cpu import CpuDevice
from internlm_lib.kernels import Kernels, kernels_of
from internlm_lib.selftest.kernels import TOLERANCES, cases, compare, kernel_checks
from tests.unit.selftest.small import SIZES

CPU = kernels_of("cpu")


def errors(kernels: Kernels, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    device = torch.device("cpu")
    return {case.name: compare(case, dtype, kernels, device).figure for case in cases(SIZES)}


@pytest.mark.parametrize(
    "check", list(kernel_checks(CpuDevice(), SIZES)), ids=lambda check: check.name
)
def test_the_kernels_of_a_cpu_pass(check: object) -> None:
    found = check.find()  # type: ignore[attr-defined]
    assert 0 <= found.figure <= check.tolerance  # type: ignore[attr-defined]


def test_bfloat16_is_judged_by_its_own_rounding() -> None:
    fp32, bf16 = errors(CPU), errors(CPU, torch.bfloat16)
    assert all(bf16[name] > TOLERANCES[torch.float32] > fp32[name] for name in fp32)


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0] / 2


FAULTS: dict[str, Callable[[Kernels], Kernels]] = {
    "scale left out": lambda k: replace(k, attention=lambda q, *kv: k.attention(q * 4.0, *kv)),
    "mask shifted": lambda k: replace(
        k, attention=lambda q, *kv: k.attention(q, *(x.roll(1, 0) for x in kv))
    ),
    "another epsilon": lambda k: replace(k, rms_norm=lambda x, w, eps: k.rms_norm(x, w, 1e-5)),
    "turned back": lambda k: replace(k, rotary=lambda x, angles: k.rotary(x, -angles)),
    "gate and up swapped": lambda k: replace(
        k, swiglu=lambda x: k.swiglu(torch.cat(x.chunk(2, -1)[::-1], -1))
    ),
    "half the gradient": lambda k: replace(k, swiglu=lambda x: HalfGradient.apply(k.swiglu(x))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows_in_bfloat16_too(fault: str) -> None:
    for dtype in SIZES.dtypes:
        found = errors(FAULTS[fault](CPU), dtype)
        assert max(found.values()) > TOLERANCES[dtype], fault


def test_a_kernel_that_changes_the_dtype_is_an_error() -> None:
    wide = replace(CPU, swiglu=lambda x: CPU.swiglu(x).float())
    with pytest.raises(TypeError, match="SwiGLU gave .* torch.float32"):
        errors(wide, torch.bfloat16)
