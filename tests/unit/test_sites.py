"""Which stage has a tensor or computes a site, where a rank owns several stages and halves."""

from __future__ import annotations

import pytest
import torch
from commands import run

from megalite.models.llama import LlamaStage
from megalite.models.stage import stage_specs
from megalite.parallel.tensor import TensorGroup
from megalite.verification.definition import weight_shapes
from megalite.verification.sites import stage_of, watch_stage

V = "--pp 2 --schedule zb-v --pp-layers 1.5,0.5,1.5,0.5"
"""Stages 0 and 3 on rank 0, 1 and 2 on rank 1: layer 0 and attention of 1; MLP of 1; layer 2 and
attention of 3; MLP of 3."""


@pytest.mark.parametrize(
    ("name", "pp_rank", "stage"),
    [
        ("embedding", 0, 0),
        ("model.embed_tokens.weight", 0, 0),
        ("layers.0.mlp.down", 0, 0),
        ("layers.1.input", 0, 0),
        ("model.layers.1.input_layernorm.weight", 0, 0),
        ("model.layers.1.self_attn.q_proj.weight", 0, 0),
        ("layers.1.attention.mixed", 0, 0),
        # The sum between the halves is seen where it is made and where it arrives.
        ("layers.1.middle", 0, 0),
        ("layers.1.middle", 1, 1),
        ("model.layers.1.post_attention_layernorm.weight", 1, 1),
        ("layers.1.mlp_norm", 1, 1),
        ("model.layers.1.mlp.gate_proj.weight", 1, 1),
        ("layers.1.output", 1, 1),
        ("layers.2.input", 1, 2),
        ("layers.3.attention.out", 1, 2),
        ("layers.3.mlp.activated", 0, 3),
        ("model.norm.weight", 0, 3),
        ("norm", 0, 3),
        ("head", 0, 3),
        ("lm_head.weight", 0, 3),
    ],
)
def test_stage_of(name: str, pp_rank: int, stage: int) -> None:
    assert stage_of(run(*V.split()), name, pp_rank) == stage


def test_a_tied_embedding_is_in_the_last_stage_too() -> None:
    config = run("--pp", "2", "--tie-embeddings")
    assert [stage_of(config, "model.embed_tokens.weight", rank) for rank in (0, 1)] == [0, 1]


def test_every_tensor_has_a_stage_on_the_rank_that_holds_it() -> None:
    config = run(*V.split())
    owners = (0, 1, 1, 0)
    for spec in stage_specs(config):
        stage = LlamaStage(
            config,
            spec,
            tp=TensorGroup.solo(),
            dtype=torch.float32,
            device=torch.device("meta"),
        )
        names = {p.name for m in stage.modules() if hasattr(m, "shard") for p in m.shard.pieces}
        assert names <= set(weight_shapes(config))
        assert {stage_of(config, name, owners[spec.stage]) for name in names} == {spec.stage}


def test_halves_are_watched_at_every_site() -> None:
    """All stages together see what the definition does, and both ends of a cut layer its middle."""
    config = run(*V.split(), "--num-layers", "4", "--hidden-size", "32", "--seq-length", "8")
    seen: list[str] = []
    x = torch.zeros(2, 8, dtype=torch.long)
    for spec in stage_specs(config):
        stage = LlamaStage(
            config, spec, tp=TensorGroup.solo(), dtype=torch.float32, device=torch.device("cpu")
        )
        for parameter in stage.parameters():
            torch.nn.init.normal_(parameter)
        watch_stage(stage, lambda site, _: seen.append(site))
        x = stage(x)
    assert seen.count("layers.1.middle") == seen.count("layers.3.middle") == 2
    sites = ["input", "attention_norm", "attention.qkv", "attention.mixed", "attention.out"]
    sites += ["middle", "mlp_norm", "mlp.gate_up", "mlp.activated", "mlp.down", "output"]
    wanted = [f"layers.{layer}.{site}" for layer in range(4) for site in sites]
    assert list(dict.fromkeys(seen)) == ["embedding", *wanted, "norm", "head"]
