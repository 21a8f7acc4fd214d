"""torch as it is, and through torch.compile."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw as step_adamw

from kernel_bench.cases_rows import split_heads
from kernel_bench.problem import BACKWARD, Outputs, Prepared, Problem, UnsupportedError, call

Tensors = Mapping[str, Tensor]


def build(problem: Problem) -> Prepared:
    """The op in torch's own functions."""
    if problem.op == "adamw":
        return adamw(problem, separately=True, fused=True)
    return Prepared(call(problem, function(problem)))


def build_step_only(problem: Problem) -> Prepared:
    """torch's fused AdamW without the clip factor and the copy, which the others have to do."""
    if problem.op != "adamw":
        raise UnsupportedError("of adamw only")
    return adamw(problem, separately=False, fused=True)


def build_compiled(problem: Problem, mode: str) -> Prepared:
    """The same functions, compiled for these shapes."""
    if problem.op == "adamw":
        raise UnsupportedError("torch's fused AdamW is a kernel already")
    torch.compiler.reset()
    # A backward that runs often on one graph must leave what the forward kept.
    torch._functorch.config.donated_buffer = problem.direction != BACKWARD
    compiled = torch.compile(function(problem), mode=mode, dynamic=False, fullgraph=True)
    return Prepared(call(problem, compiled))


def function(problem: Problem) -> Outputs:
    """What a user of torch would write."""
    options, op = problem.options, problem.op
    if op in ("rms_norm", "add_rms_norm"):
        eps = options["eps"]

        def normed(tensors: Tensors) -> tuple[Tensor, ...]:
            x, weight = tensors["x"], tensors["weight"]
            if "residual" not in tensors:
                return (F.rms_norm(x, weight.shape, weight, eps),)
            x = x + tensors["residual"]
            return F.rms_norm(x, weight.shape, weight, eps), x

        return normed
    if op.startswith("rope"):
        return _rope(problem)
    if op.startswith("softmax"):
        return _softmax(problem)
    if op == "swiglu":

        def activated(tensors: Tensors) -> tuple[Tensor, ...]:
            gate, up = tensors["gate_up"].chunk(2, dim=-1)
            return (F.silu(gate) * up,)

        return activated
    if op == "cross_entropy":
        return lambda tensors: (F.cross_entropy(tensors["logits"].float(), tensors["targets"]),)
    if op == "linear_cross_entropy":

        def loss(tensors: Tensors) -> tuple[Tensor, ...]:
            logits = tensors["hidden"] @ tensors["weight"].t()
            return (F.cross_entropy(logits.float(), tensors["targets"]),)

        return loss
    raise UnsupportedError(f"no {op} in torch")


def adamw(problem: Problem, *, separately: bool, fused: bool) -> Prepared:
    """torch's AdamW, fused or by lists of tensors, clip and copy before and after it if asked."""
    tensors, options = problem.tensors, problem.options
    step = tensors["step"].clone()
    gradient = tensors["gradient"].clone() if separately else tensors["gradient"]
    state = [tensors[name] for name in ("master", "exp_avg", "exp_avg_sq")]
    names = ("lr", "beta1", "beta2", "eps", "weight_decay")
    numbers = {name: options[name] for name in names}

    def run() -> tuple[Tensor, ...]:
        if separately:
            gradient.mul_(tensors["scale"])
        master, exp_avg, exp_avg_sq = state
        step_adamw(
            [master],
            [gradient],
            [exp_avg],
            [exp_avg_sq],
            [],
            [step],
            fused=fused,
            foreach=not fused,
            capturable=True,
            amsgrad=False,
            maximize=False,
            **numbers,
        )
        if separately:
            tensors["copy"].copy_(master)
        return (*state, tensors["copy"])

    def restore() -> None:
        gradient.copy_(tensors["gradient"])

    note = "mul_, step, copy_" if separately else "step only: 28 of the 30 bytes"
    return Prepared(run, restore if separately else None, note)


def _rope(problem: Problem) -> Outputs:
    """As Hugging Face's LLaMA does it, with tables of the inputs' dtype."""
    dtype = next(iter(problem.gradients)).dtype
    interleaved = problem.options["layout"] == "interleaved"

    def table(t: Tensor) -> Tensor:
        t = t.to(dtype)[:, :, None]
        return t.repeat_interleave(2, dim=-1) if interleaved else torch.cat([t, t], dim=-1)

    cos, sin = table(problem.tensors["cos"]), table(problem.tensors["sin"])

    def rotated(x: Tensor) -> Tensor:
        if interleaved:
            return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([-b, a], dim=-1)

    def turned(tensors: Tensors) -> tuple[Tensor, ...]:
        if "qkv" in tensors:
            q, k, v = split_heads(tensors["qkv"], problem)
            return q * cos + rotated(q) * sin, k * cos + rotated(k) * sin, v
        q, k = tensors["q"], tensors["k"]
        return q * cos + rotated(q) * sin, k * cos + rotated(k) * sin

    return turned


def _softmax(problem: Problem) -> Outputs:
    scale, causal = problem.options["scale"], problem.options["causal"]

    def probabilities(tensors: Tensors) -> tuple[Tensor, ...]:
        x = tensors["x"] * scale
        if "mask" in tensors:
            x = x.masked_fill(tensors["mask"], -torch.inf)
        if causal:
            place = torch.arange(x.shape[-1], device=x.device)
            x = x.masked_fill(place > place[:, None], -torch.inf)
        return (x.softmax(-1),)

    return probabilities
