"""Self-test of each operation in use against its definition in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

import megalite_kernels
from megalite.layers.cross_entropy import vocab_parallel_cross_entropy
from megalite.layers.sdpa import fastest_attention
from megalite.parallel.tensor import TensorGroup
from megalite_kernels import reference

SEQUENCE, BATCH, HEADS, KV_HEADS, HEAD_DIM = 256, 2, 4, 2, 64
HIDDEN, VOCABULARY = 512, 1000
EPSILON = 1e-5

ROUNDINGS = 4.0
"""Roundings to the output's precision between input and result, forward and backward, at most."""

Operation = Callable[..., Tensor]


@dataclass(frozen=True)
class Compared:
    """One operation.

    Attributes:
        operation: its name.
        dtype: of its inputs.
        error: the largest of its result and gradients, relative to each one's largest value.
        bound: what rounding explains.
    """

    operation: str
    dtype: str
    error: float
    bound: float

    @property
    def is_right(self) -> bool:
        """Whether rounding explains the error."""
        return self.error <= self.bound


def compare_operations(device: torch.device) -> list[Compared]:
    """Compare every operation's forward and backward, in the precisions in use on the device."""
    dtypes = [torch.float32] + ([torch.bfloat16] if device.type == "cuda" else [])
    with fastest_attention(device):
        return [
            _compare(name, ours, definition, inputs, device, dtype)
            for name, ours, definition, inputs in _operations()
            for dtype in dtypes
        ]


def _operations() -> list[tuple[str, Operation, Operation, list[Tensor]]]:
    """(name, what runs, its definition, inputs in fp64) of each operation."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    angles = torch.outer(torch.arange(SEQUENCE), 10000.0 ** -torch.arange(0, 1, 2 / HEAD_DIM))
    labels = torch.randint(VOCABULARY, (SEQUENCE, BATCH), generator=generator)
    solo = TensorGroup.solo()

    def turned(turn: Callable[..., tuple[Tensor, ...]]) -> Operation:
        def run(x: Tensor) -> Tensor:
            dtype = torch.promote_types(x.dtype, torch.float32)
            cos, sin = (
                table.to(x.device, dtype)[:, None] for table in (angles.cos(), angles.sin())
            )
            return torch.cat(turn(x, cos, sin, HEADS, KV_HEADS), dim=2)

        return run

    return [
        (
            "rms_norm",
            lambda x, w: megalite_kernels.rms_norm(x, w, EPSILON),
            lambda x, w: x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * w,
            [normal(SEQUENCE, BATCH, HIDDEN), normal(HIDDEN)],
        ),
        (
            "add_rms_norm",
            lambda x, r, w: torch.cat(megalite_kernels.add_rms_norm(x, r, w, EPSILON)),
            lambda x, r, w: torch.cat(reference.add_rms_norm(x, r, w, EPSILON)),
            [*(normal(SEQUENCE, BATCH, HIDDEN) for _ in range(2)), normal(HIDDEN)],
        ),
        (
            "rope",
            turned(megalite_kernels.rope_packed),
            turned(reference.rope_packed),
            [normal(SEQUENCE, BATCH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)],
        ),
        (
            "softmax",
            lambda x: megalite_kernels.softmax(x, 0.5, causal=True),
            lambda x: reference.softmax(x, 0.5, causal=True),
            [normal(BATCH, HEADS, SEQUENCE, SEQUENCE)],
        ),
        (
            "swiglu",
            megalite_kernels.swiglu,
            lambda x: F.silu(x[..., :HIDDEN]) * x[..., HIDDEN:],
            [normal(SEQUENCE, BATCH, 2 * HIDDEN)],
        ),
        (
            "attention",
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            _attention,
            [normal(BATCH, HEADS, SEQUENCE, HEAD_DIM) for _ in range(3)],
        ),
        (
            "cross_entropy",
            lambda z: vocab_parallel_cross_entropy(z, labels.to(z.device), VOCABULARY, solo),
            lambda z: F.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="none").view(
                SEQUENCE, BATCH
            ),
            [normal(SEQUENCE, BATCH, VOCABULARY)],
        ),
        (
            "cross_entropy with its gradient",
            lambda z: _weighted_loss(z * 1.0, labels),
            lambda z: F.cross_entropy(z.flatten(0, 1), labels.flatten()),
            [normal(SEQUENCE, BATCH, VOCABULARY)],
        ),
        (
            "adamw",
            lambda w: _updated(megalite_kernels.adamw_, w),
            lambda w: _updated(reference.adamw_, w),
            [normal(HIDDEN)],
        ),
    ]


def _weighted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss; takes the logits over."""
    labels = labels.to(logits.device)
    weights = torch.full(labels.shape, 1 / labels.numel(), device=logits.device)
    return megalite_kernels.cross_entropy_with_grad(logits, labels, weights)[0]


def _updated(step: Callable[..., None], weights: Tensor) -> Tensor:
    """The weights after one AdamW step, differentiable as if they were moved by a constant."""
    dtype = torch.promote_types(weights.dtype, torch.float32)
    master = weights.detach().to(dtype, copy=True)
    slope, moments = master.cos(), (torch.zeros_like(master), torch.ones_like(master))
    count = torch.full((), 3.0, dtype=dtype, device=master.device)
    rates = dict(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    step(master, slope, *moments, count, **rates)
    return master + (weights - weights.detach()).to(dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2) / sqrt(q.shape[-1])).masked_fill(later, -torch.inf)
    return scores.softmax(-1) @ v


def _compare(
    name: str,
    ours: Operation,
    definition: Operation,
    inputs: Sequence[Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> Compared:
    rounded = [x.to(dtype) for x in inputs]
    got = _results(ours, [x.to(device) for x in rounded])
    exact = _results(definition, [x.double() for x in rounded])
    errors = [
        float((a.cpu().double() - b).abs().max() / b.abs().max())
        for a, b in zip(got, exact, strict=True)
    ]
    # Sums are made in fp32 at least: over the features, the keys, the tokens.
    sums = torch.finfo(torch.float32).eps * sqrt(SEQUENCE * BATCH)
    bound = ROUNDINGS * (torch.finfo(dtype).eps + sums)
    return Compared(name, str(dtype).removeprefix("torch."), max(errors), bound)


def _results(operation: Operation, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output, and the gradient of each input for an output gradient of cosines."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = operation(*leaves)
    seed = torch.arange(output.numel(), dtype=torch.float64).cos().view(output.shape)
    output.backward(seed.to(output.device, output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
