"""Matrix products whose result is wider than their factors."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_product_(target: Tensor, a: Tensor, b: Tensor, *, keep: bool = True) -> None:
    """target += a @ b in the target's precision: fp32 [m, n] from [m, k] and [k, n] in bf16.

    On CUDA the product adds in its own accumulators and nothing is rounded on the way; elsewhere
    torch has no product with a result wider than its factors, so they are widened.

    Args:
        target: what is there counts if `keep`; otherwise it is overwritten, whatever it is.
        a, b: of one dtype.
    """
    beta = 1.0 if keep else 0.0
    if a.dtype == target.dtype:
        target.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(target, a, b, out_dtype=target.dtype, beta=beta, out=target)
    else:
        target.addmm_(a.to(target.dtype), b.to(target.dtype), beta=beta)
