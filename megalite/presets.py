"""Named starting points for `--model`. A preset sets fields; flags and files override it.

Sources: LLaMA 2 (arXiv:2307.09288), Llama 3 (arXiv:2407.21783) and their published configurations.
Parameter counts are checked against the published ones in `tests/unit/test_presets.py`.
No torch import.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

LARGE_RUN: Mapping[str, Any] = MappingProxyType(
    dict(
        micro_batch_size=1,
        global_batch_size=64,
        steps=1000,
        lr=3e-4,
        min_lr=3e-5,
        eval_interval=250,
    )
)
"""How a large model is trained, where nothing else is said."""


def _llama2(layers: int, hidden: int, heads: int, ffn: int, kv_heads: int = 0) -> dict[str, Any]:
    return dict(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        ffn_hidden_size=ffn,
        vocab_size=32000,
        seq_length=4096,
        **LARGE_RUN,
    )


def _llama3(
    layers: int, hidden: int, heads: int, ffn: int, head_dim: int = 128, **extra: Any
) -> dict[str, Any]:
    return dict(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        ffn_hidden_size=ffn,
        vocab_size=128256,
        seq_length=8192,
        rope_theta=500000.0,
        **LARGE_RUN,
        **extra,
    )


_LLAMA31_ROPE: Mapping[str, Any] = MappingProxyType(
    dict(rope_scaling="llama3", rope_scaling_factor=8.0)
)
_LLAMA32_ROPE: Mapping[str, Any] = MappingProxyType(
    dict(rope_scaling="llama3", rope_scaling_factor=32.0)
)

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Its shape is the fields' own defaults: 0.9 M parameters, two minutes on a laptop's CPU.
        "tiny": dict(
            init_method_std=0.06,
            micro_batch_size=8,
            global_batch_size=32,
            steps=120,
            lr=4e-3,
            eval_steps=8,
        ),
        "125m": dict(
            num_layers=12,
            hidden_size=768,
            num_attention_heads=12,
            num_kv_heads=12,
            ffn_hidden_size=2048,
            vocab_size=32000,
            seq_length=2048,
            micro_batch_size=8,
            global_batch_size=64,
            steps=1000,
            lr=6e-4,
            min_lr=6e-5,
            eval_interval=250,
        ),
        "1b": dict(
            num_layers=16,
            hidden_size=2048,
            num_attention_heads=32,
            num_kv_heads=8,
            ffn_hidden_size=8192,
            vocab_size=32000,
            seq_length=4096,
            micro_batch_size=2,
            global_batch_size=32,
            steps=1000,
            lr=3e-4,
            min_lr=3e-5,
            eval_interval=250,
        ),
        "llama2-7b": _llama2(32, 4096, 32, 11008),
        "llama2-13b": _llama2(40, 5120, 40, 13824),
        "llama2-70b": _llama2(80, 8192, 64, 28672, kv_heads=8),
        "llama3-8b": _llama3(32, 4096, 32, 14336),
        "llama3-70b": _llama3(80, 8192, 64, 28672),
        "llama3.1-8b": _llama3(32, 4096, 32, 14336, **_LLAMA31_ROPE),
        "llama3.1-70b": _llama3(80, 8192, 64, 28672, **_LLAMA31_ROPE),
        "llama3.1-405b": _llama3(126, 16384, 128, 53248, **_LLAMA31_ROPE),
        "llama3.2-1b": _llama3(
            16, 2048, 32, 8192, head_dim=64, tie_embeddings=True, **_LLAMA32_ROPE
        ),
        "llama3.2-3b": _llama3(28, 3072, 24, 8192, tie_embeddings=True, **_LLAMA32_ROPE),
    }
)
