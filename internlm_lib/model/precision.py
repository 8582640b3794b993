"""Names of precisions, as torch's dtypes."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Those a params file may train in."""

STORED_DTYPES = {
    **DTYPES,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Those weights may be stored in, under the kit's names and torch's."""
