"""Files of byte-level BPE vocabularies: tiktoken's ranks, Megatron-LM's JSON, GPT-2's pair.

Every reader raises `DataError` with one sentence that names the file and what is wrong.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megalite.errors import DataError

_MOST = (1 << 31) - (1 << 20)
"""Token ids are 32-bit numbers, special tokens after the last one too."""


def read_ranks(path: str) -> dict[bytes, int]:
    """Rank of each token.

    Args:
        path: lines of a token in base64 and its rank (tiktoken's format; LLaMA 3's
            `tokenizer.model` is one), or a JSON list of objects with `rank` and `token_bytes`
            (Megatron-LM's format), told apart by the suffix .json.

    Raises:
        DataError: unreadable, malformed, a token or rank twice, or not all 256 bytes.
    """
    content = read_bytes(path)
    entries = _json_entries(path, content) if path.endswith(".json") else _lines(path, content)
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    for where, token, rank in entries:
        if token in ranks or rank in seen:
            what = f"token {token!r}" if token in ranks else f"rank {rank}"
            raise DataError(f"{path}: {where} has {what} a second time")
        ranks[token] = rank
        seen.add(rank)
    _check_bytes(path, ranks)
    return ranks


def _lines(path: str, content: bytes) -> Iterator[tuple[str, bytes, int]]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            text, rank_text = line.split()
            token, rank = base64.b64decode(text, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            token, rank = b"", -1
        if not token or not 0 <= rank < _MOST:
            raise DataError(
                f"{path}: line {number} is {_short(line)}; expected a token in base64 and its "
                "rank, as in tiktoken's files"
            )
        yield f"line {number}", token, rank


def _json_entries(path: str, content: bytes) -> Iterator[tuple[str, bytes, int]]:
    entries = _parse_json(path, content)
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of objects with rank and token_bytes")
    for number, entry in enumerate(entries):
        try:
            token, rank = base64.b64decode(entry["token_bytes"], validate=True), entry["rank"]
        except (KeyError, TypeError, ValueError):
            token, rank = b"", -1
        if not token or rank != number:
            raise DataError(
                f"{path}: entry {number} is {_short(entry)}; expected an object with rank "
                f"{number} and token_bytes in base64"
            )
        yield f"entry {number}", token, rank


def read_gpt2(
    vocab_file: str, merge_file: str
) -> tuple[dict[str, int], dict[bytes, int], list[tuple[bytes, bytes]]]:
    """GPT-2's vocab.json and merges.txt.

    Returns:
        Ids of the special tokens by text: entries longer than a byte that no merge makes.
        Ids of the other tokens by their bytes.
        The merges, first ones first, as the bytes of both parts.

    Raises:
        DataError: unreadable, malformed, or files that do not belong together.
    """
    vocabulary = _parse_json(vocab_file, read_bytes(vocab_file))
    if not isinstance(vocabulary, dict) or not all(
        isinstance(number, int) and 0 <= number < _MOST for number in vocabulary.values()
    ):
        raise DataError(f"{vocab_file}: expected one JSON object of tokens and their ids")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise DataError(f"{vocab_file}: two tokens have one id")
    pairs = list(_merge_lines(merge_file))
    made = {left + right for left, right in pairs}
    ids, special = {}, {}
    to_byte = _bytes_of_characters()
    for text, number in vocabulary.items():
        token = bytes(to_byte[c] for c in text) if all(c in to_byte for c in text) else b""
        if len(token) == 1 or token in made:
            ids[token] = number
        else:
            special[text] = number
    for left, right in pairs:
        for part in (left, right, left + right):
            if part not in ids:
                raise DataError(
                    f"{merge_file}: the merge {left!r} + {right!r} needs the token {part!r}, "
                    f"which {vocab_file} does not have: are the files of one tokenizer?"
                )
    _check_bytes(vocab_file, ids)
    return special, ids, pairs


def _merge_lines(path: str) -> Iterator[tuple[bytes, bytes]]:
    try:
        lines = read_bytes(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
    to_byte = _bytes_of_characters()
    for number, line in enumerate(lines, start=1):
        # Only the first line can be a comment: "#" is also a token.
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split()
        if len(parts) != 2 or not all(c in to_byte for part in parts for c in part):
            raise DataError(
                f"{path}: line {number} is {_short(line)}; expected two tokens, as in GPT-2's "
                "merges.txt"
            )
        left, right = (bytes(to_byte[c] for c in part) for part in parts)
        yield left, right


def _bytes_of_characters() -> dict[str, int]:
    """Byte of each character in GPT-2's files: they spell a byte that is a visible Latin-1
    character as itself, and the others, in their order, from U+0100 on."""
    visible = [b for b in range(256) if chr(b).isprintable() and b not in b" \xa0"]
    hidden = (b for b in range(256) if b not in visible)
    return {
        **{chr(b): b for b in visible},
        **{chr(0x100 + i): b for i, b in enumerate(hidden)},
    }


def read_bytes(path: str) -> bytes:
    """The whole file.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}") from None
    if not content:
        raise DataError(f"{path} is empty")
    return content


def _parse_json(path: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def _check_bytes(path: str, tokens: Iterable[bytes]) -> None:
    missing = {bytes([byte]) for byte in range(256)}.difference(tokens)
    if missing:
        raise DataError(
            f"{path} has no token for {len(missing)} of the 256 bytes, the first is "
            f"{min(missing)!r}: a byte-level vocabulary has them all"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
