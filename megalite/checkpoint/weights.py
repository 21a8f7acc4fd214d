"""Final weights: one safetensors file per rank that owns some, and their assembly.

Each entry of a file is a slice of one whole tensor, under the whole tensor's name (Hugging Face's
LLaMA names); the file's metadata says where the slice lies. Padding and copies are not written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megalite.errors import DataError
from megalite.layers.shard import Shard
from megalite.parallel.groups import ParallelGroups

METADATA_KEY = "megalite"


def save_weights(
    folder: Path, parameters: Iterable[tuple[nn.Parameter, Shard]], groups: ParallelGroups
) -> None:
    """Write this rank's slices to `folder/rank-00000.safetensors`; replicas over dp write once.

    The file appears under its name only when it is complete.

    Args:
        folder: made if it is not there.
        parameters: of this rank, with their shards; all are taken, by replicas too, and each is
            read before the next one is asked for.
        groups: of this rank.
    """
    tensors: dict[str, Tensor] = {}
    places: dict[str, dict] = {}
    for parameter, shard in parameters:
        if shard.tied_copy == 1 or groups.dp.rank:
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
    if groups.dp.rank:
        return
    folder.mkdir(parents=True, exist_ok=True)
    name = f"rank-{groups.world_rank:05d}.safetensors"
    temporary = folder / f".{name}.tmp"
    facts = {"files": groups.tp.size * groups.pp.size, "places": places}
    save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(facts)})
    os.replace(temporary, folder / name)


def missing_files(folder: Path) -> int:
    """How many of a run's weight files are not in the folder.

    Raises:
        DataError: there are none at all.
    """
    files = sorted(folder.glob("rank-*.safetensors"))
    if not files:
        raise DataError(f"{folder} holds no rank-*.safetensors")
    with safe_open(files[0], framework="pt") as file:
        return _facts(file)["files"] - len(files)


def load_whole_weights(folder: Path) -> dict[str, Tensor]:
    """Put the slices of all files of a folder together on the CPU.

    Returns:
        Whole tensors by name, in the dtype they were saved in.

    Raises:
        DataError: files are missing, or slices leave a gap or overlap.
    """
    missing = missing_files(folder)
    if missing:
        raise DataError(
            f"{folder} lacks {missing} of the run's weight files: ranks on other machines wrote "
            "theirs to their own disks, or did not finish"
        )
    whole: dict[str, Tensor] = {}
    slices: dict[str, list[tuple[int, int]]] = {}
    for path in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name, place in _facts(file)["places"].items():
                part = file.get_tensor(name)
                target = whole.setdefault(name, torch.zeros(place["shape"], dtype=part.dtype))
                dim, start = place["dim"], place["start"]
                target.narrow(dim, start, part.shape[dim]).copy_(part)
                # An empty slice marks the end, which the last one has to reach.
                after = target.shape[dim]
                slices.setdefault(name, [(after, after)]).append((start, start + part.shape[dim]))
    for name, parts in slices.items():
        end = 0
        for start, stop in sorted(parts):
            if start != end:
                raise DataError(
                    f"{folder}: a slice of {name} ends at {end}, the next is at {start}"
                )
            end = stop
    return whole


def _facts(file: Any) -> dict[str, Any]:
    return json.loads(file.metadata()[METADATA_KEY])
