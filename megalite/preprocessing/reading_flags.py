"""The flags of every tool that reads text: which records it leaves out."""

from __future__ import annotations

from collections.abc import Iterator

from megalite.preprocessing.flags import Flag

DEFAULT_MAX_DOCUMENT_MB = 8
"""SentencePiece's BPE takes some 40 bytes for a byte of text: a worker that encodes a document of
16 MiB had a peak of 949 MB, of 8 MiB 494 MB; with tiktoken or bytes it is a third of that."""

READING_FLAGS = (
    Flag(
        "--max-document-mb",
        "Longest document, and line of JSON; longer ones are left out and named.",
        DEFAULT_MAX_DOCUMENT_MB,
        metavar="MIB",
    ),
    Flag("--strict", "Stop at a record that cannot be used, in place of leaving it out.", False),
)


def reading_problems(max_document_mb: int) -> Iterator[str]:
    """A sentence if the limit is none."""
    if not 1 <= max_document_mb <= 1024:
        yield f"--max-document-mb {max_document_mb}: from 1 to 1024"
