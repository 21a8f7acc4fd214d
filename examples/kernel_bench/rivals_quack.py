"""QuACK's kernels in CuTe DSL."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kernel_bench.cases_rows import split_heads
from kernel_bench.problem import (
    FORWARD,
    Outputs,
    Prepared,
    Problem,
    UnsupportedError,
    call,
    in_place,
)
from kernel_bench.rivals_layout import batch_first

Tensors = Mapping[str, Tensor]
CHUNK_ROWS = 4096
"""Its default for the linear cross-entropy."""


def build(problem: Problem) -> Prepared:
    """Its op, with the options that serve it best."""
    op = problem.op
    if op.startswith("rope"):
        return _rope(problem)
    if op == "cross_entropy":
        problem, restore = in_place(problem, ["logits"])
        return Prepared(call(problem, _loss), restore, "inplace_backward")
    return Prepared(call(problem, _function(problem)))


def _function(problem: Problem) -> Outputs:
    op, options = problem.op, problem.options
    if op in ("rms_norm", "add_rms_norm"):
        from quack import rmsnorm

        eps = options["eps"]
        if op == "rms_norm":
            return lambda t: (rmsnorm(t["x"], t["weight"], eps=eps),)
        return lambda t: rmsnorm(t["x"], t["weight"], residual=t["residual"], eps=eps, prenorm=True)
    if op == "softmax_scaled":
        from quack import softmax

        if options["scale"] != 1:
            raise UnsupportedError("its softmax has no scale")
        return lambda t: (softmax(t["x"].view(-1, t["x"].shape[-1])).view(t["x"].shape),)
    if op.startswith("softmax"):
        raise UnsupportedError("its softmax has no mask")
    if op == "linear_cross_entropy":
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        # Its own tuning takes minutes a shape; without, it takes its heuristic's choice.
        return lambda t: (
            chunked_linear_cross_entropy(
                t["hidden"], t["weight"], t["targets"], chunk_size=CHUNK_ROWS, tuned=False
            ),
        )
    if op == "swiglu":
        raise UnsupportedError("SwiGLU only within a matrix product")
    raise UnsupportedError(f"no {op}")


def _loss(tensors: Tensors) -> tuple[Tensor, ...]:
    from quack import cross_entropy

    return (cross_entropy(tensors["logits"], tensors["targets"], inplace_backward=True),)


def _rope(problem: Problem) -> Prepared:
    from quack.rotary import apply_rotary_emb, apply_rotary_emb_qkv_

    options = problem.options
    heads, width = options["heads"], options["width"]
    interleaved = options["layout"] == "interleaved"
    problem, restore, back = batch_first(problem)
    cos, sin = (problem.tensors[name][:, 0].contiguous() for name in ("cos", "sin"))

    def turned(tensors: Tensors) -> tuple[Tensor, ...]:
        if "qkv" not in tensors:
            pair = tensors["q"], tensors["k"]
            return tuple(apply_rotary_emb(x, cos, sin, interleaved) for x in pair)
        qkv = apply_rotary_emb_qkv_(
            tensors["qkv"], cos, sin, interleaved, num_heads_q=heads, headdim=width
        )
        return split_heads(qkv, problem)

    entrance = "qkv" in problem.tensors and problem.direction != FORWARD
    note = "in place" if "qkv" in problem.tensors else ""
    return Prepared(back(call(problem, turned, entrance=entrance)), restore, note)
