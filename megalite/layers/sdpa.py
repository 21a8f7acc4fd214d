"""Causal attention by torch's kernels, and which of them run.

Legend: S sequence, B micro-batch, N query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalite.config import Config
from megalite.layers.batch import Documents
from megalite.layers.dtypes import weights_dtype


def causal_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V over the keys up to each query's own position.

    Args:
        q, k, v: [B, N, S, D], [B, K, S, D], [B, K, S, D], any strides.
        documents: a query sees keys of its own document only; None: of the whole sample.

    Returns:
        [B, N, S, D].
    """
    grouped = q.shape[1] != k.shape[1]
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if _has_varlen(q.device, q.dtype):
        return _varlen_attention(q, k, v, documents)
    mask = documents.mask()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def _has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel takes documents as they are, without a mask of S x S."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """The documents one after the other as sequences of their own: what lies between them is not
    computed. Source: Dao, "FlashAttention-2", arXiv:2307.08691."""
    # It imports torch's compiler: a second at every start for what few runs need.
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, length, dim = q.shape
    # Not every version of torch takes fewer key/value heads here.
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.transpose(1, 2).reshape(batch * length, -1, dim) for x in (q, k, v))
    bounds, longest = documents.bounds, documents.longest
    mixed = varlen_attn(
        q,
        k,
        v,
        cu_seq_q=bounds,
        cu_seq_k=bounds,
        max_q=longest,
        max_k=longest,
        window_size=(-1, 0),
    )
    assert isinstance(mixed, Tensor), "no auxiliary results were asked for"
    return mixed.view(batch, length, heads, dim).transpose(1, 2)


def fastest_attention(device: torch.device) -> AbstractContextManager[None]:
    """Let `scaled_dot_product_attention` take the fastest kernel that can serve, while it is held.

    On Hopper cuDNN's kernel comes first: 455 TFLOP/s forward and backward at head dim 128 on an
    H100, against 275 of the flash kernel that torch would take by itself.
    """
    if device.type != "cuda":
        return nullcontext()
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)


def has_softmax(config: Config) -> bool:
    """Whether this run's attention is matrix products with a softmax of its own between them."""
    return config.train.attention == "fused-softmax" or config.model.attention_dropout > 0


def attention_back_end(config: Config, device: torch.device) -> str:
    """Name of the kernel that serves this run's attention, for its opening lines."""
    if has_softmax(config):
        dropout = " (dropout)" if config.train.attention != "fused-softmax" else ""
        return f"matrix products and softmax{dropout}"
    if device.type != "cuda":
        return "torch SDPA"
    model, tp = config.model, config.parallel.tp
    dtype = weights_dtype(config)
    if config.data.reset_attention_mask:
        varlen = _has_varlen(device, dtype)
        return "torch varlen, flash" if varlen else "torch SDPA with a mask"
    heads, kv_heads = model.num_attention_heads // tp, max(1, model.num_kv_heads // tp)
    q, kv = (
        torch.empty(1, n, 128, model.head_dim, dtype=dtype, device=device)
        for n in (heads, kv_heads)
    )
    params = cuda.SDPAParams(q, kv, kv, None, 0.0, True, heads != kv_heads)
    for name, serves in (
        ("cuDNN", cuda.can_use_cudnn_attention),
        ("flash", cuda.can_use_flash_attention),
        ("memory-efficient", cuda.can_use_efficient_attention),
    ):
        if serves(params, False):
            return f"torch SDPA, {name}"
    return "torch SDPA, math"
