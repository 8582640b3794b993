"""Sizes at which the selftest's checks take no time."""

import torch

from internlm_lib.selftest.sizes import Sizes

SIZES = Sizes(
    positions=24, heads=2, head_dim=16, ffn=44, dtypes=(torch.float32, torch.bfloat16),
    matrix=16, copied_bytes=64, exchanged_bytes=64,
)  # fmt: skip
