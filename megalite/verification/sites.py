"""Where activations are looked at, and which part of a whole activation a rank has there.

The names are those that `definition.forward` uses. The arithmetic is written anew from the layout,
not asked of the layers that it judges.

Legend: S sequence, B micro-batch, H hidden, N query heads, K key/value heads, D head dim, F ffn, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalite.config import Config
from megalite.models.llama import DecoderLayer, LlamaStage
from megalite.parallel.topology import Coordinates

Seen = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Cut:
    """Which part of a whole activation [S, B, features] a tensor rank has.

    Attributes:
        positions: of the sequence.
        features: index of each local feature in the whole; -1 for padding.
    """

    positions: slice
    features: Tensor

    def of(self, whole: Tensor) -> Tensor:
        """The part, with zeros for padding."""
        part = whole[self.positions]
        values = part[..., self.features.clamp(min=0).to(part.device)]
        return values * (self.features >= 0).to(part.device)


def cut(config: Config, site: str, place: Coordinates) -> Cut:
    """The part of a site's activation on the rank at `place`."""
    model, tp = config.model, config.parallel.tp
    every = slice(None)
    if site.endswith("attention.qkv"):
        return Cut(every, _qkv_features(config, place.tp))
    if site.endswith("attention.mixed"):
        return Cut(every, _share(model.num_attention_heads * model.head_dim, place.tp, tp))
    if site.endswith("mlp.activated"):
        return Cut(every, _share(model.ffn_hidden_size, place.tp, tp))
    if site.endswith("mlp.gate_up"):
        gate = _share(model.ffn_hidden_size, place.tp, tp)
        return Cut(every, torch.cat([gate, gate + model.ffn_hidden_size]))
    if site == "head":
        columns = _share(model.padded_vocab_size(tp), place.tp, tp)
        return Cut(every, columns.where(columns < model.vocab_size, -1))
    positions = every
    if config.parallel.sequence_parallel and tp > 1:
        length = model.seq_length // tp
        positions = slice(place.tp * length, (place.tp + 1) * length)
    return Cut(positions, torch.arange(model.hidden_size))


def watch_stage(stage: LlamaStage, seen: Seen) -> list[torch.utils.hooks.RemovableHandle]:
    """Call `seen` with each activation of the stage's forward; returns what to remove."""
    handles = []

    def out(module: nn.Module, site: str) -> None:
        handles.append(module.register_forward_hook(lambda _m, _in, y: seen(site, y)))

    def into(module: nn.Module, site: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda _m, xs: seen(site, xs[0])))

    def out_of_sum(module: nn.Module, site: str) -> None:
        def both(_module: nn.Module, _inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
            seen(f"{site}.middle", outputs[1])
            seen(f"{site}.mlp_norm", outputs[0])

        handles.append(module.register_forward_hook(both))

    if stage.spec.has_embedding:
        out(stage.embedding, "embedding")
    for index, layer in enumerate(stage.layers, start=stage.spec.first_layer):
        assert isinstance(layer, DecoderLayer)
        site = f"layers.{index}"
        into(layer, f"{site}.input")
        out(layer.attention_norm, f"{site}.attention_norm")
        out(layer.attention.qkv, f"{site}.attention.qkv")
        into(layer.attention.out, f"{site}.attention.mixed")
        out(layer.attention.out, f"{site}.attention.out")
        out_of_sum(layer.mlp_norm, site)
        out(layer.mlp.gate_up, f"{site}.mlp.gate_up")
        into(layer.mlp.down, f"{site}.mlp.activated")
        out(layer.mlp.down, f"{site}.mlp.down")
        out(layer, f"{site}.output")
    if stage.spec.has_head:
        out(stage.norm, "norm")
        out(stage.head, "head")
    return handles


def stage_of_site(config_layers: list[range], site: str) -> int:
    """The pipeline stage that computes a site, from the layers of each stage."""
    if site == "embedding":
        return 0
    if site in ("norm", "head"):
        return len(config_layers) - 1
    layer = int(site.split(".")[1])
    return next(stage for stage, layers in enumerate(config_layers) if layer in layers)


def _share(features: int, rank: int, size: int) -> Tensor:
    """Contiguous share of a rank."""
    each = features // size
    return torch.arange(rank * each, (rank + 1) * each)


def _qkv_features(config: Config, rank: int) -> Tensor:
    """This rank's query heads, then its key heads, then its value heads, in the whole [q k v]."""
    model, tp = config.model, config.parallel.tp
    heads, kv_heads, d = model.num_attention_heads, model.num_kv_heads, model.head_dim
    query = _share(heads * d, rank, tp)
    if kv_heads % tp == 0:
        key = _share(kv_heads * d, rank, tp)
    else:
        key = torch.arange(d) + rank * kv_heads // tp * d
    return torch.cat([query, heads * d + key, (heads + kv_heads) * d + key])
