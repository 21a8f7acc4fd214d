"""A layer in two halves, on two stages, computes the numbers of the whole layer bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import Config, resolve
from megalite.layers.batch import DropoutPlace
from megalite.layers.shard import initialize, named_shards
from megalite.models.llama import LlamaStage
from megalite.models.stage import stage_specs
from megalite.parallel.tensor import TensorGroup

SHAPE: dict[str, Any] = dict(
    num_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    num_kv_heads=2,
    ffn_hidden_size=48,
    vocab_size=101,
    seq_length=12,
    init_method_std=0.2,
)


def stages_of(config: Config, dtype: torch.dtype) -> list[LlamaStage]:
    """All stages, on one rank."""
    where: dict[str, Any] = dict(tp=TensorGroup.solo(), dtype=dtype, device=torch.device("cpu"))
    stages = [LlamaStage(config, spec, **where) for spec in stage_specs(config)]
    for stage in stages:
        initialize(stage, 3)
    return stages


def step(config: Config, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of each whole tensor."""
    stages = stages_of(config, dtype)
    tokens = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(5))
    place = DropoutPlace(7, 1, torch.arange(2))
    x = tokens
    for stage in stages:
        x = stage(x, place)
    stages[-1].token_losses(x, tokens).sum().backward()
    gradients = {
        piece.name: piece.of(parameter.grad)
        for stage in stages
        for parameter, shard in named_shards(stage)
        if parameter.grad is not None
        for piece in shard.pieces
    }
    return x.detach(), gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(hidden_dropout=0.2, attention_dropout=0.1),
        dict(recompute="full", hidden_dropout=0.2),
        dict(recompute="selective"),
    ],
    ids=str,
)
@pytest.mark.parametrize("split", [(1.5, 1.5), (0.5, 0.5, 2), (0.5,) * 6, (1, 0.5, 1, 0.5)])
def test_halves_are_the_whole(
    split: tuple[float, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    values = {**SHAPE, **options}
    logits, gradients = step(resolve(Config().replace(**values)), dtype)
    cut = resolve(Config().replace(**values, pp=len(split), pp_layers=split))
    cut_logits, cut_gradients = step(cut, dtype)
    assert logits.abs().max() > 0.1
    assert torch.equal(logits, cut_logits)
    assert len(gradients) == 3 * 9 + 3
    assert gradients.keys() == cut_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, cut_gradients[name]), name


def test_names_and_owners_of_tensors() -> None:
    config = resolve(Config().replace(**SHAPE, pp=2, pp_layers=(1.5, 1.5)))
    first, second = (
        {piece.name for _, shard in named_shards(stage) for piece in shard.pieces}
        for stage in stages_of(config, torch.float32)
    )
    assert not first & second
    assert {name.removeprefix("model.layers.1.") for name in first if ".1." in name} == {
        "input_layernorm.weight",
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    }
    assert {name.removeprefix("model.layers.1.") for name in second if ".1." in name} == {
        "post_attention_layernorm.weight",
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }


def test_full_recomputation_keeps_the_input_of_each_half() -> None:
    """A stage of an MLP and a layer keeps two inputs, not the insides of either."""
    config = resolve(Config().replace(**SHAPE, pp=2, pp_layers=(1.5, 1.5), recompute="full"))
    stage = stages_of(config, torch.float32)[0]
    kept: list[tuple[int, ...]] = []
    own = {parameter.data_ptr() for parameter in [*stage.parameters(), *stage.buffers()]}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own and tensor.is_floating_point():
            kept.append(tuple(tensor.shape))
        return tensor

    tokens = torch.zeros(2, 12, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stage(tokens)
    assert kept.count((12, 2, 32)) == len(kept) == 2
