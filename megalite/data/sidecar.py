"""`PREFIX.json` beside `PREFIX.bin` and `PREFIX.idx`: what a dataset is made of. No torch import.

Megatron-LM's files do not say which tokenizer wrote them; a model trained with another one learns
nonsense without an error. The sidecar says so, and carries the figures that a scan of the tokens
would give.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalite.data.indexed_writer import FileSum
from megalite.errors import DataError

if TYPE_CHECKING:
    from megalite.tokenizer.base import Tokenizer

_FORMAT = "megalite dataset 1"


@dataclass(frozen=True)
class SourceFile:
    """A file that a dataset was made from, and its size [bytes]."""

    path: str
    bytes: int


@dataclass(frozen=True)
class Sidecar:
    """What a dataset is made of.

    Attributes:
        tokenizer_type: Megatron-LM's name of it.
        tokenizer_fingerprint: equal for equal mappings of text to tokens.
        vocab_size: token ids are below it [tokens].
        eod: the end-of-document token.
        append_eod: documents end with it.
        documents, sequences, tokens: in the dataset.
        text_bytes: of the documents' texts, as UTF-8.
        max_token: the largest token id; -1 if there are no tokens.
        left_out: records of the sources that could not be used.
        bin, idx: size and checksum of the two files.
        sources: the files that the text came from.
        unigram_nats, bigram_nats: entropy of a token, and of a token given the one before [nats];
            0 if unknown: only what `--data` tokenizes is counted.
    """

    tokenizer_type: str
    tokenizer_fingerprint: str
    vocab_size: int
    eod: int
    append_eod: bool
    documents: int
    sequences: int
    tokens: int
    text_bytes: int
    max_token: int
    left_out: int
    bin: FileSum
    idx: FileSum
    sources: tuple[SourceFile, ...]
    unigram_nats: float = 0.0
    bigram_nats: float = 0.0

    @property
    def content(self) -> str:
        """Names the tokens and their documents: equal for equal files."""
        return hashlib.sha256(f"{self.bin.sha256} {self.idx.sha256}".encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write it to a file."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")


def sidecar_path(prefix: Path | str) -> Path:
    """Of a dataset's prefix."""
    return Path(f"{prefix}.json")


def read_sidecar(prefix: Path | str) -> Sidecar | None:
    """The sidecar of a dataset; None if it has none, as those that others wrote.

    Raises:
        DataError: it is damaged, or describes other files than those beside it.
    """
    path = sidecar_path(prefix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        return None  # somebody else's file of that name
    try:
        sidecar = _sidecar(content)
    except (TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    for suffix, expected in (("bin", sidecar.bin), ("idx", sidecar.idx)):
        try:
            size = os.stat(f"{prefix}.{suffix}").st_size
        except OSError as error:
            raise DataError(f"{prefix}.{suffix}: {error.strerror}") from None
        if size != expected.bytes:
            raise DataError(
                f"{path} describes a .{suffix} of {expected.bytes} bytes, but {prefix}.{suffix} "
                f"has {size}: it belongs to another dataset; remove it or restore the files"
            )
    return sidecar


def _sidecar(content: Mapping[str, Any]) -> Sidecar:
    wanted = {field.name: field.type for field in fields(Sidecar)}
    # Sidecars of before these were added are still read.
    content = {"unigram_nats": 0.0, "bigram_nats": 0.0} | dict(content)
    types = {"int": int, "str": str, "bool": bool, "float": float}
    for name, kind in wanted.items():
        if kind in types and type(content[name]) is not types[kind]:
            raise TypeError(f"{name} is {content[name]!r}")
    return Sidecar(
        **{name: content[name] for name in wanted if name not in ("bin", "idx", "sources")},
        bin=FileSum(**content["bin"]),
        idx=FileSum(**content["idx"]),
        sources=tuple(SourceFile(**each) for each in content["sources"]),
    )


def tokenizer_problem(prefix: Path | str, sidecar: Sidecar, tokenizer: Tokenizer) -> str | None:
    """Why a tokenizer cannot be used with the dataset; None if it wrote it."""
    if tokenizer.fingerprint == sidecar.tokenizer_fingerprint:
        return None
    return (
        f"{prefix} was tokenized with {sidecar.tokenizer_type} ({sidecar.tokenizer_fingerprint}), "
        f"but the tokenizer given is {tokenizer.fingerprint}: give that one with --tokenizer-type "
        "and --tokenizer-model"
    )
