"""What generation and evaluation ask of a model, however many ranks it is spread over."""

from typing import Protocol

from torch import Tensor


class LanguageModel(Protocol):
    """A causal model: what it says at a position depends on nothing to the right of it."""

    @property
    def max_length(self) -> int:
        """Most tokens per row: `model.max_position_embeddings`."""

    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Unnormalised scores of the next token.

        Args:
            tokens: int64 [b, s], rows padded on the right with any id.
            positions: int64 [b, k], where to look in each row; None looks everywhere (k = s).
        Returns:
            float32 [b, k, vocab_size].
        """

    def score(
        self, tokens: Tensor, rows: Tensor, positions: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """How likely n given next tokens are, without the scores of all others leaving a rank.

        Args:
            tokens: int64 [b, s], rows padded on the right with any id.
            rows, positions: int64 [n], where to look.
            targets: int64 [n], ids in [0, vocab_size): what might stand at `positions + 1`.
        Returns:
            float32 [n], log-probabilities of the targets in nats, and bool [n], whether the target
            is the most likely token there.
        """
