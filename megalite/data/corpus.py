"""Text into an indexed dataset in the cache, and the embedded default corpus.

With no `--data` the corpus is the source text of the running Python's own standard library: real
text, on every machine, nothing shipped and nothing downloaded. A corpus is tokenized once, under a
lock, and appears in the cache under its final name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path

import numpy as np

from megalite.config_data import DataConfig
from megalite.data.cache import cache_folder, locked
from megalite.data.entropy import TokenCounter
from megalite.data.indexed import IndexedReader, IndexedWriter, token_dtype
from megalite.data.sidecar import read_sidecar, tokenizer_problem
from megalite.data.source import Source, find_source
from megalite.errors import DataError
from megalite.reading.chunks import Place, chunks
from megalite.reading.inputs import input_of
from megalite.reading.records import sentences, texts
from megalite.tokenizer.base import Tokenizer
from megalite.tokenizer.byte import ByteTokenizer

FORMAT = 4
"""Part of the cache's key: raised when the same text would give other files."""

STDLIB_CAP_BYTES = 16 << 20
STDLIB_LEAST_BYTES = 1 << 20
SEQUENCE_BYTES = range(256, 4096)
WANTED_SEQUENCES = 64
"""A text file is one document, cut into so many sequences, or more if they would be longer than
that; at line ends where there are any. So a split by sequences (Megatron's unit) can cut inside.
Other tokenizers than that of bytes see the text uncut, and their tokens are cut. That, and that any
bytes are a text, is why preprocessing's reading of text files does not serve here."""

PART_BYTES = 16 << 20
"""A longer text file is tokenized in parts, cut at a line end: the memory it takes has a bound."""

MOST_RECORD_BYTES = 1 << 30
"""Of a line of JSON, or of a row: a file without line ends is not read into memory whole."""

_KEYS = ("text",)
"""The field of a record that is read."""

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
    | {"_vendor", "_bundled", "lib-dynload"}
)


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus.

    Attributes:
        prefix: of its .bin and .idx; empty for random tokens.
        description: what it is, for people.
        fingerprint: of the tokens; ranks with different fingerprints refuse to train together.
        documents, tokens: their numbers.
        max_token: largest token id seen (of a dataset without sidecar: in its first 16 Mi tokens).
        text_bytes: bytes of the text; 0 if unknown.
        unigram_nats, bigram_nats: entropy of a token, and of a token given the one before [nats];
            0 if unknown, as the latter is of a large vocabulary (`TokenCounter`).
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

    def bits_per_byte(self, loss: float) -> float | None:
        """A loss [nats per token] as bits per byte of text; None if the text's size is unknown."""
        if not self.text_bytes:
            return None
        return loss / math.log(2.0) * self.tokens / self.text_bytes

    def describe(self) -> str:
        """One line for the opening of a run."""
        if not self.prefix:
            return self.description
        text = f"{self.description}: {self.documents:,} documents, {self.tokens:,} tokens"
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
    folder = cache_folder(data)
    prefix = folder / f"{source.kind}-{_cache_key(source, tokenizer)}"
    cached = _read_cache(prefix)
    if cached is None:
        with locked(prefix):
            cached = _read_cache(prefix)
            if cached is None:
                cached = _tokenize(source, prefix, tokenizer)
    return cached


def _read_cache(prefix: Path) -> Corpus | None:
    """The tokenized corpus, or None if it is missing, incomplete or damaged."""
    try:
        facts = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
        corpus = Corpus(prefix=str(prefix), **facts)
        reader = IndexedReader(prefix)
    except (OSError, ValueError, TypeError):  # DataError is a ValueError
        return None
    return corpus if len(reader.tokens) == corpus.tokens else None


