"""How far two correct computations of the same thing may be apart. No torch import.

Rounding errors are taken as independent with mean zero, so those of R operations in a row add up in
squares: a relative error of LAMBDA u sqrt(R), u the unit roundoff (Higham and Mary, "A new approach
to probabilistic rounding error analysis", 2019). A sum of n products counts as log2 n operations,
as it is made in blocks and lanes. Then what depends on a weight also inherits that weight's errors
of the steps before: one more share per step.

For the shrunk models R is some hundreds: bounds are near 2e-13 in fp64 and 1e-4 in fp32, of which
correct runs use a hundredth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2, sqrt
from types import MappingProxyType

from megalite.config import Config
from megalite.precisions import precisions

UNIT: Mapping[str, float] = MappingProxyType(
    {"fp64": 2.0**-53, "fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-9}
)
LAMBDA: Mapping[str, float] = MappingProxyType(
    {"fp64": 64.0, "fp32": 64.0, "fp16": 4.0, "bf16": 4.0}
)
"""Of the largest error of a tensor in fp64 and fp32; of its root mean square in `HALF`, where the
largest single error of a correct run is of the size of the value itself."""

HALF = frozenset({"bf16", "fp16"})
"""Precisions of 16 bits."""


@dataclass(frozen=True)
class Bounds:
    """Relative errors that are still rounding, in the first step.

    Attributes:
        unit: roundoff of the precision.
        activation: of a tensor's largest value (in `HALF`, of its norm).
        gradient: likewise; and of the gradients' norm.
        loss: a mean over tokens, whose errors partly cancel.
    """

    unit: float
    activation: float
    gradient: float
    loss: float


def coarsest(config: Config) -> str:
    """The precision that rounds most of those that a run's numbers pass through."""
    of = precisions(config.train)
    passed = [of.weights, of.moments, *([of.reduction] if config.parallel.dp > 1 else [])]
    return max(passed, key=lambda name: UNIT[name])


def in_precision(config: Config, precision: str) -> Config:
    """The run in another precision, without what goes with its own alone."""
    changed, reduction = config.replace(precision=precision), config.train.grad_reduce_dtype
    if precision == "fp64":
        return changed.replace(grad_reduce_dtype="auto", moments_dtype="auto")
    return (
        changed.replace(grad_reduce_dtype="auto") if reduction == "fp16" != precision else changed
    )


def derive(config: Config) -> Bounds:
    """The bounds of a configuration, in the coarsest of its precisions."""
    model, precision = config.model, coarsest(config)
    unit, share = UNIT[precision], LAMBDA[precision]
    inner = model.num_attention_heads * model.head_dim
    # Elementwise operations: norms 2 x 4, rotation 2, softmax 3, SwiGLU 3, residual sums 2.
    sums = (
        *(model.hidden_size, model.hidden_size, model.hidden_size, model.hidden_size),
        *(model.head_dim, model.seq_length, model.seq_length, inner, model.ffn_hidden_size),
    )
    layer = 18 + sum(map(log2, sums))
    forward = model.num_layers * layer + 2 * log2(model.hidden_size) + log2(model.vocab_size) + 8
    # Of the smallest batch: fewer tokens average out less.
    tokens = config.batch_sizes.size(0) * model.seq_length
    # Backward makes two products for each one of the forward; the last one sums over the tokens.
    backward = 3 * forward + log2(tokens)
    return Bounds(
        unit=unit,
        activation=share * unit * sqrt(forward),
        gradient=share * unit * sqrt(backward),
        loss=share * unit * sqrt(forward / tokens) + 4 * unit,
    )
