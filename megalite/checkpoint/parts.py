"""What a rank's flat buffers hold of whole tensors: what it writes of a checkpoint, and reads."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from megalite.checkpoint.regions import Region, as_matrix
from megalite.layers.shard import Piece, Shard
from megalite.optim.buckets import Slot, Span

DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float64: "F64",
        torch.int64: "I64",
        torch.float32: "F32",
        torch.int32: "I32",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.uint8: "U8",
    }
)
"""As safetensors calls them."""


@dataclass(frozen=True)
class Part:
    """Elements of a whole tensor that a rank has.

    Attributes:
        name, shape: of the whole tensor.
        region: which elements.
        values: those, a view, flat and contiguous.
    """

    name: str
    shape: tuple[int, ...]
    region: Region
    values: Tensor

    @property
    def dtype(self) -> str:
        """As safetensors calls it."""
        return DTYPE_NAMES[self.values.dtype]


def span_parts(
    slots: Sequence[Slot],
    spans: Sequence[Span],
    values: Sequence[Tensor],
    prefix: str,
    share: tuple[int, int] | None,
) -> Iterator[Part]:
    """The parts of whole tensors in what a rank owns of the flat buffers.

    Args:
        slots, spans: of the rank, in the buffers' order.
        values: a tensor of each span's length, or empty if there is none of its kind.
        prefix: of the names.
        share: (number, of how many): of ranks that own the same each takes an equal share, and
            copies on other ranks of the tensor and pipeline axes are left out, so that all ranks
            together have every element once. None: everything, copies too.
    """
    starts = [slot.start for slot in slots]
    for span, owned in zip(spans, values, strict=True):
        if not len(owned):
            continue
        begin, end = _share(len(owned), share)
        first, last = span.start + begin, span.start + end
        at = max(0, bisect_right(starts, first) - 1)
        for slot in slots[at:]:
            if slot.start >= last:
                break
            for piece, start, region in _regions(slot.shard, slot.parameter.shape, share):
                start += slot.start
                cut = region.cut(first - start, last - start)
                if cut.length:
                    view = owned[start + cut.start - span.start : start + cut.stop - span.start]
                    yield Part(prefix + piece.name, piece.shape, cut, view)


def parameter_parts(
    parameter: Tensor, shard: Shard, share: tuple[int, int] | None
) -> Iterator[Part]:
    """Of one parameter that lies in no flat buffer; arguments as of `span_parts`."""
    flat = parameter.detach().view(-1)
    begin, end = _share(len(flat), share)
    for piece, start, region in _regions(shard, parameter.shape, share):
        cut = region.cut(begin - start, end - start)
        if cut.length:
            yield Part(piece.name, piece.shape, cut, flat[start + cut.start : start + cut.stop])


def _share(length: int, share: tuple[int, int] | None) -> tuple[int, int]:
    if share is None:
        return 0, length
    number, of = share
    return length * number // of, length * (number + 1) // of


def _regions(
    shard: Shard, local_shape: torch.Size, share: tuple[int, int] | None
) -> Iterator[tuple[Piece, int, Region]]:
    """Pieces of a parameter, the element of it that each begins with, and its box."""
    if share is not None and shard.tied_copy == 1:
        return
    width = local_shape[1:].numel()
    for piece in shard.pieces:
        if not piece.length or (share is not None and piece.replica):
            continue
        rows, columns = as_matrix(piece.shape)
        if piece.dim == 0:
            start, box = piece.local_start * width, (piece.start, 0, piece.length, columns)
        else:
            assert piece.local_start == 0 and piece.length == width, "columns lie in one piece"
            start, box = 0, (0, piece.start, rows, piece.length)
        yield piece, start, Region(*box, 0, box[2] * box[3])
