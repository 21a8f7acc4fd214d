"""Which blocks of the model a pipeline stage owns. No torch import.

A layer is two blocks: its attention and its MLP, each with the norm before it. Block 2 l is the
attention of layer l, block 2 l + 1 its MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalite.config import Config
from megalite.models.balance import balanced_blocks
from megalite.run_plan import stage_rank


@dataclass(frozen=True)
class LayerPart:
    """A layer, or the half of it that a stage owns.

    Attributes:
        layer: index in the whole model.
        has_attention, has_mlp: which halves are here.
    """

    layer: int
    has_attention: bool = True
    has_mlp: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether both halves are here."""
        return self.has_attention and self.has_mlp


@dataclass(frozen=True)
class StageSpec:
    """The part of the model in one virtual pipeline stage.

    Attributes:
        stage: index of the stage, 0 first.
        first_block, num_blocks: the blocks `[first_block, first_block + num_blocks)`.
        has_embedding: the token embedding is here.
        has_head: final norm, head and loss are here.
    """

    stage: int
    first_block: int
    num_blocks: int
    has_embedding: bool
    has_head: bool

    @property
    def blocks(self) -> range:
        """The blocks, in order."""
        return range(self.first_block, self.first_block + self.num_blocks)

    @property
    def num_layers(self) -> float:
        """How many layers they are; halves count 0.5."""
        return self.num_blocks / 2

    @property
    def parts(self) -> tuple[LayerPart, ...]:
        """The layers, of which the first and the last may be halves."""
        owned = self.blocks
        layers = dict.fromkeys(block // 2 for block in owned)
        return tuple(LayerPart(n, 2 * n in owned, 2 * n + 1 in owned) for n in layers)

    def words(self) -> str:
        """`embedding, layers 0-7 and attention of 8`, for people."""
        whole = [part.layer for part in self.parts if part.is_whole]
        first, last = self.parts[0], self.parts[-1]
        owned = []
        if not first.has_attention:
            owned.append(f"MLP of {first.layer}")
        if whole:
            several = f"layers {whole[0]}-{whole[-1]}"
            owned.append(several if len(whole) > 1 else f"layer {whole[0]}")
        if not last.has_mlp:
            owned.append(f"attention of {last.layer}")
        text = " and ".join(filter(None, (", ".join(owned[:-1]), owned[-1])))
        return (
            ("embedding, " if self.has_embedding else "")
            + text
            + (", head" if self.has_head else "")
        )


def stage_specs(config: Config) -> tuple[StageSpec, ...]:
    """The stages of the whole model, in order: `--pp-layers`, or a balanced split."""
    counts = tuple(round(2 * layers) for layers in config.parallel.pp_layers) or balanced_blocks(
        config.model.num_layers,
        stage_rank(config),
        head_cost_in_layers(config),
        attention_cost_in_layers(config),
    )
    specs, first = [], 0
    for stage, count in enumerate(counts):
        last = len(counts) - 1
        specs.append(StageSpec(stage, first, count, stage == 0, stage == last))
        first += count
    return tuple(specs)


def head_cost_in_layers(config: Config) -> float:
    """Multiplications of the head and the loss over those of one layer, per token."""
    model = config.model
    return model.hidden_size * model.vocab_size / sum(_block_costs(config))


def attention_cost_in_layers(config: Config) -> float:
    """Multiplications of an attention block over those of one layer, per token."""
    costs = _block_costs(config)
    return costs[0] / sum(costs)


def _block_costs(config: Config) -> tuple[int, int]:
    """Multiplications per token of an attention block and of an MLP."""
    model = config.model
    heads = model.num_attention_heads * model.head_dim
    attention = model.hidden_size * (model.qkv_features + heads)
    attention += heads * model.seq_length  # causal scores and their sum: 2 x seq / 2
    return attention, 3 * model.hidden_size * model.ffn_hidden_size
