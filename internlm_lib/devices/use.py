"""What a node's devices are doing, as the tool of their driver tells it; torch is not needed."""

import os
import re
import subprocess
from dataclasses import dataclass

from internlm_lib.errors import KitError

SECONDS_TO_ANSWER = 10.0
"""How long a tool may take; npu-smi asks 16 chips one after the other."""
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


class DeviceUseError(KitError):
    """A tool is missing, fails, or answers in a format that is not known."""


@dataclass(frozen=True)
class DeviceUse:
    """One device at one moment; None where the tool does not tell."""

    index: int
    """The tool's number; torch's is another where only some devices are visible to it."""
    name: str
    """The tool's, e.g. `910B3`; torch_npu says `Ascend910B3`."""
    utilization_percent: float | None
    """Share of the time in which the device computed anything; no measure of how well it did."""
    memory_used_mib: float | None
    """Of all processes, the driver's own part included."""
    memory_total_mib: float | None
    power_watts: float | None
    temperature_celsius: float | None
    health: str | None = None
    """The tool's word, `OK` if it is well."""


def answer_of(*command: str) -> str:
    """What a tool prints. Raises DeviceUseError.

    It may outlive this process if that is killed, for as long as it takes to answer. In a session
    of its own it does not get the terminal's Ctrl-C, which is meant for the training.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS_TO_ANSWER,
            env={**os.environ, "LC_ALL": "C", "LANG": "C"},
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise DeviceUseError(f"{command[0]}: no answer within {SECONDS_TO_ANSWER:g} s") from error
    except OSError as error:
        raise DeviceUseError(f"{command[0]}: {error.strerror or error}") from error
    if done.returncode:
        said = beginning(done.stderr) or beginning(done.stdout)
        raise DeviceUseError(f"{' '.join(command)}: exit code {done.returncode}: {said}")
    return done.stdout


def number(text: str) -> float:
    """A number as the tools print it. Raises DeviceUseError."""
    if not _NUMBER.fullmatch(text):
        raise DeviceUseError(f"{text[:40]!r} is not a number")
    return float(text)


def beginning(text: str) -> str:
    """The first words of an answer, in one line, for messages."""
    return " ".join(text.split())[:200]
