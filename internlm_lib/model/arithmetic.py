"""Parameters, FLOPs and bytes of an InternLM, exact, each under the name of its convention.

Published throughputs mix three FLOP conventions that lie 7 % apart at 7B, so a number of TFLOPs
means nothing without one. Letters: L layers, h hidden size, f ffn size, V vocabulary, s sequence.
"""

import math
from typing import Literal

from internlm_lib.experiment.schema import Layout, ModelSection

Attention = Literal["none", "causal", "full"]
"""Attention scores and values: not counted, the half below the diagonal, or the whole square."""

Recompute = Literal["full", "selective"]

MODEL_FLOPS_CONVENTION = "6N + causal attention"
"""Convention of every `model_tflops_per_device` the kit records: see `model_flops_per_token`."""

CONVENTIONS: dict[str, tuple[Attention, Recompute | None]] = {
    "6N": ("none", None),
    MODEL_FLOPS_CONVENTION: ("causal", None),
    "6N + full attention": ("full", None),
    "hardware, selective recompute": ("full", "selective"),
    "hardware, full recompute": ("full", "full"),
}
"""Name → arguments of `training_flops_per_token`. N is `matmul_parameters`."""

_ADAM_STATE_BYTES = {"fp32": 16, "bf16": 18, "fp16": 18}
"""Per parameter: weight and gradient in fp32, two moments (16); others add a working copy."""


def parameter_count(model: ModelSection, padded_vocab_size: int | None = None) -> int:
    """All parameters: L·(4h² + 3hf + 2h + 4h with attention bias) + h + 2Vh."""
    h = model.hidden_size
    vocab = padded_vocab_size or model.vocab_size
    return model.num_layers * layer_parameter_count(model) + h + 2 * vocab * h


def layer_parameter_count(model: ModelSection) -> int:
    """Parameters of one transformer layer, its two norms included."""
    h, f = model.hidden_size, model.ffn_hidden_size
    bias = 4 * h if model.attention_bias else 0
    return 4 * h * h + 3 * h * f + 2 * h + bias


def padded_vocab_size(model: ModelSection, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding: vocab_size up to a multiple of divisor × tensor parallel size."""
    multiple = model.make_vocab_size_divisible_by * tensor_model_parallel_size
    return math.ceil(model.vocab_size / multiple) * multiple


def matmul_parameters(model: ModelSection) -> int:
    """N: parameters that a token is multiplied with, L·(4h² + 3hf) + Vh.

    The input embedding is a lookup; norms and biases are left out.
    """
    h, f = model.hidden_size, model.ffn_hidden_size
    return model.num_layers * (4 * h * h + 3 * h * f) + model.vocab_size * h


def attention_flops_per_token(model: ModelSection, seq_length: int, attention: Attention) -> int:
    """Forward FLOPs of scores and values: 4·L·h·s for the full square, half of it if causal."""
    square = 4 * model.num_layers * model.hidden_size * seq_length
    return {"none": 0, "causal": square // 2, "full": square}[attention]


def training_flops_per_token(
    model: ModelSection,
    seq_length: int,
    attention: Attention = "causal",
    recompute: Recompute | None = None,
) -> int:
    """FLOPs of one training step per token: three forward passes' worth, plus recomputation.

    Args:
        recompute: None counts what the model needs (for MFU); "full" adds a second forward pass of
            everything, "selective" of the attention core (hardware FLOPs, for HFU). The output
            layer is counted as recomputed too under "full", as in the common 8N.
    """
    matmul = 2 * matmul_parameters(model)
    core = attention_flops_per_token(model, seq_length, attention)
    again = {None: 0, "selective": core, "full": matmul + core}[recompute]
    return 3 * (matmul + core) + again


def model_flops_per_token(model: ModelSection, seq_length: int) -> int:
    """The kit's own convention, `MODEL_FLOPS_CONVENTION`."""
    return training_flops_per_token(model, seq_length, "causal")


def ascendspeed_flops_per_token(
    model: ModelSection, seq_length: int, *, checkpoint_activations: bool = False
) -> float:
    """The predecessor's formula, for comparison with its published TFLOPs.

    24·c·L·h²·(1 + s/6h + V/16Lh) with c = 3, or 4 with full recomputation: full attention, and an
    MLP of 8h² whatever f is. Source: AscendSpeed, `ascendspeed/utils.py`.
    """
    h, layers = model.hidden_size, model.num_layers
    passes = 4 if checkpoint_activations else 3
    terms = 1 + seq_length / (6 * h) + model.vocab_size / (16 * layers * h)
    return 24 * passes * layers * h * h * terms


def internevo_flops_per_token(model: ModelSection, seq_length: int) -> int:
    """InternEvo's own counter without recomputation, for comparison with its published TFLOPs.

    72·L·h² + 12·L·h·s + 6·V·h: full attention, and an MLP of 8h² whatever f is. With recomputation
    (4 for 3 of everything but the vocabulary) it is `ascendspeed_flops_per_token`'s. Source:
    InternLM/InternEvo, `get_megatron_flops`.
    """
    h, layers = model.hidden_size, model.num_layers
    return 72 * layers * h * h + 12 * layers * h * seq_length + 6 * model.vocab_size * h


def tflops_per_device(tokens_per_second_per_device: float, flops_per_token: float) -> float:
    return tokens_per_second_per_device * flops_per_token / 1e12


def training_state_bytes(model: ModelSection, precision: Literal["fp32", "bf16", "fp16"]) -> int:
    """Weights, gradients (fp32) and Adam moments of the whole model, over all ranks together."""
    return parameter_count(model) * _ADAM_STATE_BYTES[precision]


def weight_bytes(model: ModelSection, bytes_per_parameter: int) -> int:
    """Size of the weights in a checkpoint, e.g. with 2 bytes for bf16."""
    return parameter_count(model) * bytes_per_parameter


def rank_state_bytes(parameters: int, layout: Layout, precision: str) -> dict[str, int]:
    """What a rank that has `parameters` holds of `weights`, `gradients` (fp32) and `optimizer`
    states (two Adam moments and, below fp32, the main weights), in bytes.

    ZeRO-1 and a distributed optimizer share the optimizer states over data parallel ranks, ZeRO-2
    the gradients too, ZeRO-3 the weights too; a share is rounded up to a whole parameter.
    """
    share = math.ceil(parameters / layout.data_parallel_size)
    whole = precision == "fp32"
    shared = layout.zero_stage or layout.use_distributed_optimizer
    return {
        "weights": (4 if whole else 2) * (share if layout.zero_stage == 3 else parameters),
        "gradients": 4 * (share if layout.zero_stage >= 2 else parameters),
        "optimizer": (8 if whole else 12) * (share if shared else parameters),
    }
