"""Logs written after the published formats, and what is read of them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from internlm_lib.logs.read import read_log

ARGUMENTS = {
    "bf16": "True", "global_batch_size": "256", "hidden_size": "4096", "num_layers": "32",
    "params_dtype": "torch.bfloat16", "pipeline_model_parallel_size": "2",
    "seq_length": "2048", "sequence_parallel": "True", "tensor_model_parallel_size": "4",
    "train_iters": "500", "world_size": "16",
}  # fmt: skip


def ascendspeed(step: int, loss: float | None = None, total: int = 500, **other: str) -> str:
    """A line of AscendSpeed's `training_log`; a loss that is not above 0 leaves its field out."""
    loss = 11.0 - step / 100 if loss is None else loss
    fields = {
        "consumed samples": f"{step * 256:12d}",
        "consumed tokens": f"{step * 256 * 2048:12d}",
        "elapsed time per iteration (ms)": "20000.0",
        "learning rate": f"{step * 4.6875e-8:.3E}",
        "global batch size": "  256",
        **({"lm loss": f"{loss:.6E}"} if loss > 0 else {}),
        "loss scale": "1.0",
        "grad norm": "12.345",
        "actual seqlen": " 2048",
        "number of skipped iterations": "  0",
        "number of nan iterations": "  0",
        "samples per second": "12.800",
        "TFLOPs": "145.75",
        **other,
    }
    shown = " | ".join(f"{name}: {value}" for name, value in fields.items())
    return f" iteration {step:8d}/{total:8d} | {shown} |\n"


def megatron(step: int, loss: float = 2.5, total: int = 500, stamp: str = "10:00:00") -> str:
    """A line of Megatron-LM from 2024 on."""
    return (
        f" [2024-05-01 {stamp}] iteration {step:8d}/{total:8d} | "
        f"consumed samples: {step * 64:12d} | elapsed time per iteration (ms): 5900.0 | "
        f"throughput per GPU (TFLOP/s/GPU): 121.5 | learning rate: 1.250000E-06 | "
        f"global batch size:    64 | lm loss: {loss:.6E} | loss scale: 1.0 | grad norm: 1.234 | "
        "number of skipped iterations:   1 | number of nan iterations:   0 |\n"
    )


def dump(title: str = "arguments", **changed: str) -> str:
    """The arguments as `print_args` frames them."""
    lines = (f"  {k} {'.' * (48 - len(k))} {v}" for k, v in (ARGUMENTS | changed).items())
    return "\n".join(
        [f"{'-' * 24} {title} {'-' * 24}", *lines, f"{'-' * 20} end of {title} {'-' * 21}", ""]
    )


@pytest.fixture
def shape() -> SimpleNamespace:
    """Writers of log lines."""
    return SimpleNamespace(ascendspeed=ascendspeed, megatron=megatron, dump=dump)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """Reads text or bytes as a log; gives the events, also by kind."""

    def events_of(content: str | bytes, **options: object) -> SimpleNamespace:
        path = tmp_path / "train.log"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        events = list(read_log(path, **options))
        found = {
            kind: [event for event in events if event["event"] == kind]
            for kind in ("start", "step", "validation", "test", "checkpoint", "end")
        }
        return SimpleNamespace(path=path, events=events, summary=events[-1], **found)

    return events_of
