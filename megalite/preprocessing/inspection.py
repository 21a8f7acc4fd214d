"""Looks into an indexed dataset: figures, lengths, one document, and whether it is whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalite.data.indexed_format import BLOCK
from megalite.data.indexed_reader import IndexedReader
from megalite.data.indexed_writer import FileSum
from megalite.data.sidecar import Sidecar, read_sidecar, tokenizer_problem
from megalite.errors import ConfigError, DataError
from megalite.reading.inputs import dataset_prefix, natural_key
from megalite.tokenizer.base import Tokenizer
from megalite.wording import counted

_SHOWN_DATASETS = 5

_BAR = 40
"""Characters of the longest bar of a histogram."""


@dataclass(frozen=True)
class Dataset:
    """An open dataset and its sidecar, if it has one."""

    prefix: Path
    reader: IndexedReader
    sidecar: Sidecar | None


def open_dataset(prefix: Path) -> Dataset:
    """Open a dataset by its prefix, or by the name of one of its files.

    Raises:
        ConfigError: there is none of that name; it says which there are.
        DataError: it breaks a rule of the format, or its sidecar describes other files.
    """
    prefix = dataset_prefix(prefix)
    if not any(os.path.isfile(f"{prefix}{suffix}") for suffix in (".bin", ".idx")):
        raise ConfigError(f"--input {prefix}: {_no_dataset(prefix)}")
    return Dataset(prefix, IndexedReader(prefix), read_sidecar(prefix))


def _no_dataset(prefix: Path) -> str:
    """That it is none, and names of the datasets in it or beside it."""
    is_folder = prefix.is_dir()
    folder = prefix if is_folder else prefix.parent
    what = "is a folder" if is_folder else f"there is neither {prefix}.bin nor {prefix}.idx"
    try:
        names = os.listdir(folder)
    except OSError:
        return f"{what}, nor a folder {folder}"
    stems = sorted({name[:-4] for name in names if name.endswith(".idx")}, key=natural_key)
    shown = ", ".join(str(folder / stem) for stem in stems[:_SHOWN_DATASETS])
    more = ", ..." if len(stems) > _SHOWN_DATASETS else ""
    return f"{what}; datasets in {folder}: {shown or 'none'}{more}"


def document(dataset: Dataset, number: int) -> np.ndarray:
    """Tokens of a document, counted from 0.

    Raises:
        ConfigError: there is none of that number.
    """
    reader = dataset.reader
    documents = len(reader.documents) - 1
    if not 0 <= number < documents:
        raise ConfigError(f"--document {number}: there are documents 0 to {documents - 1}")
    first, last = (int(each) for each in reader.documents[number : number + 2])
    if first == last:
        return np.empty(0, reader.dtype)
    start = int(reader.pointers[first]) // reader.dtype.itemsize
    return reader.read(start, start + int(reader.lengths[first:last].sum(dtype=np.int64)))


def document_text(dataset: Dataset, number: int, tokenizer: Tokenizer) -> str:
    """Text of a document; the end-of-document token is left out.

    Raises:
        ConfigError: there is none of that number, or another tokenizer wrote it.
    """
    if dataset.sidecar:
        problem = tokenizer_problem(dataset.prefix, dataset.sidecar, tokenizer)
        if problem:
            raise ConfigError(problem)
    tokens = document(dataset, number).tolist()
    if tokens and tokens[-1] == tokenizer.eod:
        tokens.pop()
    return tokenizer.decode(tokens)


def statistics(dataset: Dataset) -> str:
    """Figures of a dataset, and what its sidecar says."""
    reader, sidecar = dataset.reader, dataset.sidecar
    documents = len(reader.documents) - 1
    lines = [
        f"{dataset.prefix}",
        f"  documents  {documents:,}",
        f"  sequences  {len(reader.lengths):,}",
        f"  tokens     {reader.num_tokens:,} of {reader.dtype.name}",
    ]
    if documents:
        lines.append(f"  mean       {reader.num_tokens / documents:,.1f} tokens a document")
    if sidecar is None:
        return "\n".join([*lines, "  no sidecar: its tokenizer is not known"])
    return "\n".join(
        [
            *lines,
            f"  tokenizer  {sidecar.tokenizer_type}, {counted(sidecar.vocab_size, 'token')}, "
            f"{sidecar.tokenizer_fingerprint}",
            f"  documents end with token {sidecar.eod}"
            if sidecar.append_eod
            else "  documents end with no token of their own",
            f"  text       {counted(sidecar.text_bytes, 'byte')}",
            f"  largest id {sidecar.max_token}",
            f"  left out   {counted(sidecar.left_out, 'record')} of "
            f"{counted(len(sidecar.sources), 'file')}",
        ]
    )


def histogram(dataset: Dataset) -> str:
    """How many documents are how long, as text; lengths double from line to line."""
    counts = np.zeros(64, np.int64)
    for lengths in _document_lengths(dataset.reader):
        bins = np.ceil(np.log2(np.maximum(lengths, 1) + 0.5)).astype(np.int64)
        counts += np.bincount(np.where(lengths, bins, 0), minlength=64)
    used = np.flatnonzero(counts)
    if not len(used):
        return "  no documents"
    lines = [f"  {'tokens':>21}  documents"]
    for i in range(used[0], used[-1] + 1):
        span = "0" if not i else f"{1 << i >> 1:,} to {(1 << i) - 1:,}" if i > 1 else "1"
        bar = "#" * -(-_BAR * int(counts[i]) // int(counts.max()))
        lines.append(f"  {span:>21}  {counts[i]:>12,}  {bar}")
    return "\n".join(lines)


def _document_lengths(reader: IndexedReader) -> Iterator[np.ndarray]:
    """Tokens of each document, block by block."""
    for start in range(0, len(reader.documents) - 1, BLOCK):
        ends = reader.documents[start : start + BLOCK + 1]
        lengths = reader.lengths[ends[0] : ends[-1]]
        tokens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        yield np.diff(tokens[ends - ends[0]])


def verify(dataset: Dataset, show: Callable[[str], None]) -> list[str]:
    """Read everything; a sentence for each thing that is wrong. The format was checked at open.

    Args:
        dataset: to check.
        show: told what was found to be right.
    """
    reader, sidecar, prefix = dataset.reader, dataset.sidecar, dataset.prefix
    show(f"format: {counted(len(reader.lengths), 'sequence')}, both files fit each other")
    low, high = _token_range(reader)
    span = f"{low} to {high}" if reader.num_tokens else "none"
    problems = [] if low >= 0 else [f"{prefix}.bin holds a negative token id, {low}"]
    if sidecar is None:
        show(f"token ids: {span}")
        show("no sidecar: neither vocabulary nor checksums can be checked")
        return problems
    if high >= sidecar.vocab_size:
        problems.append(
            f"{prefix}.bin holds token id {high}, but its tokenizer has {sidecar.vocab_size}"
        )
    found = {
        "documents": len(reader.documents) - 1,
        "sequences": len(reader.lengths),
        "tokens": reader.num_tokens,
        "max_token": high if reader.num_tokens else -1,
    }
    problems += [
        f"{prefix}.json says {name} {getattr(sidecar, name)}, found {value}"
        for name, value in found.items()
        if getattr(sidecar, name) != value
    ]
    if not 0 <= sidecar.eod < sidecar.vocab_size:
        problems.append(
            f"{prefix}.json says eod {sidecar.eod}, expected a token below {sidecar.vocab_size}"
        )
    with_tokens, with_end = _count_ends(reader, sidecar.eod)
    if sidecar.append_eod and with_end < with_tokens:
        problems.append(
            f"{prefix}.json says append_eod true, but {with_tokens - with_end:,} of "
            f"{counted(with_tokens, 'document')} with tokens do not end with eod {sidecar.eod}"
        )
    if not sidecar.append_eod and with_tokens and with_end == with_tokens:
        problems.append(
            f"{prefix}.json says append_eod false, but every document ends with eod {sidecar.eod}"
        )
    of_text = reader.num_tokens - (with_end if sidecar.append_eod else 0)
    if sidecar.text_bytes < 0 or (of_text and not sidecar.text_bytes):
        problems.append(
            f"{prefix}.json says text_bytes {sidecar.text_bytes}, but it has "
            f"{counted(of_text, 'token')} of text"
        )
    for suffix, expected in (("bin", sidecar.bin), ("idx", sidecar.idx)):
        actual = _sum_of(Path(f"{prefix}.{suffix}"))
        if actual != expected:
            problems.append(
                f"{prefix}.{suffix}: SHA-256 {expected.sha256} expected by {prefix}.json, found "
                f"{actual.sha256}"
            )
    if not problems:
        show(f"token ids: {span}, below {sidecar.vocab_size}")
        show("figures and checksums: as the sidecar says")
    return problems


def _count_ends(reader: IndexedReader, eod: int) -> tuple[int, int]:
    """How many documents have tokens, and how many of these end with the token."""
    with_tokens = with_end = start = 0
    for lengths in _document_lengths(reader):
        ends = start + np.cumsum(lengths, dtype=np.int64)
        start = int(ends[-1])
        lasts = ends[lengths > 0] - 1
        with_tokens += len(lasts)
        with_end += int(np.count_nonzero(reader.tokens[lasts] == eod))
    return with_tokens, with_end


def _token_range(reader: IndexedReader) -> tuple[int, int]:
    """The smallest and the largest token id; (0, 0) of none."""
    low, high = [], []
    for start in range(0, reader.num_tokens, BLOCK):
        block = reader.read(start, min(start + BLOCK, reader.num_tokens))
        low.append(int(block.min()))
        high.append(int(block.max()))
        low, high = [min(low)], [max(high)]
    return min(low, default=0), max(high, default=0)


def _sum_of(path: Path) -> FileSum:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return FileSum(file.tell(), digest.hexdigest())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
