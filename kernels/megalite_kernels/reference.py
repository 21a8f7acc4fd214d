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
from torch.autograd.function import once_differentiable
from torch.optim.adamw import adamw

from megalite_kernels.stochastic import random_words, round_to_bf16

ADAMW_BLOCK = 1 << 24
"""Elements updated at once, of which a scaled gradient is made; torch's kernel takes under 2^31."""
DRAWN_BLOCK = 1 << 20
"""Likewise where random numbers are drawn: they are int64, several for each element."""


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
    assert casting == "llama", casting
    return (F.rms_norm(x.to(wide), weight.shape, None, eps).to(dtype) * weight).to(dtype)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: str = "half"
) -> tuple[Tensor, Tensor]:
    """Queries and keys, their pairs of features turned by the angle of position and frequency.

    (a, b) -> (a cos - b sin, b cos + a sin); the backward turns by the opposite angle. A pair is
    (x_i, x_{i + R/2}) in the half layout, (x_{2i}, x_{2i+1}) in the interleaved one; the features
    from R on stay as they are.

    Args:
        q: [S, B, N, D], any strides.
        k: [S, B, K, D], any strides.
        cos, sin: [S, 1 or B, R/2], fp32 or fp64, R <= D.
        layout: "half" (GPT-NeoX, LLaMA) or "interleaved" (GPT-J).

    Returns:
        Contiguous, shapes and dtypes of `q` and `k`.

    Source: Su et al., "RoFormer", arXiv:2104.09864.
    """
    return _Rope.apply(q, k, cos[:, :, None, :], sin[:, :, None, :], layout)


