"""Text into an indexed dataset in the cache, and the embedded default corpus.

With no `--data` the corpus is the source text of the running Python's own standard library: real
text, on every machine, nothing shipped and nothing downloaded. A corpus is tokenized once, under a
lock, and appears in the cache under its final name only when it is complete.
"""

from __future__ import annotations

import hashlib
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megalite.config_data import DataConfig
from megalite.data.cache import cache_folder, locked
from megalite.data.entropy import TokenCounter
from megalite.data.indexed_format import token_dtype
from megalite.data.indexed_reader import IndexedReader
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.sidecar import (
    Sidecar,
    SourceFile,
    content_problems,
    read_sidecar,
    sidecar_path,
    tokenizer_problem,
)
from megalite.data.source import Source, find_source
from megalite.data.texts import SEQUENCE_BYTES, WANTED_SEQUENCES, parts, source_files
from megalite.errors import DataError
from megalite.reading.inputs import Input
from megalite.tokenizer.base import Tokenizer
from megalite.tokenizer.byte import ByteTokenizer
from megalite.wording import counted

FORMAT = 7
"""Part of the cache's key: raised when the same text would give other files."""

HEAD_TOKENS = 1 << 24
"""Of a `.bin` so much is read at every start; a change behind it is found by
`tools/inspect_dataset.py --verify` alone."""


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus.

    Attributes:
        prefix: of its .bin and .idx; empty for random tokens.
        description: what it is, for people.
        fingerprint: of the whole index and the first `HEAD_TOKENS`, as they are in the files;
            ranks with different fingerprints refuse to train together.
        documents, tokens: their numbers.
        max_token: largest token id seen (of a dataset without sidecar: in its first `HEAD_TOKENS`).
        text_bytes: bytes of the text; 0 if unknown.
        unigram_nats, bigram_nats: entropy of a token, and of a token given the one before [nats];
            0 if unknown, as the latter is of a large vocabulary (`TokenCounter`).
        tokenizer_type, tokenizer_fingerprint: of the one that wrote it; empty if unknown.
        eod: the token that ends its documents, None if unknown.
        append_eod: documents end with it, as far as its sidecar says.
    """

    prefix: str
    description: str
    fingerprint: str
    documents: int
    tokens: int
    max_token: int
    text_bytes: int = 0
    unigram_nats: float = 0.0
    bigram_nats: float = 0.0
    tokenizer_type: str = ""
    tokenizer_fingerprint: str = ""
    eod: int | None = None
    append_eod: bool = True

    def bits_per_byte(self, loss: float) -> float | None:
        """A loss [nats per token] as bits per byte of text; None if the text's size is unknown."""
        if not self.text_bytes:
            return None
        return loss / math.log(2.0) * self.tokens / self.text_bytes

    def describe(self) -> str:
        """One line for the opening of a run."""
        if not self.prefix:
            return self.description
        text = f"{self.description}: {counted(self.documents, 'document')}, "
        text += counted(self.tokens, "token")
        if self.unigram_nats:
            text += f"; entropy {self.unigram_nats:.3f} nats by token counts"
        if self.bigram_nats:
            text += f", {self.bigram_nats:.3f} by pairs"
        return text


