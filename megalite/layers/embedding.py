"""The token embedding, cut along the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.layers.shard import Piece, Shard
from megalite.parallel.tensor import TensorGroup


class VocabParallelEmbedding(nn.Module):
    """Rank i holds the rows `[i V/tp, (i + 1) V/tp)` of the table and contributes zeros for the
    tokens of the others; the sum over the ranks is the lookup.

    Forward: reduce-scatter along the sequence (all-reduce without sequence parallelism).
    Backward: all-gather (none without sequence parallelism).

    Args:
        vocab_size: V, the rows that exist.
        padded_vocab_size: a multiple of tp; rows from V on stay zero.
        hidden_size: H.
        name, tp, init_std, dtype, device: as in `RowParallelLinear`.
    """

    def __init__(
        self,
        vocab_size: int,
        padded_vocab_size: int,
        hidden_size: int,
        *,
        name: str,
        tp: TensorGroup,
        init_std: float = 0.02,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.tp = tp
        rows = padded_vocab_size // tp.size
        self.first_token = tp.rank * rows
        start = min(self.first_token, vocab_size)
        length = max(0, min(self.first_token + rows, vocab_size) - start)
        shape = (vocab_size, hidden_size)
        self.shard = Shard((Piece(name, shape, 0, start, length),), init_std)
        self.weight = nn.Parameter(torch.empty(rows, hidden_size, dtype=dtype, device=device))

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, S] -> [S/tp, B, H] or [S, B, H]."""
        local = tokens.t() - self.first_token
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.tp.leave(rows.masked_fill(elsewhere[..., None], 0.0))
