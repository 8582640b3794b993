"""Names of precisions in a params file, as torch's dtypes."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
