"""What a preprocessing run is told, and the rules across it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megalite.field_values import suggest
from megalite.preprocessing.reading_flags import default_max_document_mb, reading_problems
from megalite.reading.chunks import TEXT_DOCUMENTS
from megalite.reading.inputs import STANDARD_INPUT, Input
from megalite.tokenizer.settings import TokenizerSettings

SUFFIXES = ("bin", "idx", "json")
"""Of a dataset's files."""


@dataclass(frozen=True)
class Settings:
    """A preprocessing run.

    Attributes:
        inputs: files, folders, globs, or "-" for standard input; see `inputs`.
        output_prefix: PREFIX_{key}_document.bin, .idx and .json will be written.
        tokenizer, vocab_size: which one; see `open_tokenizer`.
        json_keys: fields of a record, one dataset each.
        append_eod: end documents that are not empty with the end-of-document token.
        workers: processes that encode; the result does not depend on their number.
        text_documents: what one document of a text file is, one of TEXT_DOCUMENTS.
        max_document_mb: longest document, line or row [MiB]; longer ones are left out. None: what
            the tokenizer encodes in the memory of a worker.
        strict: end with an error at the first record that has to be left out.
        resume: go on where an interrupted run of the same settings was.
        log_interval: a line of progress every so many documents; 0: every few seconds.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    vocab_size: int = 0
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    workers: int = os.cpu_count() or 1
    text_documents: str = "file"
    max_document_mb: int | None = None
    strict: bool = False
    resume: bool = False
    log_interval: int = 0

    @property
    def longest_mb(self) -> int:
        """Longest document, line or row in use [MiB]."""
        if self.max_document_mb is None:
            return default_max_document_mb(self.tokenizer.tokenizer)
        return self.max_document_mb

    def prefix(self, key: str) -> Path:
        """Of a key's dataset, as Megatron-LM names it."""
        return Path(f"{self.output_prefix}_{key}_document")


def problems(settings: Settings, inputs: list[Input]) -> Iterator[str]:
    """A sentence for everything that is wrong with the settings; the inputs were found."""
    if settings.workers < 1:
        yield f"--workers {settings.workers}: at least 1 process has to encode"
    yield from reading_problems(settings.longest_mb)
    if settings.log_interval < 0:
        yield f"--log-interval {settings.log_interval}: a number of documents is 0 or more"
    if settings.text_documents not in TEXT_DOCUMENTS:
        nearest = suggest(settings.text_documents, TEXT_DOCUMENTS, every=True)
        yield f"--text-documents {settings.text_documents} is unknown{nearest}"
    if inputs and settings.text_documents != "file" and "text" not in {i.kind for i in inputs}:
        yield (
            f"--text-documents {settings.text_documents} has no effect without a .txt --input; "
            "leave it out"
        )
    keys = settings.json_keys
    for key in {key for key in keys if keys.count(key) > 1}:
        yield f"--json-keys: {key} is named twice"
    for key in keys:
        if not _can_be_in_a_name(key):
            yield f"--json-keys: {key!r} cannot be part of a file's name"
    if len(keys) > 1 and (text := [each for each in inputs if each.kind == "text"]):
        yield f"--json-keys {' '.join(keys)}: a text file has no keys, but {text[0].path} is one"
    if settings.resume and any(each.path == STANDARD_INPUT for each in inputs):
        yield "--resume: standard input cannot be read from the middle; give files"
    named = [settings.prefix(key) for key in keys if _can_be_in_a_name(key)]
    yield from prefix_problems(settings.output_prefix, named)


def _can_be_in_a_name(key: str) -> bool:
    return bool(key) and "/" not in key and "\0" not in key


def prefix_problems(output_prefix: str, datasets: Sequence[Path]) -> Iterator[str]:
    """A sentence for everything that keeps datasets from being written there.

    Args:
        output_prefix: the flag's value.
        datasets: the prefixes that follow from it.
    """
    folder = Path(output_prefix).parent
    if output_prefix.endswith("/"):
        yield (
            f"--output-prefix {output_prefix}: the beginning of a file's name is missing, as in "
            f"{output_prefix}corpus"
        )
    elif not os.path.isdir(folder):
        yield f"--output-prefix {output_prefix}: there is no folder {folder}"
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield f"--output-prefix {output_prefix}: {folder} cannot be written"
    else:
        for path in (Path(f"{prefix}.{suffix}") for prefix in datasets for suffix in SUFFIXES):
            if problem := long_name(path):
                yield f"--output-prefix {output_prefix}: {problem}"
                return
            if path.is_dir():
                yield f"--output-prefix {output_prefix}: {path} is a folder"


def long_name(path: Path) -> str:
    """What is wrong with the name of a file to write in a folder that there is; "" if nothing."""
    size, most = len(os.fsencode(path.name)), os.pathconf(path.parent, "PC_NAME_MAX")
    return f"a file's name of {size} bytes is too long, {most} is the most" if size > most else ""
