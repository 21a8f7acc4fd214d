"""A rearranged sample is what the definition gives, document after document, with every tokenizer;
with vocabularies that never change it never changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import vocabularies
from tokenizers import decoders, models, pre_tokenizers, processors

from megalite.data.fill_in_middle import FillInTheMiddle
from megalite.data.samples import PADDING
from megalite.data.sentinels import Sentinels
from megalite.tokenizer.base import Tokenizer
from megalite.tokenizer.bpe import rank_tokenizer
from megalite.tokenizer.byte import ByteTokenizer
from megalite.tokenizer.hf import HuggingFaceTokenizer
from megalite.tokenizer.sentencepiece import SentencePieceTokenizer

NAMES = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
PAIRS = [
    *(bytes(pair) for pair in product(b"abcdefghijklmnopqrstuvwxyz", repeat=2)),
    *(b" " + bytes([letter]) for letter in b"abcdefghijklmnopqrstuvwxyz"),
]


def written(folder: Path) -> dict[str, Tokenizer]:
    """Tokenizers whose vocabularies are written here: all bytes, and pairs of letters."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {p: 256 + i for i, p in enumerate(PAIRS)}
    path = str(vocabularies.write_ranks(folder / "pairs.tiktoken", ranks))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(pair.decode().replace(" ", "Ġ")) for pair in PAIRS]
    tokens = [*alphabet, *map("".join, merges), "<s>", "</s>"]
    model = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<s>", "</s>", *NAMES])
    around = [(name, model.token_to_id(name)) for name in ("<s>", "<fim_suffix>")]
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A <fim_suffix>", special_tokens=around
    )
    model.save(str(folder / "tokenizer.json"))
    return {
        "bytes": ByteTokenizer(),
        "tiktoken": rank_tokenizer(path, "cl100k_base"),
        "regex": rank_tokenizer(path, "cl100k_base", engine="regex"),
        "tokenizers": HuggingFaceTokenizer(str(folder)),
    }


def trained(folder: Path) -> dict[str, Tokenizer]:
    path = str(vocabularies.write_sentencepiece(folder / "a.model"))
    user = {"user_defined_symbols": ",".join(NAMES)}
    uni = str(vocabularies.write_sentencepiece(folder / "b.model", "unigram", **user))
    return {
        "sentencepiece": SentencePieceTokenizer(path, bos=False),
        "sentencepiece, <s>": SentencePieceTokenizer(path, bos=True),
        "unigram, user symbols": SentencePieceTokenizer(uni, bos=True),
    }


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("files")
    return written(folder) | trained(folder)


def sentinels(tokenizer: Tokenizer) -> Sentinels:
    """Any tokens do, if they are none of the text's."""
    size = tokenizer.vocab_size
    return Sentinels(prefix=size, middle=size + 1, suffix=size + 2)


def samples(tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Texts of any length, also none; documents that the start cuts, inside of a character too;
    padding."""
    draw = np.random.default_rng(5)
    for number in range(40):
        row: list[int] = []
        while len(row) < 320:
            size = int(draw.integers(0, 40 if number % 2 else 400))
            at = int(draw.integers(0, len(vocabularies.MIXED)))
            row += [*tokenizer.encode((vocabularies.MIXED * 3)[at : at + size]), tokenizer.eod]
        tokens = row[number:][: int(draw.integers(0, 257)) if number % 3 else 257]
        yield np.array(tokens + [PADDING] * (257 - len(tokens)), np.int64)


def defined(
    tokenizer: Tokenizer,
    marks: Sentinels,
    rates: tuple[float, float],
    row: np.ndarray,
    draw: object,
) -> list[int]:
    """A sample as the documentation describes it, a document after the other."""
    around = set(tokenizer.encode(""))
    documents: list[list[int]] = [[]]
    for token in row[row != PADDING].tolist():
        documents[-1].append(token)
        if token == tokenizer.eod:
            documents.append([])
    result: list[int] = []
    numbers = draw.random((len(documents), 4)).tolist()
    for document, (chance, *cuts, order) in zip(documents, numbers, strict=True):
        end = [tokenizer.eod] * (document[-1:] == [tokenizer.eod])
        body = document[: len(document) - len(end)]
        front = [t for i, t in enumerate(body) if around.issuperset(body[: i + 1])]
        text = tokenizer.decode(body[len(front) :])
        if chance < rates[0] and body and "\ufffd" not in text:
            a, b = sorted(int(cut * (len(text) + 1)) for cut in cuts)
            prefix, middle, suffix = (
                [token for token in tokenizer.encode(part) if token not in around]
                for part in (text[:a], text[a:b], text[b:])
            )
            if order < rates[1]:
                body = [marks.prefix, marks.suffix, *suffix, marks.middle, *prefix, *middle]
            else:
                body = [marks.prefix, *prefix, marks.suffix, *suffix, marks.middle, *middle]
            body = front + body
        result += body + end
    return (result + [PADDING] * len(row))[: len(row)]


KINDS = (
    *("bytes", "tiktoken", "regex", "tokenizers"),
    *("sentencepiece", "sentencepiece, <s>", "unigram, user symbols"),
)


@pytest.mark.parametrize("rates", [(0.5, 0.5), (1.0, 0.0), (0.9, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_as_defined(
    opened: dict[str, Tokenizer], kind: str, rates: tuple[float, float]
) -> None:
    tokenizer = opened[kind]
    marks = sentinels(tokenizer)
    transform = FillInTheMiddle(*rates, tokenizer, marks)
    cut = padded = 0
    for number, row in enumerate(samples(tokenizer)):
        found = transform.sample(row, np.random.default_rng(number))
        want = defined(tokenizer, marks, rates, row, np.random.default_rng(number))
        assert found.dtype == np.int64 and found.tolist() == want
        cut += PADDING not in found
        padded += PADDING in found
    assert cut and padded


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ("bytes", "b201959b22a5887e"),
        ("tiktoken", "0e039f319c345638"),
        ("regex", "0e039f319c345638"),
        ("tokenizers", "cdffed8c4ff21cff"),
    ],
)
def test_a_sample_never_changes(opened: dict[str, Tokenizer], kind: str, digest: str) -> None:
    tokenizer = opened[kind]
    content = hashlib.sha256()
    for rates in ((0.5, 0.5), (1.0, 0.3)):
        transform = FillInTheMiddle(*rates, tokenizer, sentinels(tokenizer))
        for number, row in enumerate(samples(tokenizer)):
            random = np.random.Generator(np.random.Philox(key=[7, number]))
            content.update(transform.sample(row, random).astype("<i8").tobytes())
    assert content.hexdigest()[:16] == digest
