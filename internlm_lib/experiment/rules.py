"""Rules between fields of an experiment: what must divide what, what excludes what.

A rule names the fields it reads, so that it is skipped when one of them could not be read, and
yields one message per violation: the key, the value found, what is allowed, what to do.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from internlm_lib.experiment.schema import ROLES, Experiment, Layout, TrainingSection
from internlm_lib.experiment.values import nearest
from internlm_lib.experiment.variables import mistakes, variables


@dataclass(frozen=True)
class Rule:
    reads: tuple[str, ...]
    check: Callable[[Experiment], Iterator[str]]


RULES: list[Rule] = []


def _rule(*reads: str) -> Callable[[Callable[[Experiment], Iterator[str]]], None]:
    def register(check: Callable[[Experiment], Iterator[str]]) -> None:
        RULES.append(Rule(reads, check))

    return register


def broken_rules(experiment: Experiment, unreadable: set[str]) -> list[str]:
    """Messages of all rules that fail; rules that read an `unreadable` key are left out."""
    usable = (
        rule
        for rule in RULES
        if not any(
            f"{bad}.".startswith(f"{key}.") or f"{key}.".startswith(f"{bad}.")
            for key in rule.reads
            for bad in unreadable
        )
    )
    return [message for rule in usable for message in rule.check(experiment)]


def _layouts(experiment: Experiment) -> Iterator[tuple[str, Layout]]:
    for role in ROLES:
        if layout := experiment.parallel.layout(role):
            yield f"parallel.{role}", layout


def _must_divide(whole_key: str, whole: int, part_key: str, part: int) -> Iterator[str]:
    if whole % part:
        allowed = [d for d in range(1, min(whole, 128) + 1) if whole % d == 0]
        yield (
            f"{whole_key} = {whole} is not a multiple of {part_key} = {part}; "
            f"choose a divisor of {whole}: {', '.join(map(str, allowed))}"
        )


@_rule("model.hidden_size", "model.num_attention_heads")
def _heads_divide_hidden(e: Experiment) -> Iterator[str]:
    yield from _must_divide(
        "model.hidden_size", e.model.hidden_size,
        "model.num_attention_heads", e.model.num_attention_heads,
    )  # fmt: skip
    if e.model.hidden_size % e.model.num_attention_heads == 0 and e.model.head_dim % 2:
        yield (
            f"model.hidden_size / model.num_attention_heads = {e.model.head_dim} is odd; "
            "rotary embeddings need an even head dimension"
        )


@_rule("parallel.candidate", "parallel.reference", "model.num_attention_heads",
       "model.ffn_hidden_size", "model.num_layers")  # fmt: skip
def _layout_divides_model(e: Experiment) -> Iterator[str]:
    for key, layout in _layouts(e):
        tensor = (f"{key}.tensor_model_parallel_size", layout.tensor_model_parallel_size)
        pipeline = (f"{key}.pipeline_model_parallel_size", layout.pipeline_model_parallel_size)
        if layout.virtual_pipeline_model_parallel_size:
            pipeline = (f"{pipeline[0]} × virtual_pipeline_model_parallel_size", layout.num_chunks)
        yield from _must_divide("model.num_attention_heads", e.model.num_attention_heads, *tensor)
        yield from _must_divide("model.ffn_hidden_size", e.model.ffn_hidden_size, *tensor)
        yield from _must_divide("model.num_layers", e.model.num_layers, *pipeline)


@_rule("parallel.candidate", "parallel.reference", "training.seq_length")
def _sequence_parallel(e: Experiment) -> Iterator[str]:
    for key, layout in _layouts(e):
        if not layout.sequence_parallel:
            continue
        if layout.tensor_model_parallel_size == 1:
            yield (
                f"{key}.sequence_parallel = true needs {key}.tensor_model_parallel_size above 1 "
                "(it splits activations over tensor parallel ranks); raise one or drop the other"
            )
        yield from _must_divide(
            "training.seq_length", e.training.seq_length,
            f"{key}.tensor_model_parallel_size", layout.tensor_model_parallel_size,
        )  # fmt: skip


@_rule("parallel.candidate", "parallel.reference")
def _engine_options(e: Experiment) -> Iterator[str]:
    for key, layout in _layouts(e):
        if layout.engine == "megatron" and layout.zero_stage:
            yield (
                f"{key}.zero_stage = {layout.zero_stage} belongs to engine deepspeed; set "
                f"{key}.engine: deepspeed, or use_distributed_optimizer: true (megatron's ZeRO-1)"
            )
        if layout.engine == "deepspeed" and layout.zero_stage == 0:
            yield f"{key}.zero_stage = 0 with engine deepspeed; choose 1, 2 or 3"
        if layout.engine == "deepspeed" and layout.pipeline_model_parallel_size > 1:
            yield (
                f"{key}.pipeline_model_parallel_size = {layout.pipeline_model_parallel_size} with "
                "engine deepspeed; only engine megatron has pipeline stages: use 1 or megatron"
            )


@_rule("parallel.candidate", "parallel.reference")
def _interleaved(e: Experiment) -> Iterator[str]:
    for key, layout in _layouts(e):
        chunks = layout.virtual_pipeline_model_parallel_size
        if chunks is None:
            continue
        found = f"{key}.virtual_pipeline_model_parallel_size = {chunks}"
        if layout.engine == "deepspeed":
            yield f"{found} with engine deepspeed, which has no pipeline stages; set it to null"
        elif chunks == 1:
            yield f"{found} interleaves nothing; use 2 or more chunks per stage, or null"
        elif layout.pipeline_model_parallel_size == 1:
            yield (
                f"{found} needs {key}.pipeline_model_parallel_size above 1 (it interleaves the "
                "chunks of pipeline stages); raise it, or set the first to null"
            )


@_rule("parallel.candidate", "parallel.reference", "training.micro_batch_size",
       "training.global_batch_size")  # fmt: skip
def _interleaved_micro_batches(e: Experiment) -> Iterator[str]:
    for key, layout in _layouts(e):
        stages = layout.pipeline_model_parallel_size
        count = e.training.num_micro_batches(layout)
        if layout.virtual_pipeline_model_parallel_size and count % stages:
            step = e.training.micro_batch_size * layout.data_parallel_size * stages
            yield (
                f"{key}.virtual_pipeline_model_parallel_size: a step has {count} micro-batches per "
                f"data parallel rank, no multiple of {key}.pipeline_model_parallel_size = {stages} "
                "by which the interleaved schedule takes them; make training.global_batch_size a "
                f"multiple of {step}"
            )


@_rule("parallel.candidate", "parallel.reference")
def _overlaps(e: Experiment) -> Iterator[str]:
    for key, layout in _layouts(e):
        chosen = [
            name for name in ("overlap_grad_reduce", "overlap_param_gather")
            if getattr(layout, name)
        ]  # fmt: skip
        if layout.engine == "deepspeed":
            for name in chosen:
                yield f"{key}.{name} = true belongs to engine megatron; set it to false"
        elif layout.overlap_param_gather:
            for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
                if not getattr(layout, name):
                    yield (
                        f"{key}.overlap_param_gather = true needs {key}.{name} = true (parameters "
                        "are gathered in the distributed optimizer's buckets); set it, or drop "
                        "overlap_param_gather"
                    )


@_rule("parallel.candidate", "parallel.reference", "training.micro_batch_size",
       "training.global_batch_size")  # fmt: skip
def _batch_divides(e: Experiment) -> Iterator[str]:
    for key, layout in _layouts(e):
        step = e.training.micro_batch_size * layout.data_parallel_size
        below = e.training.global_batch_size // step * step
        if e.training.global_batch_size % step:
            allowed = f"{below} or {below + step}" if below else f"{step}"
            yield (
                f"training.global_batch_size = {e.training.global_batch_size} is not a multiple of "
                f"{step} (training.micro_batch_size {e.training.micro_batch_size} × "
                f"{key}.data_parallel_size {layout.data_parallel_size}); use {allowed}"
            )


@_rule("training.rampup_batch_size", "training.global_batch_size", "training.micro_batch_size",
       "parallel.candidate", "parallel.reference")  # fmt: skip
def _batch_ramp(e: Experiment) -> Iterator[str]:
    if e.training.rampup_batch_size is None:
        return
    full = e.training.global_batch_size
    start, increment, _ = e.training.rampup_batch_size
    if start >= full:
        yield (
            f"training.rampup_batch_size starts with {start} samples, not below "
            f"training.global_batch_size = {full}; start lower, or set it to null"
        )
    elif (full - start) % increment:
        yield (
            f"training.rampup_batch_size: {full - start} samples from {start} to "
            f"training.global_batch_size = {full} are no multiple of the increment {increment}; "
            "change one of the three"
        )
    for key, layout in _layouts(e):
        step = e.training.micro_batch_size * layout.data_parallel_size
        if increment % step:  # with it and the full batch, every size between is a multiple
            yield (
                f"training.rampup_batch_size: the increment {increment} is not a multiple of "
                f"{step} (training.micro_batch_size {e.training.micro_batch_size} × "
                f"{key}.data_parallel_size {layout.data_parallel_size}); use one"
            )


@_rule("training.seq_length", "model.max_position_embeddings")
def _sequence_fits(e: Experiment) -> Iterator[str]:
    if e.training.seq_length > e.model.max_position_embeddings:
        yield (
            f"training.seq_length = {e.training.seq_length} exceeds model.max_position_embeddings "
            f"= {e.model.max_position_embeddings}; shorten the sequence or raise the limit"
        )


@_rule("data.train_path", "data.blend")
def _one_source_of_records(e: Experiment) -> Iterator[str]:
    if e.data.train_path and e.data.blend:
        yield (
            "data.train_path and data.blend are both set; records come from the one or from the "
            "parts of the other: set train_path to null, or leave blend empty"
        )


@_rule("data.split")
def _something_to_train_on(e: Experiment) -> Iterator[str]:
    if float(e.data.split.split(",")[0]) == 0:
        yield (
            f"data.split = {e.data.split!r} leaves nothing to train on; "
            'give the first of its three weights more than 0, e.g. "949,50,1"'
        )


@_rule("training.lr", "training.min_lr")
def _learning_rates(e: Experiment) -> Iterator[str]:
    if e.training.min_lr > e.training.lr:
        yield (
            f"training.min_lr = {e.training.min_lr} exceeds training.lr = {e.training.lr}; "
            "the schedule falls from lr to min_lr: lower min_lr or raise lr"
        )


@_rule("training.lr_warmup_iters", "training.lr_warmup_fraction", "training.lr_decay_iters",
       "training.train_iters", "training.global_batch_size",
       "training.rampup_batch_size")  # fmt: skip
def _warm_up(e: Experiment) -> Iterator[str]:
    training = e.training
    if not training.lr_warmup_iters:
        return
    if training.lr_warmup_fraction:
        yield (
            f"training.lr_warmup_iters = {training.lr_warmup_iters} and training.lr_warmup_fraction"
            f" = {training.lr_warmup_fraction} are both set; set one of them to 0"
        )
    elif _ramp_is_sound(training) and training.warmup_samples > training.decay_samples:
        yield (
            f"training.lr_warmup_iters = {training.lr_warmup_iters} is longer than the schedule, "
            f"{training.decay_samples / training.global_batch_size:g} full batches "
            "(training.lr_decay_iters, or train_iters); shorten it"
        )


def _ramp_is_sound(training: TrainingSection) -> bool:
    """Whether steps can be counted; `_batch_ramp` says what is wrong with it."""
    ramp = training.rampup_batch_size
    return ramp is None or ramp[0] + ramp[1] <= training.global_batch_size


@_rule("training.precision", "optimizer.loss_scale", "optimizer.initial_loss_scale",
       "optimizer.min_loss_scale")  # fmt: skip
def _loss_scales(e: Experiment) -> Iterator[str]:
    optimizer = e.optimizer
    if optimizer.loss_scale is not None and e.training.precision != "fp16":
        yield (
            f"optimizer.loss_scale = {optimizer.loss_scale:g} with training.precision = "
            f"{e.training.precision!r}; only fp16 needs its loss scaled: set it to null"
        )
    if optimizer.min_loss_scale > optimizer.initial_loss_scale:
        yield (
            f"optimizer.min_loss_scale = {optimizer.min_loss_scale:g} exceeds "
            f"optimizer.initial_loss_scale = {optimizer.initial_loss_scale:g}; lower it"
        )


@_rule("training.recompute_granularity", "training.auto_recompute_device_memory_mib")
def _one_recompute(e: Experiment) -> Iterator[str]:
    if e.training.recompute_granularity and e.training.auto_recompute_device_memory_mib:
        yield (
            "training.recompute_granularity and training.auto_recompute_device_memory_mib are both "
            "set; the second chooses what to recompute: set one of them to null"
        )


@_rule("training.bad_step_policy", "training.max_restarts", "training.save_interval")
def _rollback_needs_a_checkpoint(e: Experiment) -> Iterator[str]:
    if e.training.bad_step_policy != "rollback":
        return
    if e.training.save_interval is None:
        yield (
            "training.bad_step_policy = 'rollback' needs checkpoints to go back to; set "
            "training.save_interval, or choose stop or skip_batch"
        )
    if e.training.max_restarts == 0:
        yield (
            "training.bad_step_policy = 'rollback' starts the ranks again, and "
            "training.max_restarts = 0 forbids it; set it to at least 1"
        )


@_rule("training.recompute_granularity", "training.recompute_method",
       "training.recompute_num_layers")  # fmt: skip
def _layers_of_full_recompute(e: Experiment) -> Iterator[str]:
    if e.training.recompute_granularity == "full":
        return
    for name in ("recompute_method", "recompute_num_layers"):
        if value := getattr(e.training, name):
            yield (
                f"training.{name} = {value} belongs to training.recompute_granularity: full; set "
                "that, or leave this null"
            )


@_rule("parallel.candidate", "parallel.reference", "model.num_layers",
       "training.recompute_granularity", "training.recompute_method",
       "training.recompute_num_layers")  # fmt: skip
def _recomputed_layers_exist(e: Experiment) -> Iterator[str]:
    number = e.training.recompute_num_layers
    if e.training.recompute_granularity != "full" or number is None:
        return
    for key, layout in _layouts(e):
        stage = e.model.num_layers // layout.pipeline_model_parallel_size
        if number > stage:
            yield (
                f"training.recompute_num_layers = {number} is more than the {stage} layers of a "
                f"pipeline stage of {key}; use 1 to {stage}"
            )
        elif e.training.recompute_method != "block" and stage % number:
            yield (
                f"training.recompute_num_layers = {number} does not divide the {stage} layers of a "
                f"pipeline stage of {key}, as recompute_method: uniform needs; use a divisor of "
                f"{stage}, or recompute_method: block"
            )


@_rule("parallel.reference", "parallel.reference_run")
def _one_reference(e: Experiment) -> Iterator[str]:
    if e.parallel.reference and e.parallel.reference_run:
        yield (
            "parallel.reference and parallel.reference_run are both set; the reference is either "
            "trained here or taken from another run: set one of them to null"
        )


@_rule("data.tokenizer_model", "model.vocab_size")
def _vocabulary_can_be_trained(e: Experiment) -> Iterator[str]:
    if e.data.tokenizer_model is None and e.model.vocab_size < 300:
        yield (
            f"model.vocab_size = {e.model.vocab_size} is too small to train a tokenizer: 3 control "
            "pieces and 256 bytes come first; use at least 300, or give data.tokenizer_model"
        )


@_rule("parallel.environment")
def _known_variables(e: Experiment) -> Iterator[str]:
    table, chosen = variables(), e.parallel.environment
    for name in chosen:
        if name not in table:
            near = nearest(name, table) or f"; known are {', '.join(table)}"
            yield f"parallel.environment.{name}: unknown variable{near}"
    for mistake in mistakes({name: chosen[name] for name in chosen if name in table}):
        yield f"parallel.environment.{mistake}"


@_rule("parallel.environment", "training.deterministic_mode")
def _deterministic_variables(e: Experiment) -> Iterator[str]:
    if not e.training.deterministic_mode:
        return
    for name, value in e.parallel.environment.items():
        deterministic = variables()[name].deterministic if name in variables() else []
        if deterministic and value not in deterministic:
            yield (
                f"parallel.environment.{name} = {value!r} with training.deterministic_mode = true; "
                f"leave it out, or use {' or '.join(deterministic)}"
            )
