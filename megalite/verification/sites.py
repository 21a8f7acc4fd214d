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
from megalite.models.stage import StageSpec, stage_specs
from megalite.parallel.topology import Coordinates
from megalite.run_plan import stage_rank
from megalite.tensor_names import EMBEDDING

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

    if stage.spec.has_embedding:
        out(stage.embedding, "embedding")
    for layer in stage.layers:
        assert isinstance(layer, DecoderLayer)
        site = f"layers.{layer.part.layer}"
        into(layer, f"{site}.input" if layer.part.has_attention else f"{site}.middle")
        if layer.part.has_attention:
            out(layer.attention_norm, f"{site}.attention_norm")
            out(layer.attention.qkv, f"{site}.attention.qkv")
            into(layer.attention.out, f"{site}.attention.mixed")
            out(layer.attention.out, f"{site}.attention.out")
        if layer.part.is_whole:
            handles.append(layer.mlp_norm.register_forward_hook(_out_of_sum(site, seen)))
        elif layer.part.has_mlp:
            out(layer.mlp_norm, f"{site}.mlp_norm")
        if layer.part.has_mlp:
            out(layer.mlp.gate_up, f"{site}.mlp.gate_up")
            into(layer.mlp.down, f"{site}.mlp.activated")
            out(layer.mlp.down, f"{site}.mlp.down")
        out(layer, f"{site}.output" if layer.part.has_mlp else f"{site}.middle")
    if stage.spec.has_head:
        out(stage.norm, "norm")
        out(stage.head, "head")
    return handles


def _out_of_sum(site: str, seen: Seen) -> Callable[..., None]:
    """A hook for the two results of the norm of a sum."""

    def both(_module: nn.Module, _inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        seen(f"{site}.middle", outputs[1])
        seen(f"{site}.mlp_norm", outputs[0])

    return both


def stage_of(config: Config, name: str, pp_rank: int) -> int:
    """The stage on a pipeline rank that has a tensor, or computes a site."""
    owners = stage_rank(config)
    here = [spec for spec in stage_specs(config) if owners[spec.stage] == pp_rank]
    return next((spec.stage for spec in here if _is_in(spec, name)), here[0].stage)


def _is_in(spec: StageSpec, name: str) -> bool:
    """Whether a stage has a tensor, or computes a site."""
    layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
    if layer is None:
        # A tied embedding is in the stage of the head too.
        embeds = name in ("embedding", EMBEDDING)
        return spec.has_head or (embeds and spec.has_embedding)
    attention, mlp = (block in spec.blocks for block in (2 * layer, 2 * layer + 1))
    if name.endswith(".middle"):
        return attention or mlp
    in_mlp = ".mlp" in name or name.endswith((".output", ".post_attention_layernorm.weight"))
    return mlp if in_mlp else attention


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
