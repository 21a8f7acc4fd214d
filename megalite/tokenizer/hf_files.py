"""A run's tokenizer as files that transformers reads, beside a model's. No torch import.

A SentencePiece model is written as tokenizer.json too, which transformers 4 and 5 read alike:
their own readers of a tokenizer.model need protobuf, and version 5 drops a text's first space.

Source: the merges of a SentencePiece BPE model follow from its pieces and their scores, as in
transformers' `SentencePieceExtractor`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.hf_config import read_json
from megalite.tokenizer.base import Tokenizer
from megalite.tokenizer.files import read_bytes
from megalite.tokenizer.sentencepiece import message_fields
from megalite.tokenizer.settings import TYPES, TokenizerSettings

CONFIG = "tokenizer_config.json"
_BESIDE = (CONFIG, "special_tokens_map.json", "chat_template.jinja")
_SPACE = "\u2581"
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
"""Types of pieces in sentencepiece_model.proto; of a normal one it is 1, or not said."""
_BPE = 2
"""Type of model there."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What goes along with a model.

    Attributes:
        files: content by name.
        bos, eos: tokens that begin and end a text; None: not known.
        told: why there are no files that transformers reads; empty: there are.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    bos: int | None = None
    eos: int | None = None
    told: str = ""


def hf_files(settings: TokenizerSettings, tokenizer: Tokenizer) -> TokenizerFiles:
    """The files of a tokenizer.

    Args:
        settings: of the run.
        tokenizer: that they name.

    Raises:
        DataError: a file can't be read.
    """
    kind, model = settings.tokenizer, settings.tokenizer_model
    if kind == "HuggingFaceTokenizer":
        return _copied(Path(model), tokenizer)
    if kind == "GPT2BPETokenizer":
        end = next(text for text, number in tokenizer.special.items() if number == tokenizer.eod)
        files = {
            "vocab.json": read_bytes(settings.vocab_file),
            "merges.txt": read_bytes(settings.merge_file),
            CONFIG: _json({"tokenizer_class": "GPT2Tokenizer", "eos_token": end}),
        }
        return TokenizerFiles(files, eos=tokenizer.eod)
    if "SentencePiece" in kind or kind == "Llama2Tokenizer":
        return _of_sentencepiece(read_bytes(model), tokenizer, begins=kind == "Llama2Tokenizer")
    return TokenizerFiles(
        eos=tokenizer.eod, told=f"no tokenizer files: transformers has no equal of {kind}"
    )


def settings_of(folder: Path) -> TokenizerSettings | None:
    """The tokenizer in a model's folder; None if there is none that is known."""
    for name, kind in (
        ("tokenizer.json", "HuggingFaceTokenizer"),
        ("tokenizer.model", "Llama2Tokenizer"),
    ):
        if os.path.isfile(folder / name):
            return TokenizerSettings(tokenizer_type=kind, tokenizer_model=str(folder / name))
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if os.path.isfile(vocab) and os.path.isfile(merges):
        return TokenizerSettings(
            tokenizer_type="GPT2BPETokenizer", vocab_file=str(vocab), merge_file=str(merges)
        )
    return None


def flags_of(settings: TokenizerSettings) -> str:
    """The flags that say so: type and files."""
    names = ("tokenizer_type", *TYPES[settings.tokenizer])
    return " ".join(f"--{name.replace('_', '-')} {getattr(settings, name)}" for name in names)


def _copied(path: Path, tokenizer: Tokenizer) -> TokenizerFiles:
    """tokenizer.json and its companions, without what would have transformers run code."""
    file = path / "tokenizer.json" if path.is_dir() else path
    files = {"tokenizer.json": read_bytes(str(file))}
    for name in _BESIDE:
        beside = file.with_name(name)
        if beside.is_file():
            files[name] = read_bytes(str(beside))
    end = next(text for text, number in tokenizer.symbols.items() if number == tokenizer.eod)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    if CONFIG in files:
        config |= read_json(file.with_name(CONFIG))
        config.pop("auto_map", None)
    files[CONFIG] = _json(config)
    begin = config.get("bos_token")
    text = begin.get("content") if isinstance(begin, dict) else begin
    return TokenizerFiles(files, tokenizer.symbols.get(str(text)), tokenizer.eod)


def _of_sentencepiece(content: bytes, tokenizer: Tokenizer, *, begins: bool) -> TokenizerFiles:
    """tokenizer.model, and tokenizer.json where that can say the same."""
    bos, eos = tokenizer.special.get("<s>"), tokenizer.eod
    files = {"tokenizer.model": content}
    if why := _no_equal(content):
        told = f"tokenizer.model alone: transformers has no equal of one with {why}"
        return TokenizerFiles(files, bos, eos, told)
    pieces = _pieces(content)
    unknown = next(text for text, _, kind in pieces if kind == _UNKNOWN)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if bos is None else pieces[bos][0],
        "eos_token": pieces[eos][0],
        "unk_token": unknown,
        "clean_up_tokenization_spaces": False,
    }
    files["tokenizer.json"] = _json(_tokenizer_json(content, unknown, bos if begins else None))
    files[CONFIG] = _json(config)
    return TokenizerFiles(files, bos, eos)


def _no_equal(content: bytes) -> str:
    """What of a SentencePiece model tokenizer.json can't say; empty: nothing."""
    trainer, normalizer = _message(content, 2), _message(content, 3)
    if trainer.get(3, 1) != _BPE:
        return "a model of another type than BPE"
    if normalizer.get(2):
        return "a normalization"
    if normalizer.get(4, 1):
        return "spaces that are removed"
    if trainer.get(24):
        return "a space behind a word"
    if any(kind == _USER_DEFINED for _, _, kind in _pieces(content)):
        return "symbols that a user defined"
    return ""


def _tokenizer_json(content: bytes, unknown: str, bos: int | None) -> dict[str, Any]:
    """A SentencePiece BPE model as tokenizer.json; `bos` begins each text."""
    pieces = _pieces(content)
    numbers = {text: number for number, (text, _, _) in enumerate(pieces)}
    merges = [
        (-score, numbers[text[:cut]], numbers[text[cut:]], text[:cut], text[cut:])
        for text, score, kind in pieces
        if kind not in (_UNKNOWN, _CONTROL, _BYTE)
        for cut in range(1, len(text))
        if text[:cut] in numbers and text[cut:] in numbers
    ]
    prefixed = _message(content, 3).get(3, 1)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    unspace = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if prefixed else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    begin = [{"SpecialToken": {"id": pieces[bos][0], "type_id": 0}}] if bos is not None else []
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": text, **plain, "special": True}
            for number, (text, _, kind) in enumerate(pieces)
            if kind in (_UNKNOWN, _CONTROL)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, space]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*begin, sequence],
            "pair": [*begin, sequence, *begin, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {}
            if bos is None
            else {pieces[bos][0]: {"id": pieces[bos][0], "ids": [bos], "tokens": [pieces[bos][0]]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [unspace, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": any(kind == _BYTE for _, _, kind in pieces),
            "vocab": numbers,
            "merges": [[left, right] for *_, left, right in sorted(merges)],
        },
    }


def _pieces(content: bytes) -> list[tuple[str, float, int]]:
    """Text, score and type of each piece of a model, by number."""
    found = []
    for number, part in message_fields(content):
        if number == 1:
            piece = dict(message_fields(part))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            found.append((str(piece[1], "utf-8"), score, piece.get(3, 1)))
    return found


def _message(content: bytes, number: int) -> dict[int, Any]:
    """The message in a field of a model, by its own fields' numbers."""
    return dict(message_fields(dict(message_fields(content)).get(number, b"")))


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"
