"""Peak rates of devices, and the share of one that a training uses.

A peak is dense, never with sparsity. A name that several devices share, as "Ascend 910B" or "H100",
has no peak but candidates: none of them is guessed.
"""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from internlm_lib.errors import InputError
from internlm_lib.published.tables import Name, Record, checked, read_entries

Precision = Literal["bf16", "fp16", "tf32", "fp32"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

MFU_FORMULA = "tokens/s/device × FLOPs/token ÷ (peak TFLOPs × 1e12)"


class Peak(Record):
    """Peak of one device in one precision."""

    tflops: float
    """Dense, in 1e12 FLOPs per second."""
    device: str
    precision: str
    source: str
    confirmed: bool
    """False where no vendor's document is known for it."""


class DevicePeaks(Record):
    """One entry of `peaks.yaml`, whose head says what the keys mean."""

    device: Name
    names: Annotated[list[Name], Field(min_length=1)]
    families: list[Name] = []
    tflops: dict[Precision, float]
    source: Name
    confirmed: bool


def peak_of(device_name: str, precision: str) -> Peak | None:
    """The peak of the device of this name; None if it is not known, or not known which it is.

    Args:
        device_name: as torch or torch_npu give it, e.g. "NVIDIA H100 80GB HBM3", "Ascend910B3".
        precision: of the matrix products: bf16, fp16, tf32 or fp32; another has no peak here.
    """
    candidates = peak_candidates(device_name, precision)
    return candidates[0] if len(candidates) == 1 else None


def peak_candidates(device_name: str, precision: str) -> tuple[Peak, ...]:
    """Peaks of all devices that may have this name, lowest first; empty if none is known."""
    table = device_peaks()
    found = [entry for entry in table if _matches(device_name, entry.names)]
    found = found or [entry for entry in table if _matches(device_name, entry.families)]
    peaks = (_peak(entry, precision) for entry in found)
    return tuple(sorted(filter(None, peaks), key=lambda peak: peak.tflops))


@cache
def device_peaks() -> tuple[DevicePeaks, ...]:
    """The whole table. Raises ConfigError."""
    path = Path(__file__).with_name("peaks.yaml")
    return tuple(checked(DevicePeaks, entry, path) for entry in read_entries(path))


def peak_rows() -> list[dict[str, object]]:
    """The whole table, one row for each device, without the patterns."""
    return [entry.model_dump(exclude={"names", "families"}) for entry in device_peaks()]


def mfu(tokens_per_second_per_device: float, flops_per_token: float, peak: Peak) -> float:
    """Share of the peak that a training's FLOPs make up, from 0 to 1: PaLM's model FLOPs
    utilisation, if `flops_per_token` counts no recomputation.

    Raises InputError above 1: then the speed, the FLOPs or the peak is another device's.
    """
    share = tokens_per_second_per_device * flops_per_token / (peak.tflops * 1e12)
    if share > 1:
        raise InputError(
            f"MFU of {share:.1%} on {peak.device}: {tokens_per_second_per_device:g} tokens/s/device"
            f" × {flops_per_token:.4g} FLOPs/token against a peak of {peak.tflops:g} TFLOPs in"
            f" {peak.precision} ({peak.source}), by {MFU_FORMULA}; it cannot be above 100 %: check"
            " that speed and device belong together, that the speed is one device's, and the unit"
        )
    return share


def _matches(device_name: str, patterns: list[str]) -> bool:
    return any(re.search(pattern, device_name, re.IGNORECASE) for pattern in patterns)


def _peak(entry: DevicePeaks, precision: str) -> Peak | None:
    values: Mapping[str, float] = {str(name): value for name, value in entry.tflops.items()}
    if precision not in values:
        return None
    return Peak(
        tflops=values[precision],
        device=entry.device,
        precision=precision,
        source=entry.source,
        confirmed=entry.confirmed,
    )
