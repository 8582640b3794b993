"""How many layers to recompute so that a training fits a device (`auto_recompute_device_size`).

An estimate from the shapes, made before anything starts; the predecessor profiled ten steps for it.
Letters: h hidden size, f ffn size, a heads, s sequence, b micro-batch, t tensor parallel size.
"""

from dataclasses import dataclass

from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import Experiment, Layout
from internlm_lib.model.arithmetic import layer_parameter_count

_MIB = 1 << 20
_VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_REPLICATED_BYTES = {"fp32": 8, "bf16": 6, "fp16": 6}
"""Per parameter on every data parallel rank: the weight, and its gradient in fp32."""
_SHARDED_BYTES = {"fp32": 8, "bf16": 12, "fp16": 12}
"""Per parameter, shared out by ZeRO: two Adam moments, and under bf16 the fp32 weight."""
_SPELLED_OUT_NORM = {"fp32": 3, "bf16": 4, "fp16": 4}
"""Values saved per value normalised: the input in fp32, the normalised value, the output. The fused
operator saves its input and its output."""
_SCORES = {"fp32": 1, "bf16": 3, "fp16": 3}
"""Values saved per attention score without flash attention: fp32 probabilities, a bf16 copy."""


@dataclass(frozen=True)
class RecomputePlan:
    num_layers: int
    """Layers of every pipeline stage whose activations are recomputed."""
    estimated_bytes: int
    """Memory of the fullest rank then."""


def plan_recompute(experiment: Experiment, layout: Layout) -> RecomputePlan | None:
    """The fewest layers that fit; None without `training.auto_recompute_device_size`.

    Raises InputError if not even recomputing every layer fits.
    """
    limit = experiment.training.auto_recompute_device_size
    if limit is None:
        return None
    layers = experiment.model.num_layers // layout.pipeline_model_parallel_size
    states = _state_bytes(experiment, layout)
    for recomputed in range(layers + 1):
        total = states + _activation_bytes(experiment, layout, layers, recomputed)
        if total <= limit * _MIB:
            return RecomputePlan(recomputed, total)
    raise InputError(
        f"training.auto_recompute_device_size = {limit} MiB: {layout.label} needs about "
        f"{total // _MIB} MiB per device even when all {layers} layers of a stage are recomputed; "
        "raise tensor or pipeline parallel size, lower training.micro_batch_size, or raise it"
    )


def _state_bytes(experiment: Experiment, layout: Layout) -> int:
    """Weights, gradients and optimizer states of the first pipeline stage, which has most."""
    model, precision = experiment.model, experiment.training.precision
    layers = model.num_layers // layout.pipeline_model_parallel_size
    embeddings = 2 if layout.pipeline_model_parallel_size == 1 else 1
    parameters = (
        layers * layer_parameter_count(model) + embeddings * model.vocab_size * model.hidden_size
    ) / layout.tensor_model_parallel_size
    sharded: float = _SHARDED_BYTES[precision]
    if layout.zero_stage or layout.use_distributed_optimizer:
        sharded /= layout.data_parallel_size
    replicated: float = _REPLICATED_BYTES[precision]
    weight = _VALUE_BYTES[precision]
    if layout.zero_stage >= 2:
        replicated = weight + (replicated - weight) / layout.data_parallel_size
    if layout.zero_stage == 3:
        replicated -= weight - weight / layout.data_parallel_size
    return round(parameters * (replicated + sharded))


def _activation_bytes(experiment: Experiment, layout: Layout, layers: int, recomputed: int) -> int:
    """What the backward pass finds: of a layer its saved tensors, or only its input.

    The first of p pipeline stages holds p micro-batches at once (1F1B). Source of the counts: the
    tensors that torch saves in this kit's layer, within 3 % (logsumexp and rotary tables are left
    out); Korthikanti et al. 2022 count GPT's likewise. A CPU has no fused norm: it saves more.
    """
    model, training = experiment.model, experiment.training
    h, f, t = model.hidden_size, model.ffn_hidden_size, layout.tensor_model_parallel_size
    around = h / t if layout.sequence_parallel else h
    norms = 2 * (2 if training.use_fused_rmsnorm else _SPELLED_OUT_NORM[training.precision])
    scores = model.num_attention_heads * training.seq_length * _SCORES[training.precision]
    # Attention: the output of the qkv layer (v is a view of it), q and k rotated, the output.
    # MLP: gate and up as one tensor, silu, up with megatron's offset of 0 added, the product.
    inside = 6 * h + 5 * f + (0 if training.use_flash_attn else scores)
    whole = norms * around + inside / t
    values = (layers - recomputed) * whole + recomputed * around
    if recomputed:
        values += whole
    tokens = training.seq_length * training.micro_batch_size
    held = layout.pipeline_model_parallel_size * tokens * values * _VALUE_BYTES[training.precision]
    # Output scores over the vocabulary and their gradient, in fp32; with more stages, on the last.
    head = 2 * 4 * tokens * model.vocab_size / t if layout.pipeline_model_parallel_size == 1 else 0
    return round(held + head)
