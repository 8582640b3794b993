"""Typed sections of a params file. Each field says its meaning, its unit and what is allowed.

Names are those of Megatron-LM's arguments where it has one. Rules between fields are in `rules.py`.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from internlm_lib.experiment.values import Flag, Integer, Number, Text

Count = Annotated[Integer, Field(gt=0)]
CountOrZero = Annotated[Integer, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Beta = Annotated[Number, Field(ge=0, lt=1)]

Role = Literal["reference", "candidate"]
ROLES: tuple[Role, ...] = ("reference", "candidate")


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values never change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(Section):
    """Shape of the model. Keys left out come from `preset` (see `presets.py`)."""

    preset: Text
    """Name of the shape that fills the keys left out: see `presets.PRESETS`."""
    num_layers: Count
    hidden_size: Count
    ffn_hidden_size: Count
    num_attention_heads: Count
    vocab_size: Count
    """Rows of the embedding before padding; at least the tokenizer's number of pieces."""
    max_position_embeddings: Count
    attention_bias: Flag
    """Bias on q, k, v and o (InternLM 7B and 65B have it, 20B does not). Never on the MLP."""
    layernorm_epsilon: Positive
    rotary_base: Count
    init_method_std: Positive
    """Standard deviation of the normal distribution that weights are drawn from."""
    make_vocab_size_divisible_by: Count
    """The embedding is padded to a multiple of this × tensor_model_parallel_size."""
    weights: Text | None = None
    """Checkpoint to start from, of any format the kit reads (Hugging Face, Megatron, AscendSpeed,
    DeepSpeed); null draws random weights from `training.seed`."""
    direct_start: Flag = False
    """Every rank reads its own slices of `weights` as they are; false: of the Megatron checkpoint
    that 02_convert makes of them."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class DataSection(Section):
    train_path: Text | None = None
    """Alpaca-schema parquet, JSON or JSON-lines file, or folder of them; null: the pocket world."""
    tokenizer_model: Text | None = None
    """sentencepiece `tokenizer.model`; null trains one of `model.vocab_size` pieces on the data."""
    prompt_template: Literal["alpaca", "ascendspeed", "question_answer"] = "alpaca"
    """How a record becomes text: Stanford Alpaca's, the predecessor's (byte-compatible), or the
    `Question: … Answer: …` form the evaluation asks in."""
    append_eod: Flag = True
    """Close every document with `</s>`."""
    split: Annotated[Text, Field(pattern=r"^\d+(\.\d+)?(,\d+(\.\d+)?){2}$")] = "949,50,1"
    """Weights of the train, validation and test parts, in document order."""
    pocket_seed: CountOrZero = 1234
    """Seed of the pocket world; read only without `train_path`."""


class Layout(Section):
    """How one training is split over processes, and by which engine."""

    engine: Literal["megatron", "deepspeed"] = "megatron"
    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    data_parallel_size: Count = 1
    sequence_parallel: Flag = False
    use_distributed_optimizer: Flag = True
    """Shard optimizer states over data parallel ranks (engine megatron; deepspeed: zero_stage)."""
    zero_stage: Annotated[Integer, Field(ge=0, le=3)] = 0
    """ZeRO stage (engine deepspeed: 1, 2 or 3; engine megatron: 0)."""

    @property
    def world_size(self) -> int:
        """Number of processes, one per device."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.data_parallel_size
        )

    @property
    def label(self) -> str:
        """Short name used in tags, tables and legends, e.g. `megatron TP2 PP1 DP1 SP`."""
        parts = [
            self.engine,
            f"TP{self.tensor_model_parallel_size}",
            f"PP{self.pipeline_model_parallel_size}",
            f"DP{self.data_parallel_size}",
        ]
        if self.sequence_parallel:
            parts.append("SP")
        if self.zero_stage:
            parts.append(f"ZeRO-{self.zero_stage}")
        return " ".join(parts)


class ParallelSection(Section):
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    candidate: Layout = Layout()
    reference: Layout | None = None
    """Layout of a second training from the same weights, to compare with; null trains once."""
    reference_run: Text | None = None
    """Run whose candidate is the reference (the GPU run of an NPU run); instead of `reference`."""
    distributed_timeout_minutes: Positive = 30.0
    """How long a collective may wait for a rank before the job fails, in minutes."""

    def layout(self, role: Role) -> Layout | None:
        return self.candidate if role == "candidate" else self.reference


