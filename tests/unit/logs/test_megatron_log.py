"""AscendSpeed, MindSpeed-LLM and Megatron-LM."""

import math

import pytest

from internlm_lib.errors import InputError
from internlm_lib.logs.facts import Facts


def numbers(log):
    return [step["step"] for step in log.step]


def test_an_ascendspeed_line_gives_all_its_numbers(read, shape):
    (step,) = read(shape.dump("AscendSpeed Arguments") + shape.ascendspeed(3, loss=10.71234)).step
    assert step == {
        "event": "step", "time": None, "step": 3, "loss": 10.71234, "consumed_samples": 768,
        "consumed_tokens": 1572864, "step_seconds": 20.0, "lr": 1.406e-07,
        "global_batch_size": 256, "loss_scale": 1.0, "grad_norm": 12.345, "skipped": 0,
        "nan_iterations": 0, "logged_samples_per_second": 12.8,
        "logged_tflops_per_device": 145.75,
        "tokens_per_second_per_device": 256 * 2048 / 20.0 / 16,
    }  # fmt: skip


def test_a_new_line_has_a_time_and_a_throughput(read, shape):
    (step,) = read(shape.megatron(7, loss=2.5, stamp="10:00:01")).step
    assert (step["step"], step["loss"], step["time"]) == (7, 2.5, 1714557601.0)
    assert step["logged_tflops_per_device"] == 121.5
    assert step["skipped"] == 1
    assert "consumed_tokens" not in step and "tokens_per_second_per_device" not in step


def test_the_arguments_say_what_the_training_is(read, shape):
    (start,) = read("torch_npu 2.1\n" + shape.dump() + shape.ascendspeed(1)).start
    assert start["engine"] == "AscendSpeed / Megatron log"
    assert start["layout"] == "megatron TP4 PP2 DP2 SP"
    assert (start["world_size"], start["precision"], start["train_iters"]) == (16, "bf16", 500)
    assert (start["seq_length"], start["tokens_per_step"]) == (2048, 256 * 2048)
    assert (start["role"], start["first_step"], start["imported"]) == ("candidate", 1, True)
    assert start["model"]["num_layers"] == 32 and start["model"]["vocab_size"] is None
    assert start["arguments"]["params_dtype"] == "torch.bfloat16"
    assert start["source"] == "train.log" and len(start["tags"]["log_sha256"]) == 64
    # Told above the arguments.
    assert start["device"] == "npu"


def test_without_arguments_nothing_is_made_up(read, shape):
    (start,) = read(shape.ascendspeed(5)).start
    assert start["layout"] == "unknown layout" and start["device"] == "unknown"
    for key in ("world_size", "precision", "parameters", "device_name"):
        assert start[key] is None
    assert start["tokens_per_step"] == 256 * 2048  # the line's own
    assert start["train_iters"] == 500


def test_programs_are_named(read, shape):
    named = {
        read(shape.dump("AscendSpeed Arguments") + shape.ascendspeed(1)).start[0]["engine"],
        read("import mindspeed\n" + shape.megatron(1)).start[0]["engine"],
    }
    assert named == {"AscendSpeed log", "MindSpeed-LLM log"}


def test_a_loss_that_is_left_out_is_nan_and_the_step_stays(read, shape):
    log = read("".join(shape.ascendspeed(n, loss=0.0 if n == 2 else 5.0) for n in (1, 2, 3)))
    assert numbers(log) == [1, 2, 3]
    assert [math.isnan(step["loss"]) for step in log.step] == [False, True, False]
    assert log.summary["missing_losses"] == 1


def test_a_loss_that_is_printed_as_nan_is_nan(read, shape):
    log = read(shape.megatron(1).replace("2.500000E+00", "NAN"))
    assert math.isnan(log.step[0]["loss"]) and log.summary["missing_losses"] == 1


@pytest.mark.parametrize(
    "prefix",
    ["[rank3]:", "[default7]:", "7: ", "[1,0]<stdout>:", "2024-05-01T08:00:00.123456789Z ",
     " 10%|█         | 1/10 [00:01<00:09,  1.0s/it]", "\x1b[32m", "noise\r", "node3 | "],
)  # fmt: skip
def test_prefixes_of_launchers_and_progress_bars(read, shape, prefix):
    log = read("".join(prefix + shape.ascendspeed(n) for n in (1, 2)) + prefix + shape.megatron(3))
    assert numbers(log) == [1, 2, 3]
    assert log.step[2]["time"] == 1714557600.0  # the line's own, not the container's


def test_a_containers_time_stamp_counts_where_the_line_has_none(read, shape):
    log = read("2024-05-01T10:00:00.5+08:00 " + shape.ascendspeed(1))
    assert log.step[0]["time"] == 1714557600.5 - 8 * 3600


def test_two_steps_glued_together_are_two(read, shape):
    log = read(shape.ascendspeed(1) + shape.ascendspeed(2).strip() + shape.ascendspeed(3))
    assert numbers(log) == [1, 2, 3]
    assert log.summary["lines"] == log.summary["understood"] == 2


def test_a_line_cut_by_another_gives_no_half_number(read, shape):
    cut = shape.ascendspeed(2)
    cut = cut[: cut.index("lm loss") + len("lm loss: 1.0")] + "WARNING: slow\n"
    log = read(shape.ascendspeed(1) + cut)
    assert log.step[1]["step"] == 2 and math.isnan(log.step[1]["loss"])


