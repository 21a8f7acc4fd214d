"""What a rank's parameter is of the whole model. No process group is needed to say it.

A layer with a weight has an attribute `shard` beside it. From it follow the initial values, which
gradients have to be summed over copies, what counts in the gradient norm, and the names and places
under which weights are saved. Names are those of Hugging Face's LLaMA.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalite.parallel.rng import make_key, normal_slice


@dataclass(frozen=True)
class Piece:
    """A contiguous slice of one whole tensor, inside a rank's parameter.

    Attributes:
        name: of the whole tensor.
        shape: of the whole tensor, without padding.
        dim: the dim that is cut.
        start, length: the slice `[start, start + length)` of the whole tensor along `dim`.
        local_start: where the slice begins in the rank's parameter along `dim`.
        replicas: ranks of the tensor group that hold this very slice.
        replica: which of them this is; number 0 counts in norms and is saved.
        partial: the copies' gradients are parts of a sum.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    start: int
    length: int
    local_start: int = 0
    replicas: int = 1
    replica: int = 0
    partial: bool = False

    def of(self, parameter: Tensor) -> Tensor:
        """The slice as a view of a tensor with the parameter's shape."""
        return parameter.narrow(self.dim, self.local_start, self.length)


@dataclass(frozen=True)
class Shard:
    """What a parameter consists of.

    Attributes:
        pieces: the slices in it; places that no piece covers are padding and stay zero.
        init_std: standard deviation of the initial values; None for ones (norm weights).
        tied_copy: a tied embedding that lies on the first and the last stage: 0 on the first, which
            counts in norms and is saved, 1 on the last. None for everything else.
    """

    pieces: tuple[Piece, ...]
    init_std: float | None
    tied_copy: int | None = None

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to norm weights."""
        return self.init_std is not None

    @property
    def is_hidden(self) -> bool:
        """Whether it maps hidden states to hidden states: matrices of layers, not embedding or
        head."""
        return self.decays and all(".layers." in piece.name for piece in self.pieces)


def named_shards(module: nn.Module) -> Iterator[tuple[nn.Parameter, Shard]]:
    """Every parameter of the module with its shard, once, in order of definition."""
    seen: set[int] = set()
    for layer in module.modules():
        shard, weight = getattr(layer, "shard", None), getattr(layer, "weight", None)
        if isinstance(shard, Shard) and isinstance(weight, nn.Parameter) and id(weight) not in seen:
            seen.add(id(weight))
            yield weight, shard
    missing = [name for name, p in module.named_parameters() if id(p) not in seen]
    assert not missing, f"parameters without a shard: {missing}"


def freeze(module: nn.Module, names: Collection[str]) -> None:
    """Make parameters that hold these whole tensors, and nothing else, ask for no gradient."""
    for parameter, shard in named_shards(module):
        held = {piece.name in names for piece in shard.pieces}
        assert len(held) == 1, f"a part of {[piece.name for piece in shard.pieces]} would stay"
        parameter.requires_grad_(not held.pop())


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Draw the initial values of all parameters."""
    for parameter, shard in named_shards(module):
        draw(parameter, shard, seed)


@torch.no_grad()
def draw(parameter: nn.Parameter, shard: Shard, seed: int) -> None:
    """Give a parameter its initial values; they depend on (seed, tensor name, element), not on the
    layout."""
    parameter.zero_()
    for piece in shard.pieces:
        target = piece.of(parameter)
        if shard.init_std is None:
            target.fill_(1.0)
            continue
        cut = range(piece.start, piece.start + piece.length)
        rows, columns = piece.shape
        values = normal_slice(
            make_key(seed, piece.name),
            (rows, columns),
            cut if piece.dim == 0 else range(rows),
            cut if piece.dim == 1 else range(columns),
            parameter.device,
        )
        target.copy_(values * shard.init_std)


def hollow(module: nn.Module) -> nn.Module:
    """The module, its parameters' memory given back: they keep shape, precision and device."""
    for parameter in module.parameters():
        parameter.untyped_storage().resize_(0)
    return module
