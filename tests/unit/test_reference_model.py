"""With equal weights our logits and loss are those of transformers' LlamaForCausalLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalite.config import Config, resolve
from megalite.layers.shard import initialize, named_shards
from megalite.models.llama import LlamaStage
from megalite.models.stage import stage_specs
from megalite.parallel.tensor import TensorGroup

transformers = pytest.importorskip("transformers")

SHAPE = dict(
    num_layers=3,
    hidden_size=64,
    num_attention_heads=4,
    ffn_hidden_size=96,
    vocab_size=101,
    seq_length=48,
    init_method_std=0.1,
)

LLAMA3 = dict(
    rope_scaling="llama3",
    rope_theta=500000.0,
    rope_scaling_factor=8.0,
    # So short that all three ranges of frequencies occur.
    rope_original_seq_length=16,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped": dict(num_kv_heads=2),
    "one-kv-head": dict(num_kv_heads=1),
    "llama3-rope": dict(num_kv_heads=2, **LLAMA3),
    "linear-rope": dict(rope_scaling="linear", rope_scaling_factor=2.0),
    "yarn-rope": dict(rope_scaling="yarn", rope_scaling_factor=4.0, rope_original_seq_length=16),
    "tied": dict(tie_embeddings=True),
    "wide-heads": dict(head_dim=32, num_kv_heads=2),
}


def reference(config: Config) -> Any:
    model = config.model
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling == "llama3":
        rope = {
            "rope_type": "llama3",
            "rope_theta": model.rope_theta,
            "factor": model.rope_scaling_factor,
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_seq_length,
        }
    elif model.rope_scaling != "none":
        rope |= {"rope_type": model.rope_scaling, "factor": model.rope_scaling_factor}
    if model.rope_scaling == "yarn":
        rope["original_max_position_embeddings"] = model.rope_original_seq_length
    if int(transformers.__version__.split(".")[0]) >= 5:
        extra: dict[str, Any] = {"rope_parameters": rope}
    else:
        scaling = None if rope["rope_type"] == "default" else rope
        extra = {"rope_theta": model.rope_theta, "rope_scaling": scaling}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            rms_norm_eps=model.norm_epsilon,
            tie_word_embeddings=model.tie_embeddings,
            max_position_embeddings=model.seq_length,
            attn_implementation="eager",
            **extra,
        )
    ).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_loss_equal_transformers(variant: str) -> None:
    config = resolve(Config().replace(**{**SHAPE, **VARIANTS[variant]}))
    (spec,) = stage_specs(config)
    stage = LlamaStage(
        config, spec, tp=TensorGroup.solo(), dtype=torch.float32, device=torch.device("cpu")
    )
    initialize(stage, 3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter, shard in named_shards(stage):
            if shard.init_std is None:  # ones would hide a norm weight that is not applied
                parameter.uniform_(0.5, 1.5, generator=generator)
    weights = {
        piece.name: piece.of(parameter.detach())
        for parameter, shard in named_shards(stage)
        for piece in shard.pieces
    }
    theirs = reference(config)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.model.tie_embeddings else set())
    theirs.tie_weights()
    tokens = torch.randint(0, 101, (2, 49), generator=torch.Generator().manual_seed(5))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        want = theirs(inputs).logits
        logits = stage(inputs)
        losses = stage.token_losses(logits, labels)
    ours = logits.transpose(0, 1)[..., :101]
    assert want.abs().max() > 1.0, "the comparison must not be between two zeros"
    assert (ours - want).abs().max() <= 1e-5
    want_loss = torch.nn.functional.cross_entropy(want.reshape(-1, 101), labels.reshape(-1))
    assert abs(losses.mean().item() - want_loss.item()) <= 1e-5
