"""`npu-smi info` as it was recorded, from 21.0 to 26.0, and damaged: nothing else is raised than
the parser's own error."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings, strategies

from internlm_lib.devices.npu_smi import parse
from internlm_lib.devices.use import DeviceUse, DeviceUseError

RECORDED = {path.stem: path for path in sorted(Path(__file__).with_name("npu_smi").glob("*.txt"))}

CHIPS = {
    "310_21.0.3": [DeviceUse(0, "310", 0, 5324, 8192, 12.8, 58, "OK")],
    "310p3_24.1": [
        DeviceUse(0, "310P3", 0, 1397, 44280, None, 59, "OK"),
        DeviceUse(1, "310P3", 0, 1520, 43693, None, 58, "OK"),
    ],
    "910a_21.0.2": [
        DeviceUse(1, "910A", 0, 0, 32768, 64.3, 56, "OK"),
        DeviceUse(4, "910A", 0, 0, 32768, 65.6, 58, "OK"),
    ],
    "910b_22.0.4": [DeviceUse(0, "910B", 0, 0, 32768, 79.4, 82, "OK")],
    "910b3_23.0.1": [DeviceUse(4, "910B3", 0, 3161, 65536, 93.6, 40, "OK")],
    "910b1_24.1": [
        DeviceUse(0, "910B1", 0, 3405, 65536, 101.0, 49, "OK"),
        DeviceUse(1, "910B1", 0, 64233, 65536, 98.3, 48, "OK"),
        DeviceUse(2, "910B1", 0, 64231, 65536, 101.6, 48, "OK"),
        DeviceUse(3, "910B1", 0, 3395, 65536, 94.6, 48, "OK"),
        DeviceUse(4, "910B1", 0, 3395, 65536, 96.9, 48, "OK"),
        DeviceUse(5, "910B1", 0, 3394, 65536, 96.8, 48, "OK"),
        DeviceUse(6, "910B1", 0, 3378, 65536, 102.6, 48, "OK"),
        DeviceUse(7, "910B1", 0, 3379, 65536, 96.6, 48, "OK"),
    ],
    "910prob_24.1": [
        DeviceUse(0, "910ProB", 0, 18, 32768, 78.0, 38, "OK"),
        DeviceUse(1, "910ProB", 0, 8, 32768, 75.8, 38, "OK"),
    ],
    "910c1_24.1": [
        DeviceUse(0, "910C1", 0, 56844, 65536, 198.7, 43, "OK"),
        DeviceUse(1, "910C1", 0, 56523, 65536, None, 43, "OK"),
    ],
    "910b2c_25.0": [
        DeviceUse(0, "910B2C", 6, 35738, 65536, 118.6, 47, "OK"),
        DeviceUse(1, "910B2C", 11, 35761, 65536, 143.2, 49, "OK"),
    ],
    "ascend950dt_25.6": [
        DeviceUse(0, "Ascend950DT", 0, 4765, 98304, 398.6, 46, "OK"),
        DeviceUse(1, "Ascend950DT", 0, 4764, 98304, 401.0, 51, "OK"),
        DeviceUse(7, "Ascend950DT", 42, 91000, 98304, 397.5, 61, "Warning"),
    ],
    "ascend950pr_25.7": [
        DeviceUse(0, "Ascend950PR", 7, 5249, 131072, 207.6, 65, "Alarm"),
        DeviceUse(3, "Ascend950PR", 0, 5255, 131072, 191.3, 56, "OK"),
    ],
    "ascend910_26.0": [
        DeviceUse(0, "Ascend910", 100, 59807, 65536, 204.0, 43, "OK"),
        DeviceUse(1, "Ascend910", 60, 59536, 65536, None, 40, "OK"),
        DeviceUse(10, "Ascend910", 0, 3140, 65536, 159.6, 39, "OK"),
        DeviceUse(11, "Ascend910", 0, 2882, 65536, None, 40, "OK"),
    ],
}


def recorded(name: str) -> str:
    """What the tool printed, without where it is from."""
    return re.sub(r"^#.*\n", "", RECORDED[name].read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_every_recording_names_its_source() -> None:
    assert set(RECORDED) == {*CHIPS, "no_driver"}
    for path in RECORDED.values():
        assert path.read_text(encoding="utf-8").startswith("# source: ")


@pytest.mark.parametrize("name", CHIPS)
def test_chips_are_read_as_recorded(name: str) -> None:
    assert parse(recorded(name)) == CHIPS[name]


@pytest.mark.parametrize("name", CHIPS)
def test_what_is_printed_around_the_table_does_not_matter(name: str) -> None:
    text = "DrvMngGetConsoleLogLevel failed. (g_conLogLevel=3)\n" + recorded(name) + "\n$ \n"
    assert parse(text.replace("\n", "\r\n")) == CHIPS[name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: recorded("no_driver"), "dcmi module initialize failed. ret is -8005"),
        (lambda text: "", "there is no table of chips"),
        (lambda text: text.replace("Bus-Id", "Bus"), "head of the table is not known"),
        (lambda text: text.replace("AICore(%)", "Load(%)  "), "no utilisation"),
        (lambda text: text.replace("| 0                         | 0000:02", "| 0000:02"), "cells"),
        (lambda text: text.replace("| 98.3        48 ", "| 98.3           "), "does not fit"),
        (lambda text: text.replace("98.3", "9e99"), "'9e99' is not a number"),
        (lambda text: text.replace("| 7     910B1", "| 6     910B1"), "the same number"),
        (lambda text: text[: text.index("| 0                         | 0000:42")], "cut off"),
        (lambda text: text[: text.index("| 0     910B1")], "empty"),
    ],
)
def test_an_unknown_answer_says_what_is_wrong_and_how_it_begins(
    change: Callable[[str], str], said: str
) -> None:
    text = change(recorded("910b1_24.1"))
    with pytest.raises(DeviceUseError, match=re.escape(said)) as error:
        parse(text)
    assert " ".join(text.split())[:60] in str(error.value)


TEXTS = [recorded(name) for name in CHIPS]
ALPHABET = strategies.sampled_from("|+=- \n/.0123456789ANCeEpx%()\x00\u0663")


@settings(max_examples=300, deadline=None)
@given(
    text=strategies.sampled_from(TEXTS),
    damage=strategies.lists(
        strategies.tuples(
            strategies.floats(0, 1), strategies.integers(0, 200), strategies.text(ALPHABET)
        ),
        max_size=4,
    ),
)
@example(text="| Health |\n| Bus-Id |", damage=[])
@example(text="|", damage=[])
def test_damage_is_an_error_of_its_own_or_chips(
    text: str, damage: list[tuple[float, int, str]]
) -> None:
    for place, length, instead in damage:
        begin = int(place * len(text))
        text = text[:begin] + instead + text[begin + length :]
    try:
        chips = parse(text)
    except DeviceUseError:
        return
    assert chips and len({chip.index for chip in chips}) == len(chips)
    for chip in chips:
        for value in (chip.utilization_percent, chip.memory_used_mib, chip.memory_total_mib,
                      chip.power_watts, chip.temperature_celsius):  # fmt: skip
            assert value is None or 0 <= value < 1e9
