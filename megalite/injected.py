"""The injected faults that touch tensors; `megalite.faults` says when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def spoiled(stages: Iterable[nn.Module], *, is_on: bool) -> Iterator[None]:
    """Make what a rank's stages hand back in backward NaN meanwhile: a gradient of this rank is not
    finite, though no loss is, and only earlier stages hear of it."""

    def spoil(_module: nn.Module, _inputs: object, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * torch.nan)

    hooks = [stage.register_forward_hook(spoil) for stage in stages if is_on]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def flip_a_bit(tensor: Tensor) -> None:
    """Flip the highest bit of the mantissa of the first element."""
    word, bit = {
        torch.bfloat16: (torch.int16, 6),
        torch.float16: (torch.int16, 9),
        torch.float32: (torch.int32, 22),
        torch.float64: (torch.int64, 51),
    }[tensor.dtype]
    tensor.view(-1)[:1].view(word).bitwise_xor_(1 << bit)
