"""The operations in plain torch: the definition that every kernel is tested against.

bf16 and fp16 inputs are computed in fp32 and rounded once at the end; fp32 and fp64 stay as they
are.

Legend: S sequence, B micro-batch, N heads, D head dim, F ffn.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim.

    Args:
        x: [..., H].
        weight: [H].

    Source: Zhang and Sennrich, "Root mean square layer normalization", arXiv:1910.07467.
    """
    return F.rms_norm(x, weight.shape, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) by the angle of their position and frequency.

    (a, b) -> (a cos - b sin, b cos + a sin); the backward turns by the opposite angle.

    Args:
        x: [S, B, N, D], any strides.
        cos, sin: [S, 1 or B, D/2], fp32 or fp64.

    Returns:
        Contiguous, shape and dtype of `x`.

    Source: Su et al., "RoFormer", arXiv:2104.09864, with the half layout of GPT-NeoX and LLaMA.
    """
    return _Rope.apply(x, cos[:, :, None, :], sin[:, :, None, :])


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the packed projection.

    Args:
        gate_up: [..., 2 F], gate first.

    Returns:
        [..., F].

    Source: Shazeer, "GLU variants improve transformer", arXiv:2002.05202.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _Rope(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    # cos and sin are at least fp32, so the products are too; torch.cat rounds once.
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
