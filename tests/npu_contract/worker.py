"""One process with torch_npu and stub libraries: `python -m tests.npu_contract.worker PART FILE`.

Writes what it found into FILE as JSON: of every check the error it raised, or "".
"""

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def kernels() -> dict[str, Any]:
    """All checks of the kernels; then, of every mutation, the first check that it turns red."""
    from internlm_lib.devices.cpu import CpuDevice

    CpuDevice().adapt_megatron()
    with one_rank():
        from tests.npu_contract.kernel_checks import KERNEL_CHECKS, SOURCE_CHECKS
        from tests.npu_contract.mutations import MUTATIONS, applied

        checks = outcomes([*SOURCE_CHECKS, *KERNEL_CHECKS])
        found: dict[str, Any] = {"checks": checks, "mutations": {}}
        for mutation in MUTATIONS:
            with applied(mutation):
                found["mutations"][mutation.what] = first_failure(KERNEL_CHECKS)
    return found


STEPS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "7B, ZeRO-2 DP8": ("internlm_7b", 0, {}),
    "65B, TP8 PP4 SP, first stage": ("internlm_65b", 0, {}),
    "65B, TP8 PP4 SP, inner stage": ("internlm_65b", 8, {}),
    "65B, TP8 PP4 SP, last stage": ("internlm_65b", 24, {}),
    "65B, as its script: RMSNorm spelled out": ("internlm_65b", 8, {"use_fused_rmsnorm": False}),
}
"""Params file, rank and keys of `training` of each step on the meta device."""


def layouts() -> dict[str, Any]:
    from internlm_lib.devices.meta import MetaDevice

    MetaDevice().adapt_megatron()
    from tests.npu_contract.layout_checks import training_step

    return {name: training_step(*step) for name, step in STEPS.items()}


def adaptation() -> dict[str, Any]:
    from internlm_lib.devices.npu import NpuDevice

    NpuDevice().adapt_megatron()
    from tests.npu_contract.adaptation_checks import CHECKS

    return outcomes(CHECKS)


def outcomes(checks: Sequence[Callable[[], None]]) -> dict[str, str]:
    return {check.__name__: outcome(check) for check in checks}


def outcome(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception:
        return traceback.format_exc(limit=-4)
    return ""


def first_failure(checks: Sequence[Callable[[], None]]) -> str:
    return next((check.__name__ for check in checks if outcome(check)), "")


@contextmanager
def one_rank() -> Iterator[None]:
    """Megatron's groups, of this process alone."""
    from megatron.core import parallel_state, tensor_parallel

    from internlm_lib.devices.meta import pretend_to_be

    with pretend_to_be(rank=0, world_size=1):
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "kernels": kernels,
    "layouts": layouts,
    "adaptation": adaptation,
}

if __name__ == "__main__":
    part, file = sys.argv[1:]
    Path(file).write_text(json.dumps(PARTS[part]()))