def test_held_out_losses_and_checkpoints(read, shape):
    ruler = "-" * 80 + "\n"
    log = read(
        shape.ascendspeed(1)
        + ruler
        + " validation loss at iteration 1 | lm loss value: 9.5E+00 | lm loss PPL: 1.3E+04 | \n"
        + ruler
        + "saving checkpoint at iteration       1 to ckpt\n"
        + "  successfully saved checkpoint at iteration       1 to ckpt\n"
        + shape.ascendspeed(2)
        + shape.ascendspeed(3)
        + "[after training is done] datetime: 2024-05-01 10:00:00 \n"
        + " validation loss at the end of training for val data | lm loss value: 8.5E+00 | "
        "lm loss PPL: 4.9E+03 | \n"
        + " validation loss at iteration 3 on test set | lm loss value: 8.0E+00 | "
        "lm loss PPL: 2.9E+03 | \n"
    )
    assert [(e["step"], e["loss"]) for e in log.validation] == [(1, 9.5), (3, 8.5)]
    assert [(e["step"], e["loss"]) for e in log.test] == [(3, 8.0)]
    assert [e["step"] for e in log.checkpoint] == [1]
    assert [step.get("includes") for step in log.step] == [
        None,
        ["checkpoint", "validation"],
        None,
    ]
    assert (log.end[0]["status"], log.end[0]["time"]) == ("done", 1714557600.0)
    assert [e["event"] for e in log.events][-2:] == ["end", "import"]


def test_a_log_that_breaks_off_ends_stopped(read, shape):
    assert read(shape.ascendspeed(1, total=2)).end[0]["status"] == "stopped"
    assert read(shape.ascendspeed(2, total=2)).end[0]["status"] == "done"


def test_intervals_are_told(read, shape):
    log = read(shape.dump(log_interval="10") + shape.ascendspeed(10) + shape.ascendspeed(20))
    assert [step["log_interval"] for step in log.step] == [10, 10]
    assert log.start[0]["first_step"] == 1
    log = read(shape.ascendspeed(10) + shape.ascendspeed(15) + shape.ascendspeed(16))
    assert [step.get("log_interval") for step in log.step] == [None, 5, None]


def test_a_curriculums_length_counts(read, shape):
    line = shape.ascendspeed(2, **{"actual seqlen": " 1024"})
    step = read(shape.dump() + shape.ascendspeed(1) + line).step[1]
    assert step["seq_length"] == 1024
    assert step["tokens_per_second_per_device"] == 256 * 1024 / 20.0 / 16


def test_parameters_are_summed_where_ranks_hold_no_copies(read, shape):
    lines = "".join(
        f" > number of parameters on (tensor, pipeline) model parallel rank (0, {stage}): {n}\n"
        for stage, n in enumerate((500, 600))
    )
    untied = {"untie_embeddings_and_output_weights": "True", "tensor_model_parallel_size": "1"}

    def parameters(text, **arguments):
        return read(shape.dump(**arguments) + text + shape.ascendspeed(1)).start[0]["parameters"]

    assert parameters(lines, **untied) == 1100
    assert parameters(lines) is None  # four tensor parallel ranks each hold the norms
    assert parameters(lines.splitlines()[0] + "\n", **untied) is None


def test_memory_goes_to_the_next_step(read, shape):
    memory = "[Rank 0] (after 1 iterations) memory (MB) | allocated: 1.0 | max allocated: 2.5 | \n"
    log = read(shape.ascendspeed(1) + memory + shape.ascendspeed(2))
    assert [step.get("memory_bytes") for step in log.step] == [None, 5 << 19]


def test_what_is_known_is_ignored_by_kind_and_the_rest_is_shown(read, shape):
    log = read(
        "time (ms) | forward-compute: 1.0\n\n 50%|##   | 1/2\n> building datasets\nwhat is this?\n"
        + shape.ascendspeed(1)
    )
    assert log.summary["ignored"] == {
        "timing": 1, "blank": 1, "progress bar": 1, "start-up message": 1,
    }  # fmt: skip
    assert log.summary["unknown_examples"] == [{"line": 5, "text": "what is this?"}]


def test_given_facts_fill_what_the_log_lacks(read, shape):
    facts = Facts(devices=64, device="npu", device_name="Ascend 910B3", model="internlm-7b")
    log = read(shape.ascendspeed(1), facts=facts)
    start = log.start[0]
    assert (start["world_size"], start["device"]) == (64, "npu")
    assert start["device_name"] == "Ascend 910B3"
    assert start["model"]["preset"] == "internlm-7b" and start["model"]["hidden_size"] == 4096
    assert log.step[0]["tokens_per_second_per_device"] == 256 * 2048 / 20.0 / 64


def test_contradictions_are_refused_all_at_once(read, shape):
    facts = Facts(seq_length=4096, devices=8, precision="fp16", model="internlm-65b")
    with pytest.raises(InputError) as caught:
        read(shape.dump() + shape.ascendspeed(1), facts=facts)
    for said in ("--seq-length 4096, but the log says 2048", "--devices 8, but the log says 16",
                 "--precision fp16", "internlm-65b has num_layers 80"):  # fmt: skip
        assert said in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"device": "tpu"}, {"precision": "int8"}, {"model": "gpt2"}, {"devices": 0}]
)
def test_facts_that_are_not_allowed(wrong):
    with pytest.raises(InputError, match=f"--{next(iter(wrong))}"):
        Facts(**wrong)
