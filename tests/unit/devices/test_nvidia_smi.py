"""`nvidia-smi --query-gpu`, as drivers answer and as they do not."""

import re

import pytest
from hypothesis import given, settings, strategies

from internlm_lib.devices.nvidia_smi import parse
from internlm_lib.devices.use import DeviceUse, DeviceUseError

TWO = """\
0, NVIDIA H100 80GB HBM3, 97, 61234, 81559, 652.41, 61
1, NVIDIA H100 80GB HBM3, 0, 1, 81559, 68.90, 29
"""


def test_gpus_are_read() -> None:
    assert parse(TWO) == [
        DeviceUse(0, "NVIDIA H100 80GB HBM3", 97, 61234, 81559, 652.41, 61),
        DeviceUse(1, "NVIDIA H100 80GB HBM3", 0, 1, 81559, 68.9, 29),
    ]


def test_what_a_driver_does_not_tell_is_left_out() -> None:
    """Utilisation with MIG on, memory of a chip that shares the machine's, power of old cards."""
    (gpu,) = parse("3, A, B, [N/A], [Not Supported], [N/A], [Unknown Error], 40\n")
    assert gpu == DeviceUse(3, "A, B", None, None, None, None, 40)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no GPU"),
        ("No devices were found\n", "7 fields asked for; it says: No devices were found"),
        ("0, H100, 1, 2\n", "7 fields"),
        ("0, H100, 1 %, 2, 3, 4, 5\n", "'1 %' is not a number"),
        ("-1, H100, 1, 2, 3, 4, 5\n", "'-1' is not a number"),
        ("0, H100, nan, 2, 3, 4, 5\n", "'nan' is not a number"),
    ],
)
def test_another_answer_is_an_error(text: str, said: str) -> None:
    with pytest.raises(DeviceUseError, match=re.escape(said)):
        parse(text)


@settings(max_examples=200, deadline=None)
@given(strategies.floats(0, 1), strategies.integers(0, 40), strategies.text())
def test_damage_is_an_error_of_its_own_or_gpus(place: float, length: int, instead: str) -> None:
    begin = int(place * len(TWO))
    try:
        gpus = parse(TWO[:begin] + instead + TWO[begin + length :])
    except DeviceUseError:
        return
    assert gpus and all(gpu.index >= 0 for gpu in gpus)
