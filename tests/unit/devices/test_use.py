"""Tools that answer, fail, hang and are not there."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from internlm_lib.devices import npu_smi, nvidia_smi, use
from internlm_lib.devices.use import DeviceUseError, answer_of

Tool = Callable[[str, str], None]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Puts a shell script into the only folder where commands are looked for, but the system's."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def put(name: str, script: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return put


def test_a_tool_is_asked_in_plain_english(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    monkeypatch.setenv("KEPT", "here")
    tool("npu-smi", 'echo "$*|$LC_ALL|$LANG|$KEPT"; cat')  # and nobody can type an answer
    assert answer_of("npu-smi", "info") == "info|C|C|here\n"


def test_bytes_that_are_no_text_do_not_matter(tool: Tool) -> None:
    tool("npu-smi", r"printf '\377 ok'")
    assert answer_of("npu-smi").endswith(" ok")


def test_a_failure_says_what_the_tool_said(tool: Tool) -> None:
    tool("npu-smi", "echo 'dcmi module initialize failed. ret is -8005'; exit 8")
    with pytest.raises(DeviceUseError, match="npu-smi info: exit code 8: dcmi .* -8005"):
        npu_smi.sample()
    tool("nvidia-smi", "echo 'driver/library version mismatch' >&2; exit 18")
    with pytest.raises(DeviceUseError, match="exit code 18: driver/library version mismatch"):
        nvidia_smi.sample()


def test_a_tool_that_is_not_there_or_may_not_be_run(tool: Tool, tmp_path: Path) -> None:
    with pytest.raises(DeviceUseError, match="npu-smi: No such file"):
        npu_smi.sample()
    tool("npu-smi", "")
    (tmp_path / "npu-smi").chmod(0o644)
    with pytest.raises(DeviceUseError, match="npu-smi: Permission denied"):
        npu_smi.sample()


def test_a_tool_that_hangs_is_given_up(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use, "SECONDS_TO_ANSWER", 0.3)
    tool("npu-smi", "exec sleep 60")
    begin = time.monotonic()
    with pytest.raises(DeviceUseError, match="npu-smi: no answer within 0.3 s"):
        npu_smi.sample()
    assert time.monotonic() - begin < 10


def test_gpus_are_asked_for_by_name(tool: Tool) -> None:
    tool(
        "nvidia-smi",
        '[ "$1" = --query-gpu=index,name,utilization.gpu,memory.used,memory.total,power.draw,'
        'temperature.gpu ] && [ "$2" = --format=csv,noheader,nounits ] && '
        "echo '0, NVIDIA A100, 5, 6, 7, 8, 9'",
    )
    (gpu,) = nvidia_smi.sample()
    assert (gpu.name, gpu.temperature_celsius) == ("NVIDIA A100", 9)


@pytest.mark.parametrize("text", ["", "-1", "1e3", "inf", "nan", "1.", "9" * 400, "\u0663"])
def test_what_no_tool_prints_is_no_number(text: str) -> None:
    assert use.number("0") == 0 and use.number("65536") == 65536 and use.number("12.8") == 12.8
    with pytest.raises(DeviceUseError, match="is not a number"):
        use.number(text)
