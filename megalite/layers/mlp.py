"""The SwiGLU MLP, cut over the tensor ranks by its inner features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megalite.config_model import ModelConfig
from megalite.layers.linear import ColumnParallelLinear, Output, RowParallelLinear
from megalite.layers.weight_gradients import WeightGradients
from megalite.parallel.tensor import TensorGroup
from megalite_kernels import swiglu


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are packed into one column-parallel layer.

    Args:
        model: shape.
        layer: index in the whole model.
        tp, weight_gradients, dtype, device: as in `ColumnParallelLinear`.
    """

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        *,
        tp: TensorGroup,
        weight_gradients: WeightGradients | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        prefix = f"model.layers.{layer}.mlp"
        self.gate_up = ColumnParallelLinear(
            model.hidden_size,
            [
                Output(f"{prefix}.gate_proj.weight", model.ffn_hidden_size),
                Output(f"{prefix}.up_proj.weight", model.ffn_hidden_size),
            ],
            tp=tp,
            init_std=model.init_method_std,
            weight_gradients=weight_gradients,
            dtype=dtype,
            device=device,
        )
        self.down = RowParallelLinear(
            model.ffn_hidden_size,
            model.hidden_size,
            name=f"{prefix}.down_proj.weight",
            tp=tp,
            init_std=model.init_method_std / math.sqrt(2 * model.num_layers),
            weight_gradients=weight_gradients,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[S/tp, B, H] or [S, B, H], and the same out."""
        return self.down(swiglu(self.gate_up(x)))
