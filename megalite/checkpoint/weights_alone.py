"""A checkpoint of weights alone, of step 0: what `--load DIR --finetune` starts from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megalite.checkpoint.directory import Directory
from megalite.checkpoint.manifest import NAME, Manifest, Slice, StoredFile, StoredTensor
from megalite.checkpoint.parts import Part
from megalite.checkpoint.regions import whole
from megalite.checkpoint.tensor_file import Layout, digest
from megalite.checkpoint.whole_files import MOST_BYTES, WholeFiles
from megalite.errors import ConfigError


def write_weights(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    parts: Iterable[Part],
    dtype: str,
    facts: Mapping[str, Any],
    run_id: str,
) -> Path:
    """Write the checkpoint, and return its folder.

    Args:
        path: folder of checkpoints, which has none yet.
        shapes: of all whole tensors, by name.
        parts: of them, which are all of them.
        dtype: of the files, as safetensors calls it.
        facts: for the manifest.
        run_id: names the folder until it is complete.

    Raises:
        ConfigError: there are checkpoints.
        OSError: the disk is full, or anything else went wrong.
    """
    directory = Directory(path)
    if directory.steps():
        raise ConfigError(f"{path} holds checkpoints already; choose another folder")
    temporary = directory.temporary(0, run_id)
    temporary.mkdir(parents=True)
    tensors = {name: (dtype, shape) for name, shape in shapes.items()}
    files = WholeFiles.plan(temporary, tensors, MOST_BYTES)
    try:
        files.create()
        files.write(parts)
        text = _manifest(files, facts).to_json()
        with open(temporary / NAME, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        directory.commit(0, run_id)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # it is there no more if all went well
    return directory.folder(0)


def _manifest(files: WholeFiles, facts: Mapping[str, Any]) -> Manifest:
    stored, tensors = [], {}
    for number, (name, layout) in enumerate(files.layouts.items()):
        digests = _digests(files.folder / name, layout)
        stored.append(StoredFile(name, layout.num_bytes, digests))
        for entry in layout.entries:
            one = (Slice(number, whole(entry.shape)),)
            tensors[entry.name] = StoredTensor(entry.dtype, entry.shape, one)
    return Manifest(0, 0, 0, facts, tensors, tuple(stored))


def _digests(path: Path, layout: Layout) -> tuple[str, ...]:
    """Of each piece, read back."""
    with open(path, "rb") as file:
        return tuple(digest(file.read(piece.num_bytes)) for piece in layout.pieces())
