"""Counts of the released models; 7B's is confirmed by the size of its published checkpoint."""

import pytest

from internlm_lib.experiment.presets import PRESETS
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.model import arithmetic


def _model(name, **changes):
    return ModelSection(**{"preset": name, **PRESETS[name], **changes})


SEVEN, TWENTY, SIXTY_FIVE = (_model(f"internlm-{size}b") for size in (7, 20, 65))


@pytest.mark.parametrize(
    "model, total, layer, matmul",
    [
        (SEVEN, 7_321_948_160, 202_399_744, 6_898_581_504),
        (TWENTY, 20_088_714_240, 317_204_480, 19_559_874_560),
        (SIXTY_FIVE, 66_454_298_624, 809_549_824, 65_605_206_016),
    ],
)
def test_parameter_counts(model, total, layer, matmul):
    assert arithmetic.parameter_count(model) == total
    assert arithmetic.layer_parameter_count(model) == layer
    assert arithmetic.matmul_parameters(model) == matmul


def test_parameters_without_bias_and_with_a_padded_vocabulary():
    assert arithmetic.parameter_count(_model("internlm-20b", attention_bias=True)) == 20_089_943_040
    padded = arithmetic.parameter_count(SEVEN, padded_vocab_size=103_168 + 128)
    assert padded - arithmetic.parameter_count(SEVEN) == 2 * 128 * 4096


@pytest.mark.parametrize(
    "model, six_n, causal, full",
    [
        (SEVEN, 41_391_489_024, 43_002_101_760, 44_612_714_496),
        (TWENTY, 117_359_247_360, 121_134_120_960, 124_908_994_560),
        (SIXTY_FIVE, 393_631_236_096, 401_684_299_776, 409_737_363_456),
    ],
)
def test_training_flops_per_token_at_2048(model, six_n, causal, full):
    assert arithmetic.training_flops_per_token(model, 2048, "none") == six_n
    assert arithmetic.training_flops_per_token(model, 2048, "causal") == causal
    assert arithmetic.training_flops_per_token(model, 2048, "full") == full
    assert arithmetic.model_flops_per_token(model, 2048) == causal


def test_recomputation_adds_a_forward_pass():
    full = arithmetic.training_flops_per_token(SEVEN, 2048, "full")
    again = arithmetic.training_flops_per_token(SEVEN, 2048, "full", "full")
    assert again * 3 == full * 4
    core = arithmetic.attention_flops_per_token(SEVEN, 2048, "full")
    assert arithmetic.training_flops_per_token(SEVEN, 2048, "full", "selective") == full + core


def test_conventions_rise_in_the_order_they_are_listed():
    values = [arithmetic.training_flops_per_token(SEVEN, 2048, *c) for c in
              arithmetic.CONVENTIONS.values()]  # fmt: skip
    assert values == sorted(set(values))
    own = arithmetic.CONVENTIONS[arithmetic.MODEL_FLOPS_CONVENTION]
    assert arithmetic.training_flops_per_token(SEVEN, 2048, *own) == (
        arithmetic.model_flops_per_token(SEVEN, 2048)
    )


def test_published_tflops_follow_from_the_predecessor_s_formula():
    seven = arithmetic.ascendspeed_flops_per_token(SEVEN, 2048)
    speed = 256 * 2048 / 19.6846 / 8  # tokens per second and device of the published 7B row
    assert arithmetic.tflops_per_device(speed, seven) == pytest.approx(145.75, abs=0.01)
    sixty_five = arithmetic.ascendspeed_flops_per_token(SIXTY_FIVE, 2048)
    speed = 128 * 2048 / 24 / 32
    assert arithmetic.tflops_per_device(speed, sixty_five) == pytest.approx(138.74, abs=0.01)
    counted = arithmetic.ascendspeed_flops_per_token(SEVEN, 2048, checkpoint_activations=True)
    assert counted == pytest.approx(seven * 4 / 3)


def test_bytes():
    assert arithmetic.weight_bytes(SEVEN, 2) == 14_643_896_320
    assert arithmetic.training_state_bytes(SEVEN, "bf16") == 18 * 7_321_948_160
    assert arithmetic.training_state_bytes(SEVEN, "fp32") == 16 * 7_321_948_160
