"""Typed sections of a params file. Each field says its meaning, its unit and what is allowed.

Names are those of Megatron-LM's arguments where it has one. Rules between fields are in `rules.py`.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from internlm_lib.experiment.batch_ramp import BatchRamp, consumed_before_steps
from internlm_lib.experiment.values import Flag, Integer, Number, Setting, Text

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

    @property
    def shape(self) -> dict[str, int]:
        """What parameters and FLOPs follow from, for records."""
        names = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"}
        return self.model_dump(include=names | {"vocab_size"})


class BlendPart(Section):
    """One of several sources of records."""

    path: Text
    """As `data.train_path`."""
    weight: Positive = 1.0
    """Share of the training's samples, relative to the other parts'."""


class DataSection(Section):
    train_path: Text | None = None
    """Records: a file, folder or glob of parquet, arrow, json, jsonl, csv or txt, each plain or
    packed (.gz, .zst); null: the pocket world."""
    blend: tuple[BlendPart, ...] = ()
    """Several sources, mixed by weight (megatron-core's BlendedDataset), instead of train_path."""
    tokenizer_model: Text | None = None
    """sentencepiece `tokenizer.model`; null trains one of `model.vocab_size` pieces on the data."""
    handler: Text = "alpaca"
    """What makes a document of a record: `pretrain` (column text), `alpaca`, `alpaca_predecessor`
    (byte-compatible), `question_answer` (the form the evaluation asks in), `alpaca_instruction` and
    `conversation` (answers trained only), `conversation_legacy`, or your own, named as
    `package.module:Class` (see `data/handlers.py`)."""
    columns: dict[Text, Text] = {}
    """Column that a handler reads → the records' own name of it, e.g. {instruction: question}."""
    on_damage: Literal["stop", "count"] = "stop"
    """A record that cannot be used: stop, with its file and row; or leave it out and count it."""
    pack: Flag = True
    """Instruction data: several documents share a row of training.seq_length tokens; false: one
    each, padded in training."""
    append_eod: Flag = True
    """Close every document with `</s>`."""
    split: Annotated[Text, Field(pattern=r"^\d+(\.\d+)?(,\d+(\.\d+)?){2}$")] = "949,50,1"
    """Weights of the train, validation and test parts, in document order. A test part above 0 is
    measured after the last step, if `training.eval_iters` is above 0."""
    pocket_seed: CountOrZero = 1234
    """Seed of the pocket world; read only without `train_path`."""


class Layout(Section):
    """How one training is split over processes, and by which engine."""

    engine: Literal["megatron", "deepspeed"] = "megatron"
    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    virtual_pipeline_model_parallel_size: Count | None = None
    """Chunks of layers per pipeline stage, 2 or more, whose work interleaves (engine megatron);
    null: one chunk, plain 1F1B."""
    data_parallel_size: Count = 1
    sequence_parallel: Flag = False
    use_distributed_optimizer: Flag = True
    """Shard optimizer states over data parallel ranks (engine megatron; deepspeed: zero_stage)."""
    overlap_grad_reduce: Flag = False
    """Reduce gradients bucket by bucket while the backward pass goes on (engine megatron)."""
    overlap_param_gather: Flag = False
    """Gather updated parameters while the next forward pass goes on (engine megatron; needs
    use_distributed_optimizer and overlap_grad_reduce)."""
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
    def num_chunks(self) -> int:
        """Parts of the model, of equal numbers of layers, over all pipeline stages."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    @property
    def label(self) -> str:
        """Short name used in tags, tables and legends, e.g. `megatron TP2 PP1 DP1 SP`."""
        parts = [
            self.engine,
            f"TP{self.tensor_model_parallel_size}",
            f"PP{self.pipeline_model_parallel_size}",
        ]
        if self.virtual_pipeline_model_parallel_size:
            parts.append(f"VPP{self.virtual_pipeline_model_parallel_size}")
        parts.append(f"DP{self.data_parallel_size}")
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
    """Training to compare with, instead of `reference`: a run's name (the GPU run of an NPU run),
    an MLflow run id, or the path of a log file."""
    candidate_run: Text | None = None
    """Training that 04_compare takes for the candidate, instead of this run's own; named as
    `reference_run` is."""
    distributed_timeout_minutes: Positive = 30.0
    """How long a collective may wait for a rank before the job fails, in minutes."""
    environment: dict[Text, Setting] = {}
    """Environment variables of the ranks, e.g. `{HCCL_CONNECT_TIMEOUT: 1800}`: those of
    `variables.yaml`, in place of what the kit sets; what the shell has set wins. Those of another
    device than the one trained on are not used."""

    def layout(self, role: Role) -> Layout | None:
        return self.candidate if role == "candidate" else self.reference


class TrainingSection(Section):
    seed: CountOrZero = 1234
    """Of the data order, of random weights, and of every random number generator of a rank."""
    deterministic_mode: Flag = False
    """Ask torch and the collectives for the same bits at every run, where that costs speed; only
    for the same device, layout and versions (see `training/determinism.py`)."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """What forward and backward compute in. Main weights, the accumulation of gradients, their
    sum over ranks and the optimizer are fp32 always; fp16 scales the loss (`loss_scale`)."""
    seq_length: Count = 2048
    """Tokens per sample."""
    micro_batch_size: Count = 1
    """Samples per forward pass and data parallel rank."""
    global_batch_size: Count = 8
    """Samples per optimizer step over all ranks."""
    rampup_batch_size: tuple[Count, Count, Count] | None = None
    """[start, increment, samples]: steps begin with `start` samples and grow by `increment` to
    `global_batch_size` while the first `samples` samples are consumed; null: all are full."""
    train_iters: Count = 1000
    """Optimizer steps."""
    lr: Positive = 1.5e-4
    min_lr: NonNegative = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    lr_decay_iters: Count | None = None
    """Steps until min_lr is reached; null means train_iters. The schedule counts samples, as
    Megatron's: while the batch ramps up, a step stands for `global_batch_size` of them."""
    lr_warmup_iters: CountOrZero = 0
    """Steps of linear warm-up; excludes lr_warmup_fraction."""
    lr_warmup_fraction: Fraction = 0.0
    """Warm-up steps as a fraction of lr_decay_iters (as Megatron counts)."""
    use_flash_attn: Flag = True
    """The device's fused attention instead of explicit scores. Which operator each device has for
    this and the next three: `kernels/`."""
    use_fused_rmsnorm: Flag = True
    """The device's RMSNorm instead of its formula spelled out."""
    use_fused_rotary_pos_emb: Flag = True
    """The device's rotary embedding instead of its formula spelled out."""
    use_fused_swiglu: Flag = True
    """The device's SwiGLU instead of its formula spelled out."""
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
    """Batches per validation loss, and of the test loss after the last step; 0 turns both off."""
    save_interval: Count | None = None
    """Steps between checkpoints to resume from; null writes one only when asked to stop."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that stay; that of the lowest validation loss stays besides."""
    async_save: Flag = True
    """Write checkpoints while the training goes on; false: the training waits for the disk."""
    max_restarts: CountOrZero = 0
    """How often a training that failed is started again, from its last checkpoint."""
    hang_timeout_seconds: Positive | None = 1800.0
    """Without an event in the journal for so long, the ranks are stopped; null never does."""
    bad_step_policy: Literal["stop", "skip_batch", "rollback"] = "stop"
    """What follows a step whose loss is not finite or a spike, its update left out: `stop` the
    training, take the next batch, or go back to the last checkpoint and on after that batch."""
    loss_spike_factor: Annotated[Number, Field(gt=1)] | None = None
    """A loss above this × the median of the last 32 steps is a spike; null: none is."""

    @property
    def kernel_switches(self) -> dict[str, bool]:
        """The four `use_…` keys, by name."""
        names = {"use_flash_attn", "use_fused_rmsnorm"}
        return self.model_dump(include=names | {"use_fused_rotary_pos_emb", "use_fused_swiglu"})

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
        """Steps of linear warm-up; a fraction of the decay steps is not rounded, as in Megatron."""
        return self.lr_warmup_iters or self.lr_warmup_fraction * self.decay_iters

    @property
    def decay_samples(self) -> int:
        """Samples until min_lr is reached."""
        if self.lr_decay_iters is None:
            return self.train_samples
        return self.lr_decay_iters * self.global_batch_size

    @property
    def warmup_samples(self) -> float:
        """Samples of linear warm-up."""
        if self.lr_warmup_iters:
            return self.lr_warmup_iters * self.global_batch_size
        return self.lr_warmup_fraction * self.decay_samples

    @property
    def train_samples(self) -> int:
        """Samples of all steps together."""
        return self.samples_before(self.train_iters + 1)

    def samples_before(self, step: int) -> int:
        """Samples that the steps before `step`, counted from 1, take together."""
        if self._ramp is None:
            return (step - 1) * self.global_batch_size
        consumed = consumed_before_steps(self._ramp, self.train_iters + 1)
        if step <= len(consumed):
            return consumed[step - 1]
        return consumed[-1] + (step - len(consumed)) * self.global_batch_size

    def batch_size(self, step: int) -> int:
        """Samples of optimizer step `step`, counted from 1, over all ranks."""
        if self._ramp is None:
            return self.global_batch_size
        return self._ramp.batch_size(self.samples_before(step))

    def num_micro_batches(self, layout: Layout, step: int | None = None) -> int:
        """Gradient accumulation steps of a full batch, or of `step`'s."""
        samples = self.global_batch_size if step is None else self.batch_size(step)
        return samples // (self.micro_batch_size * layout.data_parallel_size)

    @property
    def _ramp(self) -> BatchRamp | None:
        if self.rampup_batch_size is None:
            return None
        return BatchRamp(*self.rampup_batch_size, full=self.global_batch_size)


class OptimizerSection(Section):
    """AdamW; biases and norm weights are not decayed. Loss scaling is read with fp16 only."""

    adam_beta1: Beta = 0.9
    adam_beta2: Beta = 0.999
    adam_eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    predecessor_decay: Flag = False
    """Decay norm weights too, as AscendSpeed did by mistake (it excluded only torch's LayerNorm and
    biases); under DeepSpeed with sequence parallelism it did not, and neither does this."""
    clip_grad: NonNegative = 1.0
    """Global gradient norm to clip to; 0 turns clipping off, but not the measuring of the norm."""
    loss_scale: Positive | None = None
    """What the loss is multiplied by for the backward pass; an overflow ends the training. Null
    adapts it (dynamic): an overflow skips the step."""
    initial_loss_scale: Positive = 4294967296.0
    """Dynamic scale of the first step; from Megatron's 2^32 some 20 steps are skipped."""
    min_loss_scale: Positive = 1.0
    """Dynamic scale below which it is not lowered; an overflow there ends the training."""
    loss_scale_window: Count = 1000
    """Steps without overflow after which the dynamic scale is doubled."""
    hysteresis: Count = 2
    """Overflows before the dynamic scale is halved; counted anew only when it is doubled."""


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
    device_sample_seconds: Positive | None = 10.0
    """Seconds between two samples of what the devices do while a training runs (npu-smi,
    nvidia-smi, the host's processors); null takes none."""


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
