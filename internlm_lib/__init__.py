"""Reproduce InternLM training on NPUs, GPUs or a plain CPU, and prove what came out."""

from internlm_lib.devices.cann import keep_torch_npu_out

__version__ = "0.1.0"

# Here, because nothing of the kit may import torch, or let others do so, before this.
keep_torch_npu_out()
