"""The state of fp16's dynamic loss scaling, as JSON. Source: megatron-core 0.16.1, grad_scaler.py.

Import only after `Device.adapt_megatron()`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.optimizer.grad_scaler import DynamicGradScaler, MegatronGradScaler


def scaler_counters(scaler: MegatronGradScaler | None) -> dict[str, float]:
    """Empty without a dynamic scale."""
    if not isinstance(scaler, DynamicGradScaler):
        return {}
    return {
        "loss_scale": float(scaler.scale),
        "growth_tracker": scaler._growth_tracker,
        "hysteresis_tracker": scaler._hysteresis_tracker,
    }


def set_scaler_counters(scaler: MegatronGradScaler | None, counters: Mapping[str, Any]) -> None:
    """Not by megatron's load_state_dict, which moves the scale to CUDA.

    A state saved without a dynamic scale leaves the scaler as it is.
    """
    if isinstance(scaler, DynamicGradScaler) and "loss_scale" in counters:
        scaler._scale = torch.full_like(scaler._scale, counters["loss_scale"])
        scaler._growth_tracker = counters["growth_tracker"]
        scaler._hysteresis_tracker = counters["hysteresis_tracker"]
