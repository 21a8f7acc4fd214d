"""The operations between the matrix products, one name each: what megalite's layers call.

This is the one dispatch page. Each call is served by the Triton kernel of `fused/` or by the plain
torch definition of `reference.py`, decided by `backend.py` from the device of its first tensor;
`use_backend()` and the environment variable MEGALITE_KERNELS override that. Before it, `check.py`
refuses with a ValueError, alike for both, arguments that are not as described.

Legend: S sequence, B micro-batch, H hidden, N query heads, K key/value heads, D head dim, R rotated
features of a head, F ffn, V vocabulary, T tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megalite_kernels import check, reference, reference_cross_entropy
from megalite_kernels.backend import BackendError, describe_backend, runs_fused, use_backend

__all__ = [
    "OPERATIONS",
    "BackendError",
    "adamw_",
    "add_rms_norm",
    "back_ends",
    "cross_entropy",
    "cross_entropy_with_grad",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "rope_packed",
    "softmax",
    "swiglu",
    "use_backend",
    "vocab_parallel_gradient_",
    "vocab_parallel_statistics",
]

OPERATIONS = (
    "rms_norm",
    "add_rms_norm",
    "rope",
    "softmax",
    "swiglu",
    "cross_entropy",
    "adamw",
)
"""What a run names at its start with the back end of each, if it uses them."""

Casting = Literal["fp32", "llama", "gemma"]
Layout = Literal["half", "interleaved"]


def back_ends(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Operation to the back end that serves it for tensors of this device and dtype.

    Raises:
        BackendError: a CUDA device that Triton can't serve; names the remedy.
    """
    return dict.fromkeys(OPERATIONS, describe_backend(device, dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float, casting: Casting = "fp32") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; see `reference.rms_norm`."""
    check.check_rms_norm("rms_norm", x, weight, eps, casting)
    if runs_fused(x):
        from megalite_kernels.fused.rms_norm import rms_norm as fused

        return fused(x, weight, eps, casting)
    return reference.rms_norm(x, weight, eps, casting)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, casting: Casting = "fp32"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); see `reference.add_rms_norm`."""
    check.check_add_rms_norm(x, residual, weight, eps, casting)
    if runs_fused(x):
        from megalite_kernels.fused.rms_norm import add_rms_norm as fused

        return fused(x, residual, weight, eps, casting)
    return reference.add_rms_norm(x, residual, weight, eps, casting)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: Layout = "half"
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions' angles; see `reference.rope`."""
    check.check_rope(q, k, cos, sin, layout)
    if runs_fused(q):
        from megalite_kernels.fused.rope import rope as fused

        return fused(q, k, cos, sin, layout)
    return reference.rope(q, k, cos, sin, layout)


def rope_packed(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    layout: Layout = "half",
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turned queries and keys, and values, of the packed projection; see `reference.rope_packed`.

    With `inplace` the kernel turns the heads where they lie, and the results are views of `qkv`,
    which the caller must not need again; plain torch makes a new tensor either way.

    Raises:
        RuntimeError: `inplace`, and `qkv` is a leaf that requires a gradient, or a view of one.
    """
    check.check_rope_packed(qkv, cos, sin, num_heads, num_kv_heads, layout, inplace)
    if runs_fused(qkv):
        from megalite_kernels.fused.rope import rope_packed as fused

        return fused(qkv, cos, sin, num_heads, num_kv_heads, layout, inplace)
    return reference.rope_packed(qkv, cos, sin, num_heads, num_kv_heads, layout)


def softmax(
    x: Tensor, scale: float = 1.0, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Softmax of scale * x, masked, over the last dim; see `reference.softmax`."""
    check.check_softmax(x, scale, mask, causal)
    if runs_fused(x):
        from megalite_kernels.fused.softmax import softmax as fused

        return fused(x, scale, mask, causal)
    return reference.softmax(x, scale, mask, causal)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the packed projection; see `reference.swiglu`."""
    check.check_swiglu(gate_up)
    if runs_fused(gate_up):
        from megalite_kernels.fused.swiglu import swiglu as fused

        return fused(gate_up)
    return reference.swiglu(gate_up)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Negative log likelihood of each target; see `reference_cross_entropy.cross_entropy`.

    The loss of a target that is neither a class nor `ignore_index` is NaN: looking for one before
    would wait for the GPU.
    """
    check.check_cross_entropy("cross_entropy", logits, targets, None, None, label_smoothing, z_loss)
    if runs_fused(logits):
        from megalite_kernels.fused.cross_entropy import cross_entropy as fused

        return fused(logits, targets, ignore_index, label_smoothing, z_loss)
    return reference_cross_entropy.cross_entropy(
        logits, targets, ignore_index, label_smoothing, z_loss
    )


def cross_entropy_with_grad(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(sum of token_weight * loss, losses), the gradient in the logits' place.

    A target that does not exist has the loss NaN, as in `cross_entropy`. See
    `reference_cross_entropy.cross_entropy_with_grad`.
    """
    arguments = (logits, targets, token_weight, vocab_size)
    options = (ignore_index, label_smoothing, z_loss)
    check.check_cross_entropy("cross_entropy_with_grad", *arguments, label_smoothing, z_loss)
    if runs_fused(logits):
        from megalite_kernels.fused.cross_entropy import cross_entropy_with_grad as fused

        return fused(*arguments, *options)
    return reference_cross_entropy.cross_entropy_with_grad(*arguments, *options)


def vocab_parallel_statistics(
    logits: Tensor, targets: Tensor, first_column: int, columns: int, summed: bool = True
) -> Tensor:
    """Each token's (maximum, sum of exponentials, target's logit, sum of logits) on these columns.

    The last is 0 unless `summed`: label smoothing alone needs it. See
    `reference_cross_entropy.vocab_parallel_statistics`.
    """
    check.check_vocab_parallel_statistics(logits, targets, first_column, columns)
    if runs_fused(logits):
        from megalite_kernels.fused.vocab_parallel import vocab_parallel_statistics as fused

        return fused(logits, targets, first_column, columns, summed)
    return reference_cross_entropy.vocab_parallel_statistics(
        logits, targets, first_column, columns, summed
    )


def vocab_parallel_gradient_(
    logits: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    gradient: Tensor,
    first_column: int,
    columns: int,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """Overwrite these columns' logits with the loss's gradient.

    See `reference_cross_entropy.vocab_parallel_gradient_`.
    """
    arguments = (logits, targets, log_sum, gradient, first_column, columns, vocab_size)
    check.check_vocab_parallel_gradient(*arguments, label_smoothing, z_loss)
    if runs_fused(logits):
        from megalite_kernels.fused.vocab_parallel import vocab_parallel_gradient_ as fused

        fused(*arguments, label_smoothing, z_loss)
        return
    reference_cross_entropy.vocab_parallel_gradient_(*arguments, label_smoothing, z_loss)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    main_grad: Tensor | None = None,
    chunk_rows: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(sum of token_weight * loss, losses) of hidden @ weight^T, logits never whole in memory.

    The matrix products are torch's on every device; the loss between them is
    `cross_entropy_with_grad`, dispatched as usual. See `fused.linear_cross_entropy`.
    """
    from megalite_kernels.fused.linear_cross_entropy import linear_cross_entropy as chunked

    arguments = (hidden, weight, targets, token_weight, main_grad, chunk_rows, vocab_size)
    check.check_linear_cross_entropy(*arguments, label_smoothing, z_loss)
    return chunked(*arguments, ignore_index, label_smoothing, z_loss)


def adamw_(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
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
    """One AdamW step over flat buffers, in place or to `out`; see `reference.adamw_`."""
    buffers = (master, gradient, exp_avg, exp_avg_sq, step)
    numbers = (lr, beta1, beta2, eps, weight_decay)
    check.check_adamw(*buffers, *numbers, scale, skip, copy, out, run, draws)
    if runs_fused(master):
        from megalite_kernels.fused.adamw import adamw_ as fused

        fused(*buffers, *numbers, scale, skip, copy, out, run, draws)
        return
    reference.adamw_(*buffers, *numbers, scale, skip, copy, out, run, draws)
