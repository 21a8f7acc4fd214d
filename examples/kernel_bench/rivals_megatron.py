"""Megatron-core's fused ops, and what it falls back to without Transformer Engine and apex."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor

from kernel_bench.cases_rows import split_heads
from kernel_bench.problem import Outputs, Prepared, Problem, UnsupportedError, call
from kernel_bench.rivals_torch import adamw

Tensors = Mapping[str, Tensor]


def build(problem: Problem) -> Prepared:
    """Its path for this op on a machine like this one."""
    op = problem.op
    if op == "adamw":
        prepared = adamw(problem, separately=True, fused=False)
        return Prepared(prepared.run, prepared.restore, "torch.optim.AdamW, foreach")
    if op.startswith("rope"):
        return Prepared(call(problem, _rope(problem)), note="unfused")
    if op.startswith("softmax"):
        fused = _has_softmax_kernels()
        note = "fused kernel" if fused and problem.size[-1] <= 4096 else "torch fallback"
        return Prepared(call(problem, _softmax(problem, fused)), note=note)
    if op == "swiglu":
        from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

        torch.compiler.reset()
        return Prepared(call(problem, lambda t: (bias_swiglu_impl(t["gate_up"], None),)))
    if op == "cross_entropy":
        raise UnsupportedError("its loss is vocab-parallel: see --op vocab_parallel_cross_entropy")
    if op == "linear_cross_entropy":
        raise UnsupportedError("no kernel for Hopper")
    raise UnsupportedError("torch's own without Transformer Engine")


def _has_softmax_kernels() -> bool:
    """Built with apex: then it may use them, up to 4096 keys."""
    return importlib.util.find_spec("scaled_masked_softmax_cuda") is not None


def _softmax(problem: Problem, fused: bool) -> Outputs:
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.utils import attention_mask_func

    dtype = problem.tensors["x"].dtype
    causal = problem.options["causal"]
    softmax = FusedScaleMaskSoftmax(
        input_in_fp16=dtype == torch.float16,
        input_in_bf16=dtype == torch.bfloat16,
        attn_mask_type=AttnMaskType.causal if causal else AttnMaskType.padding,
        scaled_masked_softmax_fusion=fused,
        mask_func=attention_mask_func,
        softmax_in_fp32=True,
        scale=problem.options["scale"],
    )
    return lambda t: (softmax(t["x"], t.get("mask")),)


def _rope(problem: Problem) -> Outputs:
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    interleaved = problem.options["layout"] == "interleaved"
    config = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=interleaved, multi_latent_attention=False
    )
    group = SimpleNamespace()  # of context parallelism: asked for, and not used on this path
    tables = problem.tensors
    angles = torch.atan2(tables["sin"].double(), tables["cos"].double()).float()[:, :, None]
    if interleaved:
        angles = angles.repeat_interleave(2, dim=-1)
    else:
        angles = torch.cat([angles, angles], dim=-1)

    def turned(tensors: Tensors) -> tuple[Tensor, ...]:
        packed = "qkv" in tensors
        q, k, *rest = (
            split_heads(tensors["qkv"], problem) if packed else (tensors["q"], tensors["k"])
        )
        pair = (apply_rotary_pos_emb(x, angles, config, cp_group=group) for x in (q, k))
        return *pair, *rest

    return turned
