"""Files as they are found: packed, torn, coloured, mixed up. Nothing but InputError is raised."""

import gzip
import random

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from internlm_lib.errors import InputError
from internlm_lib.logs import lines as log_lines
from internlm_lib.logs.lines import LogLines


def is_balanced(summary):
    """Whether every line is counted exactly once."""
    parts = ("understood", "unknown", "duplicates")
    counted = sum(summary[part] for part in parts) + sum(summary["ignored"].values())
    return summary["lines"] == counted


def test_line_ends_of_all_kinds_at_any_block_border(tmp_path, monkeypatch):
    path = tmp_path / "log"
    path.write_bytes(b"a\r\nb\rc\n\n\x1b[1;31md\x1b[0m\r\n\x1b]0;title\x07e")
    for block in range(1, 20):
        monkeypatch.setattr(log_lines, "_BLOCK", block)
        lines = LogLines(path)
        if block > 1:  # a block of one byte cuts what ends a line from what follows it
            assert list(lines) == ["a", "b", "c", "", "d", "e"]
            assert lines.torn


def test_a_line_without_end_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"x" * (5 << 20))
    assert max(map(len, LogLines(path))) <= log_lines._BLOCK + log_lines.LONGEST


def test_gzip_is_known_by_its_bytes(read, shape):
    whole = shape.dump() + "".join(shape.ascendspeed(n) for n in range(1, 400))
    packed = gzip.compress(whole.encode())
    assert len(read(packed).step) == 399
    log = read(packed[: len(packed) * 3 // 4])
    assert 100 < len(log.step) < 399
    assert "end-of-stream" in log.summary["damage"]
    assert is_balanced(log.summary)


def test_a_torn_last_line_gives_no_step(read, shape):
    torn = shape.ascendspeed(2)
    log = read(shape.ascendspeed(1) + torn[: torn.index(" | loss scale")])
    assert [step["step"] for step in log.step] == [1]
    assert log.summary["torn_last_line"] and log.summary["unknown"] == 1
    log = read(shape.ascendspeed(1) + torn.rstrip("\n"))  # whole: its last bar is there
    assert [step["step"] for step in log.step] == [1, 2]
    assert not log.summary["torn_last_line"]


def test_undecodable_bytes_are_shown_replaced(read, shape):
    log = read(b"\xff\xfe??\n" + shape.ascendspeed(1).encode())
    assert log.summary["unknown_examples"] == [{"line": 1, "text": "\ufffd\ufffd??"}]


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"no metrics here\n", b"{}", b"\x1f\x8b", b"\0" * 99]
)
def test_a_file_without_metrics_is_refused(read, content):
    with pytest.raises(InputError, match="no metric line found; tried: megatron, internevo"):
        read(content)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    from internlm_lib.logs.read import read_log

    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="no such log file"):
            next(read_log(path))


def test_a_wrong_format_is_told(read, shape):
    with pytest.raises(InputError, match="It looks like --format megatron"):
        read(shape.ascendspeed(1), format="internevo")
    with pytest.raises(InputError, match="It looks like --format megatron"):
        read(shape.ascendspeed(1), format="huggingface")
    with pytest.raises(InputError, match="allowed are auto, megatron"):
        read(shape.ascendspeed(1), format="csv")


def test_hostile_lines_take_no_time(read, shape):
    traps = (
        "validation loss at |",
        "iteration 1/",
        "\x1b]",
        "rank (0, ",
        "tflops=a step=",
        "-",
        "-------- arguments ",
    )
    text = "".join(trap * (60_000 // len(trap)) + "\n" for trap in traps)
    assert len(read(text + shape.ascendspeed(1)).step) == 1


def damaged(log, chance):
    """A copy of a log with one to eight faults of the kinds that logs have."""
    lines = log.split(b"\n")
    for _ in range(chance.randint(1, 8)):
        kind, at = chance.randrange(6), chance.randrange(len(lines))
        line = lines[at]
        place = chance.randrange(len(line) + 1)
        if kind == 0:  # a byte turned over
            lines[at] = line[:place] + bytes([chance.randrange(256)]) + line[place + 1 :]
        elif kind == 1:  # another process's output in the middle
            lines[at] = line[:place] + chance.choice(lines) + line[place:]
        elif kind == 2:
            lines[at] = line[:place]
        elif kind == 3:  # written again, later or earlier
            lines.insert(chance.randrange(len(lines)), line)
        elif kind == 4:  # a line end lost
            lines[at : at + 2] = [b"".join(lines[at : at + 2])]
        else:
            lines[at] = line[place:] + b"\r" + line[:place]
    text = b"\n".join(lines)
    return text[: chance.randrange(len(text))] if chance.random() < 0.3 else text


@pytest.fixture
def whole(shape):
    """A log of everything: two starts of two programs, other ranks, a validation, InternEvo."""
    internevo = "".join(
        f"2024-03-27 17:03:42,500\tINFO t.py:5 in record_current_batch_training_metrics -- "
        f"tflops=1.0 step={n} loss=2.5 tgs (tokens/gpu/second)=100.0 lr=1e-05 "
        f"grad_norm={{'0_default': 1.0, '1_fp32': 0.0}} num_consumed_tokens={n + 1}000 \n"
        for n in range(5)
    )
    text = (
        shape.dump() + "".join(shape.ascendspeed(n) for n in range(1, 6))
        + " validation loss at iteration 5 | lm loss value: 9E+00 | lm loss PPL: 1E+04 | \n"
        + shape.dump() + "".join(f"[rank7]:{shape.megatron(n)}" for n in range(4, 9))
        + "[after training is done] datetime: 2024-05-01 10:00:00 \n" + internevo
    )  # fmt: skip
    return text.encode()


def steps_of(read, content):
    """Number of steps found; every line must be counted, and nothing but InputError raised."""
    try:
        log = read(content)
    except InputError:
        return 0
    assert is_balanced(log.summary)
    assert log.events[0]["event"] == "start" and log.events[-1]["event"] == "import"
    return len(log.step)


anywhere = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@anywhere
@given(chance=strategies.randoms(use_true_random=False))
def test_damage_raises_nothing_else_and_every_line_is_counted(read, whole, chance):
    steps_of(read, damaged(whole, chance))


@anywhere
@given(noise=strategies.binary(max_size=200), place=strategies.integers(0, 2000))
def test_noise_between_lines_costs_at_most_a_line(read, whole, noise, place):
    lines = whole.split(b"\n")
    lines.insert(place % len(lines), noise.replace(b"\x1b", b""))
    assert steps_of(read, b"\n".join(lines)) >= steps_of(read, whole) - 1


def test_most_of_a_damaged_log_is_understood(read, whole):
    found = [steps_of(read, damaged(whole, random.Random(seed))) for seed in range(100)]
    assert sum(count > 0 for count in found) > 85
