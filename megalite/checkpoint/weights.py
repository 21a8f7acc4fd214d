"""Final weights: one safetensors file per rank that owns some, and their assembly.

Each entry of a file is a slice of one whole tensor, under the whole tensor's name (Hugging Face's
LLaMA names); the file's metadata says where the slice lies. Padding and copies are not written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megalite.errors import DataError
from megalite.layers.shard import named_shards
from megalite.parallel.groups import ParallelGroups

METADATA_KEY = "megalite"


def save_weights(folder: Path, stages: Iterable[nn.Module], groups: ParallelGroups) -> None:
    """Write this rank's slices to `folder/rank-00000.safetensors`; replicas over dp write once.

    The file appears under its name only when it is complete.
    """
    if groups.dp.rank:
        return
    tensors: dict[str, Tensor] = {}
    places: dict[str, dict] = {}
    for stage in stages:
        for parameter, shard in named_shards(stage):
            if shard.tied_copy == 1:
                continue
            for piece in shard.pieces:
                if piece.replica or not piece.length:
                    continue
                tensors[piece.name] = (
                    piece.of(parameter.detach()).cpu().clone(memory_format=torch.contiguous_format)
                )
                places[piece.name] = {
                    "shape": piece.shape,
                    "dim": piece.dim,
                    "start": piece.start,
                }
    folder.mkdir(parents=True, exist_ok=True)
    name = f"rank-{groups.world_rank:05d}.safetensors"
    temporary = folder / f".{name}.tmp"
    save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(places)})
    os.replace(temporary, folder / name)


def load_whole_weights(folder: Path) -> dict[str, Tensor]:
    """Put the slices of all files of a folder together on the CPU.

    Returns:
        Whole tensors by name, in the dtype they were saved in.

    Raises:
        DataError: no files, or slices that leave a gap or overlap.
    """
    files = sorted(folder.glob("rank-*.safetensors"))
    if not files:
        raise DataError(f"{folder} holds no rank-*.safetensors")
    whole: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            places = json.loads(file.metadata()[METADATA_KEY])
            for name, place in places.items():
                part = file.get_tensor(name)
                target = whole.setdefault(name, torch.zeros(place["shape"], dtype=part.dtype))
                dim, start = place["dim"], place["start"]
                target.narrow(dim, start, part.shape[dim]).copy_(part)
                filled[name] = filled.get(name, 0) + part.numel()
    for name, tensor in whole.items():
        if filled[name] != tensor.numel():
            raise DataError(
                f"{folder}: {name} has {tensor.numel()} elements, but its slices {filled[name]}"
            )
    return whole
