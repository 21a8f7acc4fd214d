"""megalite's kernels, called as its layers call them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

import megalite_kernels as kernels
from kernel_bench.problem import (
    FORWARD,
    Builder,
    Outputs,
    Prepared,
    Problem,
    UnsupportedError,
    call,
    in_place,
)

Tensors = Mapping[str, Tensor]
LINEAR = "linear_cross_entropy"


def build(problem: Problem) -> Prepared:
    """The fused op; in place where the model uses it so."""
    if problem.op.startswith("rope_packed"):
        problem, restore = in_place(problem, ["qkv"])
        entrance = problem.direction != FORWARD
        return Prepared(call(problem, _packed(problem), entrance=entrance), restore, "in place")
    if problem.op == "cross_entropy":
        problem, restore = in_place(problem, ["logits"])
        return Prepared(call(problem, _loss), restore, "gradient in the logits' place")
    if problem.op == LINEAR:
        return Prepared(call(problem, _linear), note="both gradients in the forward")
    if problem.op == "adamw":
        return _adamw(problem)
    return Prepared(call(problem, function(problem)))


def function(problem: Problem) -> Outputs:
    """The op as a function of the problem's tensors."""
    op, options = problem.op, problem.options
    if op == "rms_norm":
        return lambda t: (kernels.rms_norm(t["x"], t["weight"], options["eps"]),)
    if op == "add_rms_norm":
        return lambda t: kernels.add_rms_norm(t["x"], t["residual"], t["weight"], options["eps"])
    if op.startswith("rope"):
        return lambda t: kernels.rope(t["q"], t["k"], t["cos"], t["sin"], options["layout"])
    if op.startswith("softmax"):
        scale, causal = options["scale"], options["causal"]
        return lambda t: (kernels.softmax(t["x"], scale, t.get("mask"), causal),)
    if op == "swiglu":
        return lambda t: (kernels.swiglu(t["gate_up"]),)
    raise UnsupportedError(f"no {op}")


def _packed(problem: Problem) -> Outputs:
    options = problem.options
    heads = (options["heads"], options["kv_heads"], options["layout"], True)
    return lambda t: kernels.rope_packed(t["qkv"], t["cos"], t["sin"], *heads)


def _loss(tensors: Tensors) -> tuple[Tensor, ...]:
    total, _ = kernels.cross_entropy_with_grad(
        tensors["logits"], tensors["targets"], tensors["token_weight"]
    )
    return (total,)


def _linear(tensors: Tensors) -> tuple[Tensor, ...]:
    total, _ = kernels.linear_cross_entropy(
        tensors["hidden"], tensors["weight"], tensors["targets"], tensors["token_weight"]
    )
    return (total,)


def _unfused(tensors: Tensors) -> tuple[Tensor, ...]:
    logits = F.linear(tensors["hidden"], tensors["weight"])
    total, _ = kernels.cross_entropy_with_grad(logits, tensors["targets"], tensors["token_weight"])
    return (total,)


def build_unfused(problem: Problem) -> Prepared:
    """The projection with whole logits, and the loss with its gradient in their place."""
    _linear_only(problem)
    return Prepared(call(problem, _unfused), note="whole logits")


def build_main(problem: Problem) -> Prepared:
    """The weight's gradient goes into an fp32 buffer that training keeps."""
    _linear_only(problem)
    tensors = problem.tensors
    main_grad = torch.zeros_like(tensors["weight"], dtype=torch.float32)
    hidden, weight = (tensors[name].detach().requires_grad_() for name in problem.leaves)

    def run() -> tuple[Tensor, ...]:
        total, _ = kernels.linear_cross_entropy(
            hidden, weight, tensors["targets"], tensors["token_weight"], main_grad
        )
        (gradient,) = torch.autograd.grad(total, [hidden])
        return total.detach(), gradient, main_grad

    def restore() -> None:
        main_grad.zero_()

    return Prepared(run, restore, "adds to an fp32 main_grad, which the peak leaves out")


def _linear_only(problem: Problem) -> None:
    if problem.op != LINEAR:
        raise UnsupportedError(f"of {LINEAR} only")


def _adamw(problem: Problem) -> Prepared:
    tensors = problem.tensors
    step = tensors["step"] + 1  # which this one is
    state = [tensors[name] for name in ("master", "gradient", "exp_avg", "exp_avg_sq")]
    results = (state[0], state[2], state[3], tensors["copy"])

    def run() -> tuple[Tensor, ...]:
        kernels.adamw_(
            *state, step, scale=tensors["scale"], copy=tensors["copy"], **problem.options
        )
        return results

    return Prepared(run)


BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {"ours": build, "ours-main": build_main, "ours-unfused": build_unfused}
)
"""By contestant. The goals judge the first, whose gradients are what the rivals' are."""