def prepare_corpus(data: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Find or tokenize the corpus that the configuration names.

    Safe to call from many processes at once: one tokenizes, the others wait.

    Args:
        data: the configuration.
        tokenizer: of its text; None: that of bytes.

    Raises:
        DataError: unreadable, empty or malformed input, or a cache that cannot be written.
    """
    tokenizer = tokenizer or ByteTokenizer()
    source = find_source(data)
    if source.kind == "mock":
        return Corpus("", "random tokens", "mock", 0, 0, 0)
    if source.kind == "indexed":
        return _describe_indexed(source.path, tokenizer, named=data.tokenizer_type != "auto")
    files = source_files(source)
    prefix = cache_folder(data) / f"{source.kind}-{_cache_key(files, tokenizer)}"
    found = _read_cache(prefix)
    if found is None:
        with locked(prefix):
            found = _read_cache(prefix)
            if found is None:
                _tokenize(source, files, prefix, data.tokenizer, tokenizer)
                found = _read_cache(prefix)
    if found is None:
        raise DataError(
            f"{prefix} cannot be read back as it was written: give another folder with "
            "--data-cache-path"
        )
    return replace(found, description=_describe(source))


def _read_cache(prefix: Path) -> Corpus | None:
    """The tokenized corpus, or None if it is missing, incomplete or damaged."""
    try:
        sidecar = read_sidecar(prefix)
        return _corpus(prefix, sidecar) if sidecar else None
    except DataError:
        return None


def _corpus(prefix: Path, sidecar: Sidecar | None) -> Corpus:
    """What is known of a dataset: by its files, and by the sidecar if there is one.

    Raises:
        DataError: the files break a rule of the format, or are not those of the sidecar.
    """
    reader = IndexedReader(prefix)
    with open(f"{prefix}.idx", "rb") as index:  # of 100 million documents it has 2 GB
        digest = hashlib.file_digest(index, "sha256")
    head = reader.read(0, min(reader.num_tokens, HEAD_TOKENS))
    if len(head) and int(head.min()) < 0:
        raise DataError(f"{prefix}.bin holds a negative token id, {int(head.min())}")
    corpus = Corpus(
        prefix=str(prefix),
        description=str(prefix),
        fingerprint="",
        documents=len(reader.documents) - 1,
        tokens=reader.num_tokens,
        max_token=int(head.max(initial=0)),
    )
    if sidecar is not None:
        found: dict[str, int | str] = {
            "documents": corpus.documents,
            "sequences": len(reader.lengths),
            "tokens": corpus.tokens,
            "idx": digest.hexdigest(),
        }
        if len(head) == corpus.tokens:
            found["bin"] = hashlib.sha256(head.data).hexdigest()
        problems = content_problems(prefix, sidecar, found)
        if problems:
            raise DataError(problems)
        corpus = replace(
            corpus,
            max_token=max(0, sidecar.max_token),
            text_bytes=sidecar.text_bytes,
            unigram_nats=sidecar.unigram_nats,
            bigram_nats=sidecar.bigram_nats,
            tokenizer_type=sidecar.tokenizer_type,
            tokenizer_fingerprint=sidecar.tokenizer_fingerprint,
            eod=sidecar.eod,
            append_eod=sidecar.append_eod,
        )
    digest.update(head.data)
    return replace(corpus, fingerprint=digest.hexdigest()[:16])


def _tokenize(
    source: Source, files: Sequence[Input], prefix: Path, name: str, tokenizer: Tokenizer
) -> None:
    """Write .bin, .idx and, last, the sidecar that marks them as complete."""
    try:
        writer = IndexedWriter(prefix, token_dtype(tokenizer.vocab_size))
        try:
            sidecar = _write_tokens(source, files, writer, name, tokenizer)
        finally:
            writer.discard()
        temporary = Path(f"{prefix}.tmp-{socket.gethostname()}-{os.getpid()}.json")
        sidecar.write(temporary)
        os.replace(temporary, sidecar_path(prefix))
    except OSError as error:
        raise DataError(
            f"cannot write the tokenized corpus to {prefix.parent}: {error.strerror}; "
            "give another folder with --data-cache-path"
        ) from None


def _write_tokens(
    source: Source, files: Sequence[Input], writer: IndexedWriter, name: str, tokenizer: Tokenizer
) -> Sidecar:
    counter = TokenCounter(tokenizer.vocab_size)
    text_bytes = 0
    uncut = source.kind == "text" and not isinstance(tokenizer, ByteTokenizer)
    for part in parts(source, files, tokenizer):
        tokens = part.tokens
        if part.ends_document and len(tokens):
            tokens = np.append(tokens, tokens.dtype.type(tokenizer.eod))
        for sequence in _cut(tokens) if uncut else [tokens]:
            if len(sequence):
                writer.add_sequence(sequence)
        counter.add(tokens)
        if part.ends_document:
            writer.end_document()
        text_bytes += part.text_bytes
    if not text_bytes:
        raise DataError(f"--data {source.path} holds no text")
    written = writer.flush()
    sums = writer.close()
    unigram, bigram = counter.entropies()
    return Sidecar(
        tokenizer_type=name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=True,
        documents=written.documents,
        sequences=written.sequences,
        tokens=written.tokens,
        text_bytes=text_bytes,
        max_token=counter.largest,
        left_out=0,
        bin=sums["bin"],
        idx=sums["idx"],
        sources=tuple(SourceFile(file.path, file.size) for file in files),
        unigram_nats=unigram,
        bigram_nats=bigram,
    )


def _describe(source: Source) -> str:
    if source.kind == "stdlib":
        return f"source text of Python's standard library in {source.path}"
    return str(source.path)


def _describe_indexed(prefix: Path, tokenizer: Tokenizer, *, named: bool) -> Corpus:
    """A dataset that somebody else wrote, or our tools."""
    sidecar = read_sidecar(prefix)
    problem = tokenizer_problem(prefix, sidecar, tokenizer) if sidecar else None
    if problem and named:
        raise DataError(f"--data {problem}")
    corpus = _corpus(prefix, sidecar)
    return replace(corpus, text_bytes=0) if problem else corpus  # its text cannot be shown


def _cut(tokens: np.ndarray) -> list[np.ndarray]:
    """Tokens of a text file in sequences of nearly equal lengths."""
    count = min(len(tokens) // SEQUENCE_BYTES.start, WANTED_SEQUENCES)
    count = max(count, -(-len(tokens) // SEQUENCE_BYTES.stop), 1)
    return np.array_split(tokens, count)


def _cache_key(files: Sequence[Input], tokenizer: Tokenizer) -> str:
    """Names what is tokenized by path, sizes and times of change: content is not read again."""
    digest = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint}".encode())
    for file in files:
        digest.update(f"{os.path.realpath(file.path)} {file.size} {file.changed_ns}\n".encode())
    return digest.hexdigest()[:16]
