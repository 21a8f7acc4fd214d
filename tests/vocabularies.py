"""Vocabularies trained here, small and quickly: the named ones of the field would be downloads."""

from __future__ import annotations

import base64
import json
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

MIXED = (
    "The quick brown fox can't jump over the lazy dog's 12345 fences; we'll see, I'VE seen. "
    "Größe, café, naïve, Straße, ÉCOLE, ﬁne. Быстрая лиса прыгает. Η αλεπού. "
    "敏捷的棕色狐狸跳过了懒狗。すばやい茶色の狐。빠른 갈색 여우. "
    "السريع الثعلب البني שועל חום מהיר तेज़ भूरी लोमड़ी "
    "😀😃 👩‍👩‍👧‍👦 🇩🇪 ✊🏽 \u200b\u00a0\u3000\t\r\n  \n\n   def f(x):\n        return x ** 2\n"
)


@cache
def training_text() -> str:
    """Half a megabyte of Python sources, and other scripts."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse", "ast", "configparser", "datetime", "inspect", "pathlib", "typing")
    sources = "".join((root / f"{name}.py").read_text(encoding="utf-8") for name in names)
    return sources + MIXED * 200


def _lines() -> Iterator[str]:
    return iter(training_text().splitlines(keepends=True))


@cache
def byte_level(vocab_size: int = 3000) -> tokenizers.Tokenizer:
    """A GPT-2-like tokenizer of the tokenizers package, <|endoftext|> its last token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@cache
def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's letters for bytes, found out from the package by writing each byte in UTF-8."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    visible = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    hidden = sorted(set(range(256)) - set(visible.values()))
    return visible | dict(zip((x for x in letters if ord(x) >= 256), hidden, strict=True))


@cache
def ranks(vocab_size: int = 3000) -> dict[bytes, int]:
    """Ranks as in a tiktoken file: the bytes, then the merges in their order."""
    letters = _bytes_of_letters()
    vocabulary = byte_level(vocab_size).get_vocab(with_added_tokens=False)
    return {bytes(letters[c] for c in text): rank for text, rank in vocabulary.items()}


def write_ranks(path: Path, content: dict[bytes, int] | None = None) -> Path:
    """A tiktoken file."""
    content = ranks() if content is None else content
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in content.items()]
    path.write_bytes(b"".join(lines))
    return path


def write_megatron_ranks(path: Path) -> Path:
    """Megatron-LM's JSON list of ranks; there the first 256 are the bytes in their order."""
    single = [(bytes([byte]), byte) for byte in range(256)]
    ordered = [*single, *sorted(ranks().items(), key=lambda item: item[1])[256:]]
    entries = [
        {
            "rank": rank,
            "token_bytes": base64.b64encode(token).decode(),
            "token_str": token.decode("utf-8", "replace"),
        }
        for token, rank in ordered
    ]
    path.write_text(json.dumps(entries))
    return path


def write_gpt2(folder: Path) -> tuple[Path, Path]:
    """vocab.json and merges.txt."""
    model = json.loads(byte_level().to_str())
    vocabulary = {**model["model"]["vocab"], "<|endoftext|>": len(model["model"]["vocab"])}
    vocab_file, merge_file = folder / "vocab.json", folder / "merges.txt"
    vocab_file.write_text(json.dumps(vocabulary))
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["model"]["merges"])
    merge_file.write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    return vocab_file, merge_file


def write_tokenizer_json(folder: Path) -> Path:
    """tokenizer.json of the same tokenizer."""
    path = folder / "tokenizer.json"
    byte_level().save(str(path))
    return path


@cache
def sentencepiece_content(kind: str = "bpe", vocab_size: int = 1000, **options: object) -> bytes:
    """A SentencePiece model."""
    lines = [line for line in training_text().splitlines()[::6] if line.strip()]
    parts: list[bytes] = []

    class Writer:
        def write(self, content: bytes) -> None:
            parts.append(content)

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:3000] + [MIXED] * 20),
        model_writer=Writer(),
        vocab_size=vocab_size,
        model_type=kind,
        byte_fallback=True,
        character_coverage=0.999,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return b"".join(parts)


def write_sentencepiece(path: Path, kind: str = "bpe", **options: object) -> Path:
    """A SentencePiece model file."""
    path.write_bytes(sentencepiece_content(kind, **options))
    return path
