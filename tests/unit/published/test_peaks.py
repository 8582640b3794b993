"""Peaks: dense, found by the device's name, never guessed; MFU above 100 % is an error."""

import pytest

from internlm_lib.errors import InputError
from internlm_lib.published import Peak, mfu, peak_candidates, peak_of
from internlm_lib.published.peaks import device_peaks


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("a100_80gb", "fp32", 19.5),
        ("NVIDIA A800-SXM4-80GB", "bf16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H800", "bf16", 989),
        ("NVIDIA H200", "fp16", 989),
        ("NVIDIA H200 NVL", "bf16", 835),
        ("Ascend910A", "fp16", 256),
        ("Ascend910B1", "bf16", 414),
        ("Ascend910B2", "bf16", 376),
        ("Ascend910B3", "fp16", 313),
        ("Ascend 910B4", "bf16", 280),
    ],
)
def test_a_device_is_found_by_its_name(name: str, precision: str, tflops: float) -> None:
    peak = peak_of(name, precision)
    assert peak is not None and peak.tflops == tflops
    assert peak.confirmed == ("910B" not in name and "800" not in name)


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("Ascend 910B", [280, 313, 376, 414]),
        ("910B", [280, 313, 376, 414]),
        ("H100", [756, 835, 989]),
        ("h100_80gb", [756, 835, 989]),
        ("NVIDIA B300", []),
        ("NVIDIA GH200 480GB", []),
        ("Ascend910_9392", []),
        ("cpu", []),
    ],
)
def test_a_shared_or_unknown_name_has_no_peak(name: str, candidates: list[float]) -> None:
    assert peak_of(name, "bf16") is None
    assert [peak.tflops for peak in peak_candidates(name, "bf16")] == candidates


OF_TORCH_NPU = {
    # first generation
    "Ascend910A": 256, "Ascend910B": None, "Ascend910ProA": None, "Ascend910ProB": None,
    "Ascend910PremiumA": None,
    # 910B
    "Ascend910B1": 414, "Ascend910B2": 376, "Ascend910B2C": 376, "Ascend910B3": 313,
    "Ascend910B4": 280, "Ascend910B4-1": 280,
    # dies of the 910C
    "Ascend910_9362": None, "Ascend910_9363": None, "Ascend910_9372": None, "Ascend910_9381": None,
    "Ascend910_9382": None, "Ascend910_9391": None, "Ascend910_9392": None,
    # others
    "Ascend310B4": None, "Ascend310P3": None, "Ascend950PR_9579": None, "Ascend950DT_9582": None,
}  # fmt: skip
"""Names of training chips, and some others, in libtorch_npu.so of 2.13.0 → TFLOPs in fp16."""


@pytest.mark.parametrize("name", OF_TORCH_NPU)
def test_a_name_that_torch_npu_gives_finds_its_row_or_none(name: str) -> None:
    """None, not another chip's: `Ascend910B` has a row's name, but is another generation."""
    peak = peak_of(name, "fp16")
    assert (peak.tflops if peak else None) == OF_TORCH_NPU[name]
    if peak is None:
        assert peak_candidates(name, "fp16") == ()


def test_a_precision_that_a_device_has_not_has_no_peak() -> None:
    assert peak_of("Ascend910A", "bf16") is None
    assert peak_of("NVIDIA A100-SXM4-80GB", "fp8") is None


def test_peaks_are_dense_and_name_a_source() -> None:
    """With sparsity an A100 has 624 and an H100 1979."""
    for entry in device_peaks():
        assert len(entry.source) > 20
        assert all(0 < tflops < 1000 for tflops in entry.tflops.values())


def test_mfu_of_the_best_internevo_figure() -> None:
    """4103 tokens/s at 44.411e9 FLOPs/token are 182.2 TFLOPs, 58.4 % of 312."""
    peak = peak_of("NVIDIA A100-SXM4-80GB", "bf16")
    assert peak is not None
    assert mfu(4103, 44_411_387_904, peak) == pytest.approx(0.584, abs=5e-4)


def test_mfu_above_100_percent_is_refused() -> None:
    peak = Peak(tflops=312, device="A100", precision="bf16", source="a sheet", confirmed=True)
    assert mfu(312e12 / 43.9e9, 43.9e9, peak) == pytest.approx(1)
    with pytest.raises(InputError) as error:
        mfu(26624, 43.9e9, peak)  # a cluster's speed, taken for one device's
    for part in ("374.6%", "A100", "312 TFLOPs", "bf16", "a sheet", "FLOPs/token ÷", "26624"):
        assert part in str(error.value)
