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


def rms_norm(x: Tensor, weight: Tensor, eps: float, casting: str = "fp32") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim.

    Args:
        x: [..., H].
        weight: [H].
        eps: added to the mean square.
        casting: where rounding happens. "fp32": once, at the end. "llama": the normalised x is
            rounded to x's dtype before the weight multiplies it, as in LLaMA's and Hugging Face's
            code. "gemma": the weight is an offset from 1, and rounding happens once, at the end.

    Returns:
        Shape and dtype of `x`.

    Source: Zhang and Sennrich, "Root mean square layer normalization", arXiv:1910.07467.
    """
    return _rms_norm_to(x.dtype, x, weight, eps, casting)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, casting: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(new_residual), new_residual), where new_residual = x + residual.

    The sum is taken in fp32 at least and rounded to the residual's dtype; the norm is of the
    rounded sum.

    Args:
        x: [..., H].
        residual: shape of `x`, any dtype (fp32 beside a bf16 `x` keeps a long sum precise).
        weight, eps, casting: as in `rms_norm`.

    Returns:
        Shape of `x`; the first of x's dtype, the second of the residual's.
    """
    new_residual = (x + residual).to(residual.dtype)
    return _rms_norm_to(x.dtype, new_residual, weight, eps, casting), new_residual


def _rms_norm_to(dtype: torch.dtype, x: Tensor, weight: Tensor, eps: float, casting: str) -> Tensor:
    if casting == "fp32" and dtype == x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)  # one kernel where torch has one
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    if casting == "fp32":
        return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(dtype)
    if casting == "gemma":
        return F.rms_norm(x.to(wide), weight.shape, 1 + weight.to(wide), eps).to(dtype)
    if casting == "llama":
        return (F.rms_norm(x.to(wide), weight.shape, None, eps).to(dtype) * weight).to(dtype)
    raise ValueError(f"rms_norm: {casting!r} is not a casting; choose fp32, llama or gemma")


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


def softmax(
    x: Tensor, scale: float = 1.0, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(scale * x) over the last dim, of the keys that a query sees.

    A row without a key, all of whose scores are -inf (by masks or by themselves), gives zeros and
    has a gradient of zero.

    Args:
        x: [..., Sq, Sk] scores, of any shape if not causal.
        scale: above 0.
        mask: broadcastable to `x`; bool: True hides a key, as in Megatron; floating: added to
            scale * x. It has no gradient.
        causal: query i sees key j only if j <= i + Sk - Sq: the last query sees all keys.

    Returns:
        Shape and dtype of `x`.
    """
    check_softmax(x, scale, mask, causal)
    scores = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    if mask is not None:
        hides = mask.dtype == torch.bool
        scores = scores.masked_fill(mask, -torch.inf) if hides else scores + mask.to(scores.dtype)
    if causal:
        queries, keys = x.shape[-2:]
        above = torch.ones(queries, keys, dtype=torch.bool, device=x.device)
        scores = scores.masked_fill(above.triu(keys - queries + 1), -torch.inf)
    keyless = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(keyless, 0).softmax(-1).masked_fill(keyless, 0).to(x.dtype)


def check_softmax(x: Tensor, scale: float, mask: Tensor | None, causal: bool) -> None:
    """Raise ValueError unless the arguments are those that `softmax` describes."""
    if not scale > 0:
        raise ValueError(f"softmax: the scale must be above 0, not {scale}")
    if x.dim() < 1 + causal:
        raise ValueError(f"softmax: scores have {1 + causal} dimensions at least, not {x.dim()}")
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"softmax: a mask is bool or floating, not {mask.dtype}")
    if mask.requires_grad:
        raise ValueError("softmax: a mask has no gradient; detach it")
    sizes = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    if mask.dim() > x.dim() or any(m not in (1, n) for m, n in sizes):
        raise ValueError(f"softmax: a mask {[*mask.shape]} does not broadcast to {[*x.shape]}")


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
