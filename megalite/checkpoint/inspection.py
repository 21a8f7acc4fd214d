"""A checkpoint in words, and what differs between two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch

from megalite.checkpoint.reader import Checkpoint
from megalite.checkpoint.state import COUNTER, EXP_AVG, EXP_AVG_SQ, MASTER
from megalite.checkpoint.tensor_file import ITEM_BYTES
from megalite.wording import counted

KINDS = (
    (MASTER, "master weights"),
    (EXP_AVG, "first moments"),
    (EXP_AVG_SQ, "second moments"),
    (COUNTER, "counters"),
    ("", "weights"),
)


def contents(checkpoint: Checkpoint) -> str:
    """Step, run, files, and what kinds of tensors there are."""
    manifest = checkpoint.manifest
    size = sum(file.num_bytes for file in manifest.files)
    lines = [
        f"{checkpoint.folder}",
        f"  step      {manifest.step}, {manifest.samples} samples, {manifest.tokens} tokens",
        f"  files     {counted(len(manifest.files), 'file')}, {size / 2**30:.2f} GiB",
    ]
    numbers, elements = Counter[str](), Counter[str]()
    for name, tensor in manifest.tensors.items():
        kind = f"{_kind(name)}, {tensor.dtype}"
        numbers[kind] += 1
        elements[kind] += prod(tensor.shape)
    for kind in sorted(numbers):
        of = ITEM_BYTES[kind.rpartition(" ")[2]] * elements[kind]
        lines.append(
            f"  {'tensors' if kind == min(numbers) else '':<9s} {numbers[kind]:>5d}  {kind}: "
            f"{elements[kind]:,} elements, {of / 2**20:.1f} MiB"
        )
    for name, value in manifest.facts.items():
        if name != "config":
            lines.append(f"  {name:<9s} {_words(value)}")
    model = manifest.facts.get("config", {}).get("model", {})
    if model:
        lines.append(f"  model     {_words(model)}")
    return "\n".join(lines)


def tensor_lines(checkpoint: Checkpoint) -> Iterator[str]:
    """Every tensor: type, shape, files."""
    files = checkpoint.manifest.files
    for name, tensor in sorted(checkpoint.tensors.items()):
        where = ", ".join(dict.fromkeys(files[each.file].name for each in tensor.slices))
        yield f"{name}  {tensor.dtype} {list(tensor.shape)}  {where}"


def differences(ours: Checkpoint, theirs: Checkpoint) -> Iterator[str]:
    """A line for every field and tensor that is not the same; reads all of both."""
    a, b = ours.manifest, theirs.manifest
    for name in ("step", "samples", "tokens"):
        if getattr(a, name) != getattr(b, name):
            yield f"{name}: {getattr(a, name)}, {getattr(b, name)}"
    mine, other = _flat(a.facts), _flat(b.facts)
    for name in sorted(mine.keys() | other.keys()):
        if mine.get(name) != other.get(name):
            yield f"{name}: {mine.get(name)}, {other.get(name)}"
    for name in sorted(ours.tensors.keys() | theirs.tensors.keys()):
        if name not in ours.tensors or name not in theirs.tensors:
            yield f"{name}: only in {(ours if name in ours.tensors else theirs).folder}"
        else:
            yield from _tensor_differences(name, ours, theirs)


def _tensor_differences(name: str, ours: Checkpoint, theirs: Checkpoint) -> Iterator[str]:
    x, y = ours.whole(name), theirs.whole(name)
    if x.shape != y.shape or x.dtype != y.dtype:
        yield f"{name}: {x.dtype} {list(x.shape)}, {y.dtype} {list(y.shape)}"
        return
    bits = x.reshape(-1).view(torch.uint8) != y.reshape(-1).view(torch.uint8)
    differ = int(bits.view(-1, x.element_size()).any(1).sum()) if x.numel() else 0
    if differ:
        most = (x.double() - y.double()).abs().max().item()
        yield f"{name}: {differ} of {x.numel()} elements differ, by {most:.3g} at most"


def _kind(name: str) -> str:
    return next(words for prefix, words in KINDS if name.startswith(prefix))


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return str(value)


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