def stdlib_files(root: Path) -> list[Path]:
    """Python sources of the standard library without tests, vendored and installed packages.

    The order is by the hash of the path: fixed, and unrelated to the alphabet, so that the size cap
    and the held-out share are both a fair sample.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        found += [path for path in paths if path.is_file()]  # not a link to nowhere
    key = {path: hashlib.sha256(path.relative_to(root).as_posix().encode()) for path in found}
    return sorted(found, key=lambda path: key[path].digest())


def _tokenize(source: Source, prefix: Path, tokenizer: Tokenizer) -> Corpus:
    """Write .bin, .idx and, last, the sidecar that marks them as complete."""
    try:
        writer = IndexedWriter(prefix, token_dtype(tokenizer.vocab_size))
        try:
            corpus = _write_tokens(source, prefix, writer, tokenizer)
        finally:
            writer.discard()
        facts = asdict(corpus)
        del facts["prefix"]  # the cache may be moved
        temporary = Path(f"{prefix}.tmp-{socket.gethostname()}-{os.getpid()}.json")
        temporary.write_text(json.dumps(facts, indent=2), encoding="utf-8")
        os.replace(temporary, f"{prefix}.json")
    except OSError as error:
        raise DataError(
            f"cannot write the tokenized corpus to {prefix.parent}: {error.strerror}; "
            "give another folder with --data-cache-path"
        ) from None
    return corpus


def _write_tokens(
    source: Source, prefix: Path, writer: IndexedWriter, tokenizer: Tokenizer
) -> Corpus:
    counter = TokenCounter(tokenizer.vocab_size)
    digest = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint}".encode())
    text_bytes = documents = 0
    is_bytes = isinstance(tokenizer, ByteTokenizer)
    for text, ends_document in _sequences(source, SEQUENCE_BYTES if is_bytes else None):
        tokens = _tokens(text, tokenizer)
        if ends_document and len(tokens):
            tokens = np.append(tokens, tokens.dtype.type(tokenizer.eod))
        # Bytes were cut before: any place is between two tokens.
        uncut = is_bytes or source.kind != "text"
        for sequence in [tokens] if uncut else _cut(tokens):
            if len(sequence):
                writer.add_sequence(sequence)
        counter.add(tokens)
        digest.update(tokens.tobytes())
        if ends_document:
            writer.end_document()
            documents += 1
        text_bytes += len(text)
    if not text_bytes:
        raise DataError(f"--data {source.path} holds no text")
    writer.close()
    unigram, bigram = counter.entropies()
    return Corpus(
        prefix=str(prefix),
        description=_describe(source),
        fingerprint=digest.hexdigest()[:16],
        documents=documents,
        tokens=counter.total,
        max_token=counter.largest,
        text_bytes=text_bytes,
        unigram_nats=unigram,
        bigram_nats=bigram,
    )


def _describe(source: Source) -> str:
    if source.kind == "stdlib":
        return f"source text of Python's standard library in {source.path}"
    return str(source.path)


def _describe_indexed(prefix: Path, tokenizer: Tokenizer, *, named: bool) -> Corpus:
    """What is known of a dataset: by its sidecar, or by looking at its first tokens."""
    reader = IndexedReader(prefix)
    sidecar = read_sidecar(prefix)
    if sidecar:
        problem = tokenizer_problem(prefix, sidecar, tokenizer)
        if problem and named:
            raise DataError(f"--data {problem}")
        return Corpus(
            prefix=str(prefix),
            description=str(prefix),
            fingerprint=sidecar.content[:16],
            documents=sidecar.documents,
            tokens=sidecar.tokens,
            max_token=max(0, sidecar.max_token),
            text_bytes=0 if problem else sidecar.text_bytes,  # its text cannot be shown
        )
    with open(f"{prefix}.idx", "rb") as index:  # of 100 million documents it has 2 GB
        digest = hashlib.file_digest(index, "sha256")
    head = np.asarray(reader.tokens[: 1 << 24])
    digest.update(head.tobytes())
    if len(head) and int(head.min()) < 0:
        raise DataError(f"{prefix}.bin holds a negative token id, {int(head.min())}")
    return Corpus(
        prefix=str(prefix),
        description=str(prefix),
        fingerprint=digest.hexdigest()[:16],
        documents=len(reader.documents) - 1,
        tokens=len(reader.tokens),
        max_token=int(head.max(initial=0)),
    )


def _tokens(text: bytes, tokenizer: Tokenizer) -> np.ndarray:
    """Tokens of a text, int [tokens]. Bytes that are not UTF-8 are tokens of bytes, and elsewhere
    U+FFFD."""
    if isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(text, np.uint8).astype(np.uint16)
    try:
        decoded = text.decode("utf-8", "surrogatepass")  # of JSON; the tokenizer replaces them
    except UnicodeDecodeError:
        decoded = text.decode("utf-8", "replace")
    return tokenizer.encode_batch([decoded])[0]


def _cut(tokens: np.ndarray) -> list[np.ndarray]:
    """Tokens of a text file in sequences of nearly equal lengths."""
    count = min(len(tokens) // SEQUENCE_BYTES.start, WANTED_SEQUENCES)
    count = max(count, -(-len(tokens) // SEQUENCE_BYTES.stop), 1)
    return np.array_split(tokens, count)


def _sequences(source: Source, lengths: range | None) -> Iterator[tuple[bytes, bool]]:
    """Text of each sequence, and whether it is the last of its document.

    Args:
        source: what to read.
        lengths: of the sequences of a text file [bytes]; None: parts as large as memory should
            hold.

    Raises:
        DataError: the source cannot be read.
    """
    read: dict[str, Callable[[Path], Iterator[tuple[bytes, bool]]]] = {
        "stdlib": _stdlib_sequences,
        "records": _record_sequences,
        "text": partial(_text_sequences, lengths=lengths or range(PART_BYTES, PART_BYTES)),
    }
    sequences = read[source.kind](source.path)
    while True:
        # Only reading is in here: what fails in writing is not the source's fault.
        try:
            item = next(sequences, None)
        except OSError as error:
            raise _unreadable(error) from None
        if item is None:
            return
        yield item


def _unreadable(error: OSError) -> DataError:
    return DataError(f"{error.filename} cannot be read: {error.strerror}")


def _stdlib_sequences(root: Path) -> Iterator[tuple[bytes, bool]]:
    files = stdlib_files(root)
    if sum(path.stat().st_size for path in files) < STDLIB_LEAST_BYTES:
        raise DataError(
            f"this Python comes without the sources of its standard library ({root} holds "
            f"{len(files)} .py files), so there is no built-in corpus: give a text with --data"
        )
    total = 0
    for path in files:
        text = path.read_bytes()
        total += len(text)
        if total > STDLIB_CAP_BYTES:
            return
        yield text, True


def _text_sequences(path: Path, lengths: range) -> Iterator[tuple[bytes, bool]]:
    with open(path, "rb") as file:
        wanted = path.stat().st_size // WANTED_SEQUENCES
        size = max(lengths.start, min(lengths.stop, wanted))
        current = _about(size, file)
        while current:
            following = _about(size, file)
            yield current, not following
            current = following


def _about(size: int, file: BufferedReader) -> bytes:
    """Lines of about so many bytes together, or a part of a long one, cut between two characters;
    empty at the end."""
    parts, total = [], 0
    while total < size and (line := file.readline(2 * size)):
        parts.append(line)
        total += len(line)
    while parts and b"\x80" <= file.peek(1)[:1] < b"\xc0":  # inside a character of UTF-8
        parts.append(file.read(1))
    return b"".join(parts)


def _record_sequences(path: Path) -> Iterator[tuple[bytes, bool]]:
    source = (input_of(str(path)),)
    for chunk in chunks(source, _KEYS, "file", MOST_RECORD_BYTES, Place()):
        good, bad = texts(chunk, _KEYS, MOST_RECORD_BYTES, keep_surrogates=True)
        if bad:
            *others, last = sentences(bad, source)
            raise DataError(
                [*others, f"{last}; tools/preprocess_data.py leaves out what cannot be used"]
            )
        for (text,) in good:
            yield text.encode("utf-8", "surrogatepass"), True


def _cache_key(source: Source, tokenizer: Tokenizer) -> str:
    """Names what is tokenized by path, sizes and times of change: content is not read again."""
    files = stdlib_files(source.path) if source.kind == "stdlib" else [source.path]
    digest = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint}".encode())
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise _unreadable(error) from None
        digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
