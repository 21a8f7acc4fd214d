"""`PREFIX.json` beside `PREFIX.bin` and `PREFIX.idx`: what a dataset is made of. No torch import.

Megatron-LM's files do not say which tokenizer wrote them; a model trained with another one learns
nonsense without an error. The sidecar says so, and carries the figures that a scan of the tokens
would give.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalite.data.indexed_writer import FileSum
from megalite.errors import DataError
from megalite.wording import counted

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

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
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        return None  # somebody else's file of that name
    try:
        sidecar = _sidecar(content)
    except _DamagedError as damage:
        raise DataError(
            f"{path} is damaged: {damage}; remove the sidecar or preprocess again"
        ) from None
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


class _DamagedError(Exception):
    """A value that is missing, or of another type."""


def _sidecar(content: Mapping[str, Any]) -> Sidecar:
    # Sidecars of before these were added are still read.
    content = {"unigram_nats": 0.0, "bigram_nats": 0.0} | dict(content)
    values = _values(Sidecar, content, "")
    sources = values["sources"]
    if not isinstance(sources, list):
        raise _DamagedError(f"sources is {reprlib.repr(sources)}, expected a list")
    return Sidecar(
        **values
        | {name: FileSum(**_values(FileSum, values[name], f"{name}: ")) for name in ("bin", "idx")}
        | {
            "sources": tuple(
                SourceFile(**_values(SourceFile, source, f"source {i}: "))
                for i, source in enumerate(sources)
            )
        }
    )


def _values(kind: type[DataclassInstance], content: Any, where: str) -> dict[str, Any]:
    """The values of a dataclass's fields; those of plain types are of that type.

    Raises:
        _DamagedError: one is not, or is missing.
    """
    types = {"int": (int, "a whole number"), "str": (str, "a text"),
             "bool": (bool, "true or false"), "float": (float, "a number")}  # fmt: skip
    if not isinstance(content, dict):
        raise _DamagedError(f"{where}{reprlib.repr(content)} instead of names and values")
    values = {}
    for field in fields(kind):
        if field.name not in content:
            raise _DamagedError(f"{where}{field.name} is missing")
        value = values[field.name] = content[field.name]
        wanted, words = types.get(str(field.type), (object, ""))
        if wanted is not object and type(value) is not wanted:
            raise _DamagedError(f"{where}{field.name} is {reprlib.repr(value)}, expected {words}")
    return values


def content_problems(
    prefix: Path | str, sidecar: Sidecar, found: Mapping[str, int | str]
) -> list[str]:
    """Why the dataset is not the one that its sidecar describes; none if it is.

    Args:
        prefix: of the dataset.
        sidecar: of it.
        found: in the files: `documents`, `sequences`, `tokens`, and the SHA-256 of `idx` and, if
            it was read whole, of `bin`.
    """
    told = {
        "documents": sidecar.documents,
        "sequences": sidecar.sequences,
        "tokens": sidecar.tokens,
        "idx": sidecar.idx.sha256,
        "bin": sidecar.bin.sha256,
    }
    wrong = [
        f"the SHA-256 of its .{name} is {value}, not {told[name]}"
        if isinstance(value, str)
        else f"it has {counted(value, name.removesuffix('s'))}, not {told[name]:,}"
        for name, value in found.items()
        if value != told[name]
    ]
    if not wrong:
        return []
    return [
        f"{prefix} is not the dataset that its sidecar {sidecar_path(prefix)} describes: "
        f"{'; '.join(wrong)}: remove the sidecar or preprocess again"
    ]


def tokenizer_problem(prefix: Path | str, sidecar: Sidecar, tokenizer: Tokenizer) -> str | None:
    """Why a tokenizer cannot be used with the dataset; None if it wrote it."""
    if tokenizer.fingerprint == sidecar.tokenizer_fingerprint:
        return None
    return (
        f"{prefix} was tokenized with {sidecar.tokenizer_type} ({sidecar.tokenizer_fingerprint}), "
        f"but the tokenizer here is {tokenizer.fingerprint}: give that one with --tokenizer-type "
        "and --tokenizer-model"
    )
