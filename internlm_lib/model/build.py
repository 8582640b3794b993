"""One rank's part of an InternLM, as megatron-core's GPTModel.

Import only after `Device.adapt_megatron()`.
"""

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from internlm_lib.devices import Device
from internlm_lib.experiment.schema import Layout, ModelSection, TrainingSection
from internlm_lib.kernels import Kernels, kernels_of
from internlm_lib.model.arithmetic import padded_vocab_size
from internlm_lib.model.gpt import InternLM
from internlm_lib.model.precision import DTYPES
from internlm_lib.model.spec import layer_spec, norm_spec, use_rotary


def build_gpt_model(
    model: ModelSection,
    layout: Layout,
    training: TrainingSection,
    device: Device,
    *,
    vp_stage: int | None = None,
) -> GPTModel:
    """This rank's layers on its device, weights undefined until some are loaded.

    Args:
        vp_stage: of an interleaved layout, which of the stage's chunks (see `build_chunks`).
    """
    kernels = kernels_of(device.kernels, **training.kernel_switches)
    use_rotary(kernels)
    config = transformer_config(model, layout, training, device)
    gpt = InternLM(
        real_vocab_size=model.vocab_size,
        config=config,
        transformer_layer_spec=_block_spec(config, kernels, model.attention_bias),
        vocab_size=padded_vocab_size(model, layout.tensor_model_parallel_size),
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
    )
    return gpt.to(device=device.current(), dtype=DTYPES[training.precision])


def build_chunks(
    model: ModelSection, layout: Layout, training: TrainingSection, device: Device
) -> list[GPTModel]:
    """This rank's part of a model to train: one GPTModel, or one per interleaved chunk."""
    chunks = layout.virtual_pipeline_model_parallel_size
    stages: Sequence[int | None] = [None] if chunks is None else range(chunks)
    return [
        build_gpt_model(model, layout, training, device, vp_stage=vp_stage) for vp_stage in stages
    ]


def transformer_config(
    model: ModelSection,
    layout: Layout,
    training: TrainingSection,
    device: Device,
) -> TransformerConfig:
    """megatron-core's configuration of an InternLM; its own fusions are off, the kernels' on."""
    full = training.recompute_granularity == "full"
    interleaved = layout.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.attention_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Not perform_initialization=False: that also leaves off the marks that tell a tensor
        # parallel shard from a copy, and the gradient norm would count one rank's shards only.
        init_method=_leave_undefined,
        output_layer_init_method=_leave_undefined,
        use_cpu_initialization=device.name == "cpu",
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        deterministic_mode=training.deterministic_mode,
        params_dtype=DTYPES[training.precision],
        pipeline_dtype=DTYPES[training.precision],
        # What auto_recompute_device_memory_mib chooses is set on each layer (`model/layer.py`).
        recompute_granularity=training.recompute_granularity,
        recompute_method=(training.recompute_method or "uniform") if full else None,
        recompute_num_layers=(training.recompute_num_layers or 1) if full else None,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=True,
        # Not TransformerEngine's, here and above: `model.spec` puts the kernels in their place.
        use_te_activation_func=True,
        persist_layer_norm=False,
        # Pipeline neighbours exchange tensors one by one: gloo has no batched device-side order.
        batch_p2p_comm=device.name != "cpu" and not interleaved,
        # Of two stages each is before and behind the other: only exchanges that go one way at a
        # time cannot be taken for one another. More stages gain from it, too.
        overlap_p2p_comm=interleaved,
    )


def _leave_undefined(weight: Tensor) -> Tensor:
    """Initialisation of weights that are loaded in any case."""
    return weight


def _block_spec(
    config: TransformerConfig, kernels: Kernels, attention_bias: bool
) -> TransformerBlockSubmodules:
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    chunks = config.virtual_pipeline_model_parallel_size or 1
    layer = layer_spec(kernels, attention_bias=attention_bias)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * (config.num_layers // (stages * chunks)),
        layer_norm=norm_spec(kernels),
    )
