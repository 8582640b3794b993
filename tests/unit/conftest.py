"""A language model small enough that every answer can be computed directly."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM

MAX_LENGTH = 96


class DirectModel:
    """A `LanguageModel` without ranks; counts the rows it computes."""

    max_length = MAX_LENGTH

    def __init__(self, llama: "LlamaForCausalLM") -> None:
        self.llama = llama
        self.rows = 0

    def logits(self, tokens: "Tensor", positions: "Tensor | None" = None) -> "Tensor":
        import torch

        self.rows += len(tokens)
        with torch.no_grad():
            logits = self.llama(tokens).logits.float()
        if positions is None:
            return logits
        return logits[torch.arange(len(tokens))[:, None], positions]

    def score(
        self, tokens: "Tensor", rows: "Tensor", positions: "Tensor", targets: "Tensor"
    ) -> "tuple[Tensor, Tensor]":
        log_probs = self.logits(tokens).log_softmax(-1)[rows, positions]
        chosen = log_probs.gather(-1, targets[:, None]).squeeze(-1)
        return chosen, log_probs.argmax(-1) == targets


@pytest.fixture
def random_model() -> Callable[[int], DirectModel]:
    """Makes a random Llama with that many token ids, the same at every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(vocab_size: int) -> DirectModel:
        torch.manual_seed(7)
        config = LlamaConfig(
            vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=MAX_LENGTH, initializer_range=0.3,
            attention_bias=True, attn_implementation="eager", bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return DirectModel(LlamaForCausalLM(config).eval())

    return make
