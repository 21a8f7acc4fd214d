"""Causal self-attention with grouped key/value heads, cut over the tensor ranks by heads.

Legend: S sequence, B micro-batch, H hidden, N query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalite.config_model import ModelConfig
from megalite.layers.batch import Documents, DropoutPlace
from megalite.layers.dropout import attention_keep
from megalite.layers.linear import ColumnParallelLinear, Output, RowParallelLinear
from megalite.layers.sdpa import causal_attention
from megalite.layers.weight_gradients import WeightGradients
from megalite.parallel.tensor import TensorGroup
from megalite_kernels import rope_packed, softmax


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V of this rank's heads, between a column- and a row-parallel layer.

    Each rank owns N/tp query heads and the key/value heads that they use: K/tp of them, or a copy
    of one if tp > K.

    Args:
        model: shape and dropout.
        layer: index in the whole model; names tensors and dropout masks.
        tp: the tensor group.
        recompute_core: compute everything between the projections again in backward.
        fused_softmax: matrix products with a softmax kernel between them, which keeps the weights
            [B, N/tp, S, S], in place of SDPA. Dropout of attention weights always takes this path.
        weight_gradients, dtype, device: as in `ColumnParallelLinear`.
    """

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        *,
        tp: TensorGroup,
        recompute_core: bool = False,
        fused_softmax: bool = False,
        weight_gradients: WeightGradients | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.head_dim = model.head_dim
        self.num_heads = model.num_attention_heads
        self.local_heads = model.num_attention_heads // tp.size
        self.local_kv_heads = max(1, model.num_kv_heads // tp.size)
        self.first_head = tp.rank * self.local_heads
        self.dropout = model.attention_dropout
        self.site = f"layer {layer} attention"
        self.recompute_core = recompute_core
        self.fused_softmax = fused_softmax
        prefix = f"model.layers.{layer}.self_attn"
        self.qkv = ColumnParallelLinear(
            model.hidden_size,
            [
                Output(f"{prefix}.q_proj.weight", model.num_attention_heads, model.head_dim),
                Output(f"{prefix}.k_proj.weight", model.num_kv_heads, model.head_dim),
                Output(f"{prefix}.v_proj.weight", model.num_kv_heads, model.head_dim),
            ],
            tp=tp,
            init_std=model.init_method_std,
            weight_gradients=weight_gradients,
            dtype=dtype,
            device=device,
        )
        self.out = RowParallelLinear(
            model.num_attention_heads * model.head_dim,
            model.hidden_size,
            name=f"{prefix}.o_proj.weight",
            tp=tp,
            init_std=model.init_method_std / math.sqrt(2 * model.num_layers),
            weight_gradients=weight_gradients,
            dtype=dtype,
            device=device,
        )

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        place: DropoutPlace | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Hidden states to the block's contribution to them.

        Args:
            x: [S/tp, B, H] or [S, B, H].
            cos, sin: [S, 1 or B, D/2].
            place: of the forward pass in the run; None in evaluation.
            documents: which attention stays inside; None: it runs through the sample.
        """
        core = (self.qkv(x), cos, sin, place, documents)
        if self.recompute_core:
            mixed = checkpoint(self._core, *core, use_reentrant=False, preserve_rng_state=False)
        else:
            mixed = self._core(*core)
        return self.out(mixed)

    def _core(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        place: DropoutPlace | None,
        documents: Documents | None,
    ) -> Tensor:
        """[S, B, (N + 2K) D / tp] -> [S, B, N D / tp]."""
        length, batch, _ = qkv.shape
        heads = (self.local_heads, self.local_kv_heads)
        # A core that is computed again needs its input as it was.
        turned = rope_packed(qkv, cos, sin, *heads, inplace=not self.recompute_core)
        # [S, B, N, D] -> [B, N, S, D]
        q, k, v = (t.permute(1, 2, 0, 3) for t in turned)
        if self.fused_softmax or (self.dropout and place is not None):
            mixed = self._unfused(q, k, v, place, documents)
        else:
            mixed = causal_attention(q, k, v, documents)
        return mixed.permute(2, 0, 1, 3).reshape(length, batch, -1)

    def _unfused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        place: DropoutPlace | None,
        documents: Documents | None,
    ) -> Tensor:
        """With the weights in memory; a kernel's own generator would not know dropout's mask."""
        batch, heads, length, dim = q.shape
        # The query heads that share a key/value head are the rows of one matrix product.
        together = (batch, self.local_kv_heads, -1)
        scores = q.reshape(*together, dim) @ k.transpose(-1, -2)
        weights = softmax(
            scores.view(batch, heads, length, length),
            1.0 / math.sqrt(dim),
            None if documents is None else ~documents.mask(),
            causal=True,
        )
        if self.dropout and place is not None:
            mine = range(self.first_head, self.first_head + self.local_heads)
            keep = attention_keep(self.dropout, place, self.site, mine, self.num_heads, length)
            weights = weights * keep
            v = v * (1.0 / (1.0 - self.dropout))
        return (weights.view(*together, length) @ v).view(batch, heads, length, dim)
