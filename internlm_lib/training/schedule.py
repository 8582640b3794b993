"""Learning rate over steps, as Megatron-LM's OptimizerParamScheduler computes it."""

import math

from internlm_lib.experiment.schema import TrainingSection


def learning_rate(training: TrainingSection, step: int, skipped_samples: int = 0) -> float:
    """Learning rate of optimizer step `step`, counted from 1.

    The schedule counts samples, so that a small step of a batch ramp-up moves it less. As in
    Megatron-LM the first step of a warm-up has rate 0 (its counter is at 0 then), and after
    `lr_decay_iters` the rate stays at `min_lr`. Source: megatron/core/optimizer_param_scheduler.py.

    Args:
        skipped_samples: of earlier steps whose update was skipped (fp16 overflows): they have
            consumed their samples, but not moved the schedule.
    """
    done = training.samples_before(step) - skipped_samples
    warmup, decay = training.warmup_samples, training.decay_samples
    if warmup and done <= warmup:
        return training.lr * done / warmup
    if training.lr_decay_style == "constant":
        return training.lr
    if done > decay:
        return training.min_lr
    ratio = (done - warmup) / (decay - warmup)
    linear = training.lr_decay_style == "linear"
    share = 1.0 - ratio if linear else 0.5 * (math.cos(math.pi * ratio) + 1.0)
    return training.min_lr + share * (training.lr - training.min_lr)
