"""Arguments that each operation takes, for the tests of what holds for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import megalite_kernels

S, B, N, K, D, H, V = 3, 2, 4, 2, 8, 6, 10
BACK_ENDS = ("triton", "torch")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def targets(*shape: int) -> Tensor:
    return torch.randint(V, shape)


LOSS: dict[str, Callable[[], Any]] = dict(
    targets=lambda: targets(S, B), label_smoothing=lambda: 0.1, z_loss=lambda: 0.1
)
WEIGHTED = LOSS | dict(token_weight=lambda: normal(S, B), vocab_size=lambda: V)
TABLES: dict[str, Callable[[], Any]] = dict(
    cos=lambda: normal(S, 1, D // 2), sin=lambda: normal(S, 1, D // 2), layout=lambda: "half"
)
PART: dict[str, Callable[[], Any]] = dict(
    logits=lambda: normal(S, V),
    targets=lambda: targets(S),
    first_column=lambda: 0,
    columns=lambda: V,
)
NORM: dict[str, Callable[[], Any]] = dict(
    x=lambda: normal(S, H), weight=lambda: normal(H), eps=lambda: 1e-5, casting=lambda: "fp32"
)
RIGHT: dict[str, dict[str, Callable[[], Any]]] = {
    "rms_norm": NORM,
    "add_rms_norm": NORM | dict(residual=lambda: normal(S, H)),
    "rope": dict(q=lambda: normal(S, B, N, D), k=lambda: normal(S, B, K, D)) | TABLES,
    "rope_packed": TABLES
    | dict(
        qkv=lambda: normal(S, B, (N + 2 * K) * D),
        num_heads=lambda: N,
        num_kv_heads=lambda: K,
        inplace=lambda: True,
    ),
    "softmax": dict(
        x=lambda: normal(B, N, S, S),
        scale=lambda: 0.5,
        mask=lambda: normal(B, 1, S, S),
        causal=lambda: True,
    ),
    "swiglu": dict(gate_up=lambda: normal(S, B, 2 * H)),
    "cross_entropy": LOSS | dict(logits=lambda: normal(S, B, V)),
    "cross_entropy_with_grad": WEIGHTED | dict(logits=lambda: normal(S, B, V)),
    "linear_cross_entropy": WEIGHTED
    | dict(
        hidden=lambda: normal(S, B, H),
        weight=lambda: normal(V, H),
        main_grad=lambda: torch.zeros(V, H),
        chunk_rows=lambda: 4,
    ),
    "vocab_parallel_statistics": PART,
    "vocab_parallel_gradient_": PART
    | dict(log_sum=lambda: normal(S), gradient=lambda: normal(S), vocab_size=lambda: V),
    "adamw_": dict(
        **{name: lambda: torch.rand(H) for name in ("master", "gradient", "exp_avg", "exp_avg_sq")},
        **{name: lambda: torch.ones(1) for name in ("step", "scale")},
        **{name: lambda: 0.5 for name in ("lr", "beta1", "beta2", "eps", "weight_decay")},
        skip=lambda: torch.zeros(1),
        copy=lambda: torch.zeros(H).half(),
    ),
}
"""Arguments of each operation that it takes."""


def call(operation: str, **others: Any) -> Any:
    arguments = {name: make() for name, make in RIGHT[operation].items()} | others
    return getattr(megalite_kernels, operation)(**arguments)
