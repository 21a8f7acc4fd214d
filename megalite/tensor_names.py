"""The names of the whole model's tensors, and which of them one matrix holds. No torch import.

Names are Hugging Face's. `tests/unit/test_treatment.py` holds them against the modules.
"""

from __future__ import annotations

from megalite.config import Config
from megalite.config_model import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

_PACKED = (
    ("input_layernorm",),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("post_attention_layernorm",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Of a layer, what lies together."""


def parameter_names(config: Config) -> tuple[tuple[str, ...], ...]:
    """Each parameter of the whole model as the names of the tensors packed in it, in order."""
    layers = [
        tuple(f"model.layers.{layer}.{part}.weight" for part in packed)
        for layer in range(config.model.num_layers)
        for packed in _PACKED
    ]
    heads = () if config.model.tie_embeddings else ((HEAD,),)
    return ((EMBEDDING,), *layers, (FINAL_NORM,), *heads)


def tensor_names(config: Config) -> tuple[str, ...]:
    """Every whole tensor, in the order of the forward; a tied head is the embedding."""
    return tuple(name for packed in parameter_names(config) for name in packed)


def tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every whole tensor's shape, without padding, in the order of the forward.

    Args:
        model: resolved.
    """
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    query, key_value = (
        heads * model.head_dim for heads in (model.num_attention_heads, model.num_kv_heads)
    )
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, hidden)}
    for layer in range(model.num_layers):
        for part, shape in of_layer.items():
            shapes[f"model.layers.{layer}.{part}.weight"] = shape
    shapes[FINAL_NORM] = (hidden,)
    if not model.tie_embeddings:
        shapes[HEAD] = (model.vocab_size, hidden)
    return shapes


def is_norm(name: str) -> bool:
    """Whether the tensor is a norm's weight, which does not decay unless told to."""
    return name.endswith("norm.weight")


def layer_of(name: str) -> int | None:
    """The layer that a tensor is of; None: of none."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def in_layer(name: str, layer: int) -> str:
    """The tensor in the place of this one in another layer."""
    parts = name.split(".")
    return ".".join((*parts[:2], str(layer), *parts[3:]))
