"""How large the selftest's work is: on an accelerator as InternLM-7B's, on a CPU for seconds."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MIB = 1 << 20


@dataclass(frozen=True)
class Sizes:
    positions: int
    """Of the kernels' sequences."""
    heads: int
    head_dim: int
    ffn: int
    dtypes: "tuple[torch.dtype, ...]"
    """That trainings on this device use."""
    matrix: int
    """Rows and columns of the matrix product that is timed."""
    copied_bytes: int
    """Of a copy that is timed."""
    exchanged_bytes: int
    """What every rank puts into a collective that is timed."""


def sizes_of(device: str) -> Sizes:
    """Of `cpu`, `cuda` or `npu`."""
    import torch

    if device == "cpu":
        return Sizes(
            positions=96, heads=4, head_dim=128, ffn=1376, dtypes=(torch.float32, torch.bfloat16),
            matrix=1024, copied_bytes=256 * MIB, exchanged_bytes=4 * MIB,
        )  # fmt: skip
    return Sizes(
        # More keys than the compressed mask of NPUs is wide would show nothing new: it is the same.
        positions=512, heads=32, head_dim=128, ffn=11008,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        matrix=8192, copied_bytes=1024 * MIB, exchanged_bytes=64 * MIB,
    )  # fmt: skip


def dtype_name(dtype: "torch.dtype") -> str:
    """As `training.precision` names it: fp32, bf16 or fp16."""
    words = str(dtype).removeprefix("torch.")
    return words.replace("bfloat", "bf").replace("float", "fp")
