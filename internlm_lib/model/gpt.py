"""GPTModel whose loss does not know how many rows the vocabulary was padded by.

Import only after `Device.adapt_megatron()`.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor


class InternLM(GPTModel):
    """megatron-core's model, with padding rows of the vocabulary left out of the loss.

    Megatron lets them take part in the softmax. They are as many as the tensor parallel size asks
    for, so the loss would depend on the layout, and rows that mean nothing would be trained.
    """

    def __init__(self, *args: Any, real_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._real_vocab_size = real_vocab_size

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, V/tp] (changed in place) → losses [b, s] in fp32."""
        own = logits.shape[-1]
        first = parallel_state.get_tensor_model_parallel_rank() * own
        real = max(0, min(own, self._real_vocab_size - first))
        if real < own:
            logits[..., real:].fill_(torch.finfo(logits.dtype).min)
        losses: Tensor = super().compute_language_model_loss(labels, logits)
        return losses
