"""Which layers a pipeline stage owns. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.config import Config
from megalite.run_plan import stage_rank


@dataclass(frozen=True)
class StageSpec:
    """The part of the model in one virtual pipeline stage.

    Attributes:
        stage: index of the stage, 0 first.
        first_layer, num_layers: the decoder layers `[first_layer, first_layer + num_layers)`.
        has_embedding: the token embedding is here.
        has_head: final norm, head and loss are here.
    """

    stage: int
    first_layer: int
    num_layers: int
    has_embedding: bool
    has_head: bool

    def words(self) -> str:
        """`embedding, layers 0-3`, for people."""
        owned = f"layers {self.first_layer}-{self.first_layer + self.num_layers - 1}"
        return ("embedding, " if self.has_embedding else "") + owned + (
            ", head" if self.has_head else ""
        )


def stage_specs(config: Config) -> tuple[StageSpec, ...]:
    """The stages of the whole model, in order: `--pp-layers`, or a balanced split."""
    layers = config.parallel.pp_layers or balanced_layers(
        config.model.num_layers, len(stage_rank(config)), head_cost_in_layers(config)
    )
    specs, first = [], 0
    for stage, count in enumerate(layers):
        last = len(layers) - 1
        specs.append(StageSpec(stage, first, count, stage == 0, stage == last))
        first += count
    return tuple(specs)


def balanced_layers(num_layers: int, num_stages: int, head_cost: float) -> tuple[int, ...]:
    """Layers per stage that make the slowest stage as fast as possible.

    The last stage also computes the head and the loss, which cost as much as `head_cost` layers;
    the embedding is a lookup and costs nothing. Among equals the most even split wins. Layers left
    over go to late stages, because 1F1B keeps the most micro-batches alive on the early ones.
    """
    if num_stages == 1:
        return (num_layers,)
    others = num_stages - 1

    def badness(last: int) -> tuple[float, int]:
        slowest = max(-(-(num_layers - last) // others), last + head_cost)
        return slowest, abs(last * num_stages - num_layers)

    last = min(range(1, num_layers - others + 1), key=badness)
    each, left_over = divmod(num_layers - last, others)
    return (each,) * (others - left_over) + (each + 1,) * left_over + (last,)


def head_cost_in_layers(config: Config) -> float:
    """Multiplications of the head and the loss over those of one layer, per token."""
    model = config.model
    hidden, attention = model.hidden_size, model.num_attention_heads * model.head_dim
    layer = hidden * (model.qkv_features + attention + 3 * model.ffn_hidden_size)
    layer += attention * model.seq_length  # causal scores and their sum: 2 x seq / 2
    return hidden * model.vocab_size / layer
