"""NVIDIA apex, where it is built; the package of that name on PyPI is a stranger's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from kernel_bench.problem import Prepared, Problem, UnsupportedError, call

ITS_FILES = ("multi_tensor_apply/multi_tensor_apply.py", "optimizers/fused_adam.py")
CHUNK_ELEMENTS = 2048 * 32
"""As its optimizers cut tensors."""


def missing() -> str | None:
    """Why it can't take part; None if it can. Imports nothing that is named apex."""
    if importlib.util.find_spec("amp_C") is None:
        return "no amp_C extension, which NVIDIA's apex builds"
    spec = importlib.util.find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return "no package"
    root = Path(next(iter(spec.submodule_search_locations)))
    if not all((root / name).is_file() for name in ITS_FILES):
        return "a package named apex that is not NVIDIA's"
    return None


def build(problem: Problem) -> Prepared:
    """RMSNorm and Adam; its softmax kernels are measured as Megatron's."""
    if problem.op == "rms_norm":
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        eps = problem.options["eps"]
        return Prepared(
            call(
                problem,
                lambda t: (fused_rms_norm_affine(t["x"], t["weight"], t["weight"].shape, eps),),
            )
        )
    if problem.op == "adamw":
        return _adamw(problem)
    raise UnsupportedError("not measured")


def _adamw(problem: Problem) -> Prepared:
    import amp_C

    tensors, options = problem.tensors, problem.options
    state = [tensors[name] for name in ("gradient", "master", "exp_avg", "exp_avg_sq")]
    gradient = state[0] = state[0].clone()
    overflow = torch.zeros(1, dtype=torch.int32, device=gradient.device)
    step = int(tensors["step"]) + 1
    beta1, beta2 = options["beta1"], options["beta2"]

    def run() -> tuple[Tensor, ...]:
        gradient.mul_(tensors["scale"])
        amp_C.multi_tensor_adam(
            *(CHUNK_ELEMENTS, overflow, [[tensor] for tensor in state]),
            *(options["lr"], beta1, beta2, options["eps"], step, 1, True, options["weight_decay"]),
        )
        tensors["copy"].copy_(tensors["master"])
        return tensors["master"], tensors["exp_avg"], tensors["exp_avg_sq"], tensors["copy"]

    def restore() -> None:
        gradient.copy_(tensors["gradient"])

    return Prepared(run, restore, "mul_, step, copy_")
