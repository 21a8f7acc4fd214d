"""What the blocks of a model cost, and so the stages made of them. No torch import."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from megalite.config import Config
from megalite.estimate import kept_bytes, kept_for_weights_bytes
from megalite.models.stage import (
    StageSpec,
    attention_cost_in_layers,
    head_cost_in_layers,
    stage_specs,
)
from megalite.pipeline.costs import Costs

SCORES_BACKWARD = 2.5
"""Work of attention's backward over that of its forward: five products for two."""

BESIDE_ON_GPU = 0.15
"""`Costs.beside`: NCCL's kernel holds multiprocessors while it waits. Measured on an H200: 42.4 ms
in place of 35.8 for backwards beside which a message waits most of the time."""


@dataclass(frozen=True)
class BlockCosts:
    """One block and one micro-batch: times in one unit, sizes in bytes; see `Costs`."""

    forward: float
    backward: float
    input_gradient: float
    weight_gradient: float
    kept: float
    kept_for_weights: float


@dataclass(frozen=True)
class ModelCosts:
    """The parts that stages are made of, and the time of a message between ranks."""

    embedding: BlockCosts
    attention: BlockCosts
    mlp: BlockCosts
    head: BlockCosts
    message: float

    def of(self, spec: StageSpec) -> Iterator[BlockCosts]:
        """The parts of a stage."""
        if spec.has_embedding:
            yield self.embedding
        for block in spec.blocks:
            yield self.mlp if block % 2 else self.attention
        if spec.has_head:
            yield self.head


def _whole(costs: BlockCosts) -> BlockCosts:
    """A part whose weight gradient is computed with the input's."""
    return replace(costs, input_gradient=costs.backward, weight_gradient=0.0, kept_for_weights=0.0)


def part_specs() -> dict[str, StageSpec]:
    """A stage of one part each, by its name in `ModelCosts`."""
    return {
        "embedding": StageSpec(0, 0, 0, has_embedding=True, has_head=False),
        "attention": StageSpec(0, 0, 1, has_embedding=False, has_head=False),
        "mlp": StageSpec(0, 1, 1, has_embedding=False, has_head=False),
        "head": StageSpec(0, 0, 0, has_embedding=False, has_head=True),
    }


def stage_costs(config: Config, costs: ModelCosts) -> Costs:
    """Costs of each stage of a run whose schedule is chosen."""
    names = [field.name for field in fields(BlockCosts)]
    sums = {
        name: tuple(
            sum(getattr(part, name) for part in costs.of(spec)) for spec in stage_specs(config)
        )
        for name in names
    }
    again = tuple(_kept_once(config, spec) for spec in stage_specs(config))
    sums["kept"] = tuple(k - twice for k, twice in zip(sums["kept"], again, strict=True))
    beside = BESIDE_ON_GPU if config.parallel.device == "cuda" else 0.0
    return Costs(message=costs.message, beside=beside, **sums)


def _kept_once(config: Config, spec: StageSpec) -> float:
    """Bytes that the parts count twice: a layer that is computed again keeps one input."""
    if config.train.recompute != "full":
        return 0.0
    checkpoint = kept_bytes(config, part_specs()["mlp"])
    return float(checkpoint * sum(part.is_whole for part in spec.parts))


def estimated_costs(config: Config) -> ModelCosts:
    """From the shape alone: the time unit is the forward of a layer, messages take none.

    A gradient takes as long as the forward for each of a matrix's two sides; attention's scores
    have no weights, so all of their backward is the input's.
    """
    head, attention = head_cost_in_layers(config), attention_cost_in_layers(config)
    model = config.model
    heads = model.num_attention_heads * model.head_dim
    projections = model.hidden_size * (model.qkv_features + heads)
    scores = attention * heads * model.seq_length / (projections + heads * model.seq_length)
    again = config.train.recompute == "full"
    specs = part_specs()

    def block(name: str, matrices: float, unweighted: float = 0.0) -> BlockCosts:
        forward = matrices + unweighted
        inputs = matrices + SCORES_BACKWARD * unweighted
        if again and name in ("attention", "mlp"):
            inputs += forward
        elif config.train.recompute == "selective":
            inputs += unweighted
        kept = kept_bytes(config, specs[name])
        left = kept_for_weights_bytes(config, specs[name])
        return BlockCosts(forward, inputs + matrices, inputs, matrices, kept, left)

    lookup = BlockCosts(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    return ModelCosts(
        embedding=lookup,
        attention=block("attention", attention - scores, scores),
        mlp=block("mlp", 1.0 - attention),
        head=_whole(block("head", head)),
        message=0.0,
    )
