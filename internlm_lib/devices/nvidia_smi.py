"""`nvidia-smi --query-gpu`: one line of CSV per GPU."""

from internlm_lib.devices.use import DeviceUse, DeviceUseError, answer_of, beginning, number

_FIELDS = (
    "index", "name", "utilization.gpu", "memory.used", "memory.total", "power.draw",
    "temperature.gpu",
)  # fmt: skip
"""Percent, MiB, watts and degrees Celsius. Source: `nvidia-smi --help-query-gpu`."""


def sample() -> list[DeviceUse]:
    """All GPUs of this node. Raises DeviceUseError."""
    query = f"--query-gpu={','.join(_FIELDS)}"
    return parse(answer_of("nvidia-smi", query, "--format=csv,noheader,nounits"))


def parse(text: str) -> list[DeviceUse]:
    """The GPUs in the answer of `sample`'s command. Raises DeviceUseError if it is none."""
    try:
        gpus = [_gpu(line) for line in text.splitlines() if line.strip()]
        if not gpus:
            raise DeviceUseError("no GPU")
    except DeviceUseError as error:
        raise DeviceUseError(f"nvidia-smi: {error}; it says: {beginning(text)}") from error
    return gpus


def _gpu(line: str) -> DeviceUse:
    index, _, rest = line.partition(",")
    name, *values = rest.rsplit(",", len(_FIELDS) - 2)
    if len(values) != len(_FIELDS) - 2:
        raise DeviceUseError(f"a line has not the {len(_FIELDS)} fields asked for")
    utilization, used, total, power, temperature = map(_told, values)
    return DeviceUse(
        index=int(number(index.strip())),
        name=name.strip(),
        utilization_percent=utilization,
        memory_used_mib=used,
        memory_total_mib=total,
        power_watts=power,
        temperature_celsius=temperature,
    )


def _told(text: str) -> float | None:
    """What the driver does not tell stands in brackets: `[N/A]`, `[Not Supported]` …"""
    text = text.strip()
    return None if text.startswith("[") and text.endswith("]") else number(text)
