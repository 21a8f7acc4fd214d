"""Several indexed datasets into one, by copying their files block by block."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from megalite.data.indexed_reader import IndexedReader
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.sidecar import Sidecar, read_sidecar, sidecar_path
from megalite.errors import ConfigError, DataError
from megalite.reading.inputs import natural_key

_SAME = ("tokenizer_type", "tokenizer_fingerprint", "vocab_size", "eod", "append_eod")


def find_datasets(folder: Path) -> list[Path]:
    """Prefixes of the datasets in a folder, in natural order: part_2 before part_10.

    Megatron-LM takes them in the order of their names as text, where part_10 comes first.

    Raises:
        ConfigError: there is none, or one of its two files is missing.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise ConfigError(f"--input {folder}: {error.strerror}") from None
    found = {
        suffix: {name.removesuffix(suffix) for name in names if name.endswith(suffix)}
        for suffix in (".bin", ".idx")
    }
    alone = [
        f"{folder}/{name}{suffix} is missing"
        for suffix, other in ((".idx", ".bin"), (".bin", ".idx"))
        for name in sorted(found[other] - found[suffix], key=natural_key)
    ]
    if alone:
        raise ConfigError(alone)
    if not found[".bin"]:
        raise ConfigError(f"--input {folder}: it holds no .bin and .idx")
    return [folder / name for name in sorted(found[".bin"], key=natural_key)]


def merge(prefixes: Sequence[Path], output: Path) -> Sidecar | None:
    """Write all documents of the datasets, in this order, as one dataset.

    Returns:
        Its sidecar; None if one of the datasets has none: then the result has none.

    Raises:
        ConfigError: the output is one of the datasets; or their dtypes or tokenizers differ.
        DataError: a dataset is damaged, or the disk is full: nothing is left behind.
    """
    if output.resolve() in [prefix.resolve() for prefix in prefixes]:
        raise ConfigError(f"--output-prefix {output} is one of the datasets to merge")
    sidecars = [read_sidecar(prefix) for prefix in prefixes]
    dtypes = [IndexedReader(prefix).dtype for prefix in prefixes]
    wrong = [
        f"{prefix} holds {dtype.name}, but {prefixes[0]} {dtypes[0].name}"
        for prefix, dtype in zip(prefixes, dtypes, strict=True)
        if dtype != dtypes[0]
    ]
    wrong += _differences(prefixes, sidecars)
    if wrong:
        raise ConfigError(wrong)
    try:
        writer = IndexedWriter(output, dtypes[0])
        try:
            for prefix in prefixes:
                writer.add_index(prefix)
            sums = writer.close()
        finally:
            writer.discard()
        path = sidecar_path(output)
        if None in sidecars:
            path.unlink(missing_ok=True)  # of the dataset that was here before
            return None
        known = [sidecar for sidecar in sidecars if sidecar]
        merged = replace(_sum(known), bin=sums["bin"], idx=sums["idx"])
        temporary = Path(f"{path}.tmp-{os.getpid()}")
        merged.write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f"{output}: {error.strerror}; what was unfinished is removed. Give another "
            "--output-prefix, or make room"
        ) from None
    return merged


def _differences(prefixes: Sequence[Path], sidecars: Sequence[Sidecar | None]) -> list[str]:
    """A sentence for each dataset that is not made as the first one is."""
    known = [(p, sidecar) for p, sidecar in zip(prefixes, sidecars, strict=True) if sidecar]
    problems = []
    for prefix, sidecar in known[1:]:
        first_prefix, first = known[0]
        other = [name for name in _SAME if getattr(sidecar, name) != getattr(first, name)]
        if other:
            values = " and ".join(f"{name} {getattr(sidecar, name)}" for name in other)
            wanted = " and ".join(f"{getattr(first, name)}" for name in other)
            problems.append(f"{prefix} has {values}, but {first_prefix} {wanted}")
    return problems


def _sum(sidecars: Sequence[Sidecar]) -> Sidecar:
    """All that adds up; the rest is that of the first."""
    numbers = ("documents", "sequences", "tokens", "text_bytes", "left_out")
    unknown = ("unigram_nats", "bigram_nats")  # they do not add up
    assert {*numbers, *unknown, "max_token", "sources", "bin", "idx", *_SAME} == {
        field.name for field in fields(Sidecar)
    }
    return replace(
        sidecars[0],
        **{name: sum(getattr(sidecar, name) for sidecar in sidecars) for name in numbers},
        unigram_nats=0.0,
        bigram_nats=0.0,
        max_token=max(sidecar.max_token for sidecar in sidecars),
        sources=tuple(source for sidecar in sidecars for source in sidecar.sources),
    )