class TrainingSection(Section):
    seed: CountOrZero = 1234
    precision: Literal["fp32", "bf16"] = "bf16"
    seq_length: Count = 2048
    """Tokens per sample."""
    micro_batch_size: Count = 1
    """Samples per forward pass and data parallel rank."""
    global_batch_size: Count = 8
    """Samples per optimizer step over all ranks."""
    train_iters: Count = 1000
    """Optimizer steps."""
    lr: Positive = 1.5e-4
    min_lr: NonNegative = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    lr_decay_iters: Count | None = None
    """Steps until min_lr is reached; null means train_iters."""
    lr_warmup_fraction: Fraction = 0.0
    """Warm-up steps as a fraction of lr_decay_iters (as Megatron counts)."""
    use_flash_attn: Flag = True
    """Fused attention (torch's scaled_dot_product_attention) instead of explicit scores."""
    use_fused_rmsnorm: Flag = True
    """torch's rms_norm operator instead of its formula spelled out."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activations computed again in the backward pass: `full` (of whole layers), `selective` (of
    every layer's core attention; with fused attention that saves next to nothing), or none."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With `full`. uniform (null means that): all layers, of every `recompute_num_layers` one input
    is kept; block: the first `recompute_num_layers` of a pipeline stage, each from its input."""
    recompute_num_layers: Count | None = None
    """With `full`; null means 1. See recompute_method."""
    auto_recompute_device_memory_mib: Count | None = None
    """Device memory in MiB that a training may fill: the cheapest parts of layers are recomputed
    that make it fit (the predecessor's `--auto-recompute-device-size`); excludes the three above.
    """
    eval_interval: Count = 1000
    """Steps between validation losses."""
    eval_iters: CountOrZero = 0
    """Batches per validation loss; 0 turns validation off."""
    save_interval: Count | None = None
    """Steps between checkpoints; null saves only after the last step."""

    @property
    def recompute_policy(self) -> str:
        """For tables: `none`, `full uniform 1`, `full block 3`, `selective` or `adaptive`."""
        if self.auto_recompute_device_memory_mib:
            return "adaptive"
        if self.recompute_granularity == "full":
            return f"full {self.recompute_method or 'uniform'} {self.recompute_num_layers or 1}"
        return self.recompute_granularity or "none"

    @property
    def decay_iters(self) -> int:
        return self.lr_decay_iters or self.train_iters

    @property
    def warmup_iters(self) -> float:
        """Steps of linear warm-up: fraction × decay steps, not rounded, as in Megatron-LM."""
        return self.lr_warmup_fraction * self.decay_iters

    def num_micro_batches(self, layout: Layout) -> int:
        """Gradient accumulation steps."""
        return self.global_batch_size // (self.micro_batch_size * layout.data_parallel_size)


class OptimizerSection(Section):
    """AdamW; biases and norm weights are not decayed."""

    adam_beta1: Beta = 0.9
    adam_beta2: Beta = 0.999
    adam_eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    clip_grad: NonNegative = 1.0
    """Global gradient norm to clip to; 0 turns clipping off."""


class GenerationSection(Section):
    prompts: tuple[Text, ...] = ()
    """Instructions to answer; empty takes `num_prompts` questions of the training data."""
    num_prompts: Count = 6
    max_new_tokens: Count = 32


class EvaluationSection(Section):
    questions_path: Text | None = None
    """Folder in the original MMLU layout (`dev/`, `test/`); null takes the pocket world's."""
    num_fewshot: CountOrZero = 5
    protocols: Annotated[tuple[Literal["cloze", "letter"], ...], Field(min_length=1)] = (
        "cloze",
        "letter",
    )
    """Score the options by their text after `Answer:` (cloze) or by their letter."""
    limit: Count | None = None
    """Questions per subject; null asks all."""
    batch_size: Count = 16
    loss_tolerance: Positive = 0.02
    """Mean relative error of the loss up to which two runs agree."""


class TrackingSection(Section):
    uri: Text | None = None
    """MLflow tracking URI; null is this project's own sqlite store."""
    experiment: Text = "internlm"
    """MLflow experiment that the runs of this params file belong to."""


class Experiment(Section):
    """A whole params file, resolved and checked."""

    model: ModelSection
    data: DataSection
    parallel: ParallelSection
    training: TrainingSection
    optimizer: OptimizerSection
    generation: GenerationSection
    evaluation: EvaluationSection
    tracking: TrackingSection

    @property
    def roles(self) -> tuple[Role, ...]:
        """The trainings of this experiment, in the order they run."""
        return tuple(role for role in ROLES if self.parallel.layout(role))

    def layout(self, role: str) -> Layout:
        """Layout of one of `roles`. Raises KeyError for another."""
        layouts: dict[str, Layout | None] = {name: self.parallel.layout(name) for name in ROLES}
        if (layout := layouts[role]) is None:
            raise KeyError(f"parallel.{role} is null")
        return layout


SECTIONS: tuple[str, ...] = tuple(Experiment.model_fields)