def rope_packed(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, layout: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope` on the packed projection of queries, keys and values.

    Args:
        qkv: [S, B, (N + 2 K) D], queries first, then keys, then values.
        cos, sin, layout: as in `rope`.
        num_heads, num_kv_heads: N and K.

    Returns:
        q [S, B, N, D], k and v [S, B, K, D], views of one packed tensor: the backward of what uses
        them keeps that one, and the gradient of `qkv` is one packed tensor too.
    """
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return _RopePacked.apply(qkv, cos[:, :, None, :], sin[:, :, None, :], heads, layout)


def softmax(
    x: Tensor, scale: float = 1.0, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """exp(scale * x) over its sum along the last dim, of the keys that a query sees.

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
    return _Softmax.apply(x, scale, mask, causal)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the packed projection.

    Args:
        gate_up: [..., 2 F], gate first.

    Returns:
        [..., F].

    Source: Shazeer, "GLU variants improve transformer", arXiv:2002.05202.
    """
    return _Swiglu.apply(gate_up)


def adamw_(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
    copy: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
    run: Tensor | None = None,
    draws: tuple[int, int] | None = None,
) -> None:
    """One AdamW step, by numbers that are read where the tensors are.

    g = scale * gradient; m += (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g^2;
    w = w - lr weight_decay w - lr / c1 * m / (sqrt(v) / sqrt(c2) + eps), with c = 1 - beta^step.

    Buffers in bf16 are read as fp32, and what fp32 arithmetic makes of them is rounded to them
    stochastically (`megalite_kernels.stochastic`); w moves by the moments before they are rounded.

    Args:
        master: w, flat, fp32 or fp64; bf16 with `draws`.
        gradient: flat; its dtype may be lower.
        exp_avg, exp_avg_sq: m and v, flat, both as precise as `master`, fp32 at least, or both bf16
            with `draws`.
        step: one element, the count of steps with this one.
        lr, beta1, beta2, eps, weight_decay: hyper-parameters.
        scale: one element that the gradient is multiplied by: clipping, loss scale.
        skip: one element; unless it is 0, the new w, m and v are the old ones.
        copy: flat, of any dtype; gets the new w too, as `master` holds it.
        out: like w, m and v, apart from them; get the new ones, and the old ones stay. None: the
            new ones take their place.
        run: one element; if it is 0, nothing is written at all.
        draws: (key, place): the random numbers that bf16 is rounded by are those of this key, from
            the place on that the first element has.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv:1711.05101, as
    torch.optim.AdamW computes it.
    """
    count, wide = step, torch.promote_types(master.dtype, torch.float32)
    old = (master, exp_avg, exp_avg_sq)
    new = old if out is None else out
    # torch's function does not, so a backward that saved one of them would be silently wrong.
    torch.autograd.graph.increment_version(new)
    # torch's function counts the step itself, and doesn't count one that is skipped.
    step = step.float().view(()) - 1.0
    skip = _held(skip, run)
    scale = None if scale is None else scale.to(wide)
    if out is not None:
        for target, source in zip(new, old, strict=True):
            _write(target, source, run)
    flat = (new[0], gradient, *new[1:])
    block = ADAMW_BLOCK if draws is None else DRAWN_BLOCK
    parts = zip(*(buffer.split(block) for buffer in flat), strict=True)
    for number, (kept_w, g, kept_m, kept_v) in enumerate(parts):
        w, m, v = (x.to(wide) for x in (kept_w, kept_m, kept_v))
        g = g.to(wide) if scale is None else g.to(wide) * scale
        adamw(
            [w],
            [g],
            [m],
            [v],
            [],
            [step.clone()],
            fused=True,
            found_inf=skip,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )
        if draws is not None:
            key, place = draws
            places = torch.arange(len(w), device=w.device) + (place + number * block)
            bits, others = random_words(key, count, places)
            _round(kept_w, w, others & 0xFFFF)
            _round(kept_m, m, bits & 0xFFFF)
            _round(kept_v, v, bits >> 16)
    if copy is not None:
        _write(copy, new[0], run)


def _round(target: Tensor, source: Tensor, bits: Tensor) -> None:
    """Round to a bf16 target; another one is the source itself."""
    if target.dtype == torch.bfloat16:
        target.copy_(round_to_bf16(source, bits))


def _held(skip: Tensor | None, run: Tensor | None) -> Tensor | None:
    """1 where a step is not to be taken, which torch's function asks for exactly; fp32 []."""
    flags = [] if skip is None else [skip != 0]
    flags += [] if run is None else [run == 0]
    return torch.stack([flag.view(()) for flag in flags]).any().float() if flags else None


def _write(target: Tensor, source: Tensor, run: Tensor | None) -> None:
    """Copy to `target`, unless `run` is 0."""
    if run is not None:
        source = source.to(target.dtype).where(run.view(()) != 0, target)
    target.copy_(source)


class _Rope(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.layout = layout
        return _turn(q, cos, sin, layout), _turn(k, cos, sin, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(dq, cos, -sin, ctx.layout), _turn(dk, cos, -sin, ctx.layout), None, None, None


class _RopePacked(Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, ...], layout: str
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.layout = layout
        q, k, v = qkv.unflatten(2, (sum(heads), -1)).split(heads, dim=2)
        packed = torch.cat([_turn(q, cos, sin, layout), _turn(k, cos, sin, layout), v], dim=2)
        return packed.split(heads, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        turned = _turn(dq, cos, -sin, ctx.layout), _turn(dk, cos, -sin, ctx.layout)
        return torch.cat([*turned, dv], dim=2).flatten(2), None, None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    if layout == "half":
        a, b = turning.chunk(2, dim=-1)
    else:
        a, b = turning[..., 0::2], turning[..., 1::2]
    # cos and sin are at least fp32, so the products are too; they are rounded once.
    pair = (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)
    if layout == "half":
        return torch.cat([*pair, rest], dim=-1)
    return torch.cat([torch.stack(pair, dim=-1).flatten(-2), rest], dim=-1)


class _Softmax(Function):
    """Keeps its result only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
        scores = _at_least_fp32(x) * scale
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask.to(scores.dtype)
        if causal:
            queries, keys = x.shape[-2:]
            above = torch.ones(queries, keys, dtype=torch.bool, device=x.device)
            scores = scores.masked_fill(above.triu(keys - queries + 1), -torch.inf)
        keyless = (scores == -torch.inf).all(-1, keepdim=True)
        y = scores.softmax(-1).masked_fill(keyless, 0).to(x.dtype)
        ctx.save_for_backward(y)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (y,) = ctx.saved_tensors
        dy, weights = _at_least_fp32(dy), _at_least_fp32(y)
        dx = ctx.scale * weights * (dy - (dy * weights).sum(-1, keepdim=True))
        return dx.to(y.dtype), None, None, None


class _Swiglu(Function):
    """Keeps only its input, so that the activations are as few as the kernel's."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = _at_least_fp32(gate_up).chunk(2, dim=-1)
        return (F.silu(gate) * up).to(gate_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = _at_least_fp32(gate_up).chunk(2, dim=-1)
        dy = _at_least_fp32(dy)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        d_gate = dy * up * torch.addcmul(sigmoid, silu, 1.0 - sigmoid)
        return torch.cat([d_gate, dy * silu], dim=-1).to(gate_up.dtype)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
