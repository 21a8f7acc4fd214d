"""Liger-Kernel, by its dispatching functions: CuTe DSL or Triton, as it chooses itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from kernel_bench.cases_rows import split_heads
from kernel_bench.problem import Outputs, Prepared, Problem, UnsupportedError, call, in_place
from kernel_bench.rivals_layout import batch_first

Tensors = Mapping[str, Tensor]
TRITON = "nvidia-triton"
NAMES = MappingProxyType(
    {
        "add_rms_norm": "fused_add_rms_norm",
        "softmax_scaled": "softmax",
        "rope_half": "rope",
        "rope_packed_half": "rope",
        "linear_cross_entropy": "fused_linear_cross_entropy",
    }
)
"""Ops that Liger has under another name."""


def build(problem: Problem) -> Prepared:
    """With the implementation that Liger chooses; with Triton's if that one fails."""
    maker = _maker(problem)
    try:
        prepared = maker(impl=None)
        prepared.run()
        return replace(prepared, note=_chosen(problem))
    except UnsupportedError:
        raise
    except Exception as error:
        prepared = maker(impl=TRITON)
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:80]
        return replace(prepared, note=f"Triton; its own choice failed: {reason}")
    finally:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _chosen(problem: Problem) -> str:
    from liger_kernel.backends import resolve_impl

    if problem.op == "swiglu":
        return TRITON
    return str(resolve_impl(NAMES.get(problem.op, problem.op)).impl_name)


def _maker(problem: Problem) -> Callable[..., Prepared]:
    op = problem.op
    if op in ("softmax_masked", "softmax_causal"):
        raise UnsupportedError("its softmax has no mask")
    if op.endswith("interleaved"):
        raise UnsupportedError("its rope has the half layout only")
    if op == "adamw":
        raise UnsupportedError("no optimizer")
    if op.startswith("rope"):
        return partial(_rope, problem)
    if op == "cross_entropy":
        return partial(_cross_entropy, problem)
    return lambda impl: Prepared(call(problem, _function(problem, impl)))


def _function(problem: Problem, impl: str | None) -> Outputs:
    from liger_kernel import functional as liger

    op, options = problem.op, problem.options
    if op == "rms_norm":
        return lambda t: (liger.rms_norm(t["x"], t["weight"], options["eps"], impl=impl),)
    if op == "add_rms_norm":
        return lambda t: liger.fused_add_rms_norm(
            t["x"], t["residual"], t["weight"], options["eps"], impl=impl
        )
    if op == "softmax_scaled":
        if options["scale"] != 1:
            raise UnsupportedError("its softmax has no scale")
        return lambda t: (liger.softmax(t["x"], impl=impl),)
    if op == "swiglu":
        from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

        return lambda t: (LigerFusedGateUpSiLUMulFunction.apply(t["gate_up"], False),)
    if op == "linear_cross_entropy":
        return lambda t: (
            liger.fused_linear_cross_entropy(t["hidden"], t["weight"], t["targets"], impl=impl)[0],
        )
    raise UnsupportedError(f"no {op}")


def _cross_entropy(problem: Problem, impl: str | None) -> Prepared:
    from liger_kernel import functional as liger

    def loss(tensors: Tensors) -> tuple[Tensor, ...]:
        return (liger.cross_entropy(tensors["logits"], tensors["targets"], impl=impl)[0],)

    problem, restore = in_place(problem, ["logits"])
    return Prepared(call(problem, loss), restore)


def _rope(problem: Problem, impl: str | None) -> Prepared:
    """[B, N, S, D] views of contiguous [B, S, N, D], which it turns in place, gradients too."""
    from liger_kernel import functional as liger

    problem, restore, back = batch_first(problem)
    dtype = problem.gradients[0].dtype
    tables = (problem.tensors[name][:, 0].to(dtype) for name in ("cos", "sin"))
    cos, sin = (torch.cat([table, table], dim=-1)[None] for table in tables)

    def turned(tensors: Tensors) -> tuple[Tensor, ...]:
        packed = "qkv" in tensors
        q, k, *rest = (
            split_heads(tensors["qkv"], problem) if packed else (tensors["q"], tensors["k"])
        )
        q, k = liger.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, impl=impl)
        return q.transpose(1, 2), k.transpose(1, 2), *rest

    return Prepared(back(call(problem, turned)), restore)
