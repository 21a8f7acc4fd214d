"""What a run keeps in which precision, from its configuration alone. No torch import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megalite.config import TrainConfig

BYTES: Mapping[str, int] = MappingProxyType({"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8})
"""Of one number."""


@dataclass(frozen=True)
class Precisions:
    """A key of `BYTES` for all that is kept of a parameter.

    Attributes:
        weights: and activations.
        gradients: summed over micro-batches and over copies, and normed.
        reduction: gradients on their way between data ranks.
        master: weights that AdamW moves.
        moments: of AdamW, both.
    """

    weights: str
    gradients: str
    reduction: str
    master: str
    moments: str


def precisions(train: TrainConfig) -> Precisions:
    """Of a run with a precision other than `auto`."""
    gradients = "fp64" if train.precision == "fp64" else "fp32"
    reduction = gradients if train.grad_reduce_dtype == "auto" else train.grad_reduce_dtype
    # Gradients are fp32 in bf16-pure too: a sum over micro-batches in bf16 stops growing.
    is_pure = train.precision == "bf16-pure"
    weights, master = ("bf16", "bf16") if is_pure else (train.precision, gradients)
    moments = master if train.moments_dtype == "auto" else train.moments_dtype
    return Precisions(weights, gradients, reduction, master, moments)
