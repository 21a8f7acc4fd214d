"""Tokens equal those of the libraries of the field on random Unicode; decoding gives the text back;
special tokens are tokens only where they may be; no input takes quadratic time."""

from __future__ import annotations

import json
import random
import re
import time
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import regex
import sentencepiece
import tiktoken
import tokenizers
import vocabularies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from megalite.tokenizer import bpe as bpe_module
from megalite.tokenizer.base import Tokenizer
from megalite.tokenizer.bpe import BytePairTokenizer, gpt2_tokenizer, rank_tokenizer, split_points
from megalite.tokenizer.byte import ByteTokenizer
from megalite.tokenizer.choose import open_tokenizer
from megalite.tokenizer.merges import Merges, merges_of_pairs, merges_of_ranks
from megalite.tokenizer.patterns import STYLES, for_ascii
from megalite.tokenizer.settings import PATTERNS, TYPES, TokenizerSettings

EXAMPLES, ALL_EXAMPLES = 300, 20_000  # of hypothesis, for each library
STRINGS = 100_000  # for each of tiktoken's patterns, of hypothesis and once more of `random`

# Random text


@cache
def disagreeing() -> dict[int, None]:
    """Characters that regex and tiktoken put into different classes, as a table for `translate`.

    The two follow different versions of Unicode.
    """
    every = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    single = {bytes([byte]): byte for byte in range(256)}
    found: set[str] = set()
    for letters in ("L", "N", "M", "Lu", "Lt", "Lm", "Lo", "Ll"):
        pattern = rf"\p{{{letters}}}"
        theirs = tiktoken.Encoding(
            "x", pat_str=pattern, mergeable_ranks=single, special_tokens={}
        ).encode_ordinary(every)
        found |= set(bytes(theirs).decode()) ^ set(regex.findall(pattern, every))
    return dict.fromkeys(map(ord, found))


def test_libraries_disagree_on_new_characters_alone() -> None:
    """On those that Unicode 14 lacks, and one letter whose class was changed since."""
    known = {c for c in disagreeing() if unicodedata.category(chr(c)) != "Cn"}
    if unicodedata.unidata_version == "14.0.0":
        assert known <= {0x295}
    assert len(disagreeing()) < 20_000


FRAGMENTS = (
    *("'s", "'S", "'ſ", "'LL", "'re", "’s", "don't", "I'VE", "12", "1234567", "①②", "٣٤", "x1y"),
    *(
        " ",
        "  ",
        "   ",
        "\n",
        "\r\n",
        "\n\n",
        " \n ",
        "\t",
        "\u00a0",
        "\u3000",
        "\x1c",
        "\x85",
        "\0",
    ),
    *("😀", "👩‍👩‍👧‍👦", "🇩🇪", "é", "e\u0301", "Größe", "ﬁ", "ǅ", "ʰ", "中文", "日本語", "한국어"),
    *("Привет", "שלום", "مرحبا", "नमस्ते", "\u200d", "\ufeff", "\ufffd", "//", "/\n", "...\n", "_x"),
    *(" def f(x):\n    return", "HTMLParser", "camelCase", "ÀÉ", " ,", "\U0010ffff", "\ue000"),
)


def texts() -> st.SearchStrategy[str]:
    """Any characters, pieces that patterns treat in a special way, and words of the vocabulary."""
    anything = st.text(max_size=12).map(lambda text: text.translate(disagreeing()))
    words = st.sampled_from(vocabularies.training_text().split(" ")[:4000])
    part = st.one_of(anything, st.sampled_from(FRAGMENTS), words)
    return st.lists(part, max_size=10).map("".join)


def examples(count: int) -> Callable:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# Rank files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabularies")
    vocabularies.write_ranks(path / "ranks.tiktoken")
    vocabularies.write_megatron_ranks(path / "ranks.json")
    vocabularies.write_gpt2(path)
    (path / "hf").mkdir()
    vocabularies.write_tokenizer_json(path / "hf")
    for kind in ("bpe", "unigram"):
        vocabularies.write_sentencepiece(path / f"{kind}.model", kind)
    return path


@cache
def reference(style: str) -> tiktoken.Encoding:
    """tiktoken itself, with its own pattern where it has one of the name."""
    ranks = vocabularies.ranks()
    if style in ("gpt2", "cl100k_base", "o200k_base"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
            patch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **_: {})
            pattern = getattr(openai_public, style)()["pat_str"]
    else:
        pattern = {"llama3": LLAMA3, "v1": MEGATRON_V1, "v2": MEGATRON_V2}[style]
    ours = STYLES[style]
    before = 50 if ours.special_first else 0
    return tiktoken.Encoding(
        style,
        pat_str=pattern,
        mergeable_ranks={token: rank + before for token, rank in ranks.items()},
        special_tokens=ours.special(len(ranks), 50),
    )


# As in Meta's llama-models and NVIDIA's Megatron-LM.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MEGATRON_V1 = r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
MEGATRON_V2 = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def of_ranks(folder: Path, style: str, engine: bpe_module.Engine) -> BytePairTokenizer:
    return rank_tokenizer(str(folder / "ranks.tiktoken"), style, 50, engine=engine)


def check_ranks(folder: Path, styles: Sequence[str], count: int) -> None:
    """Every text with every style."""
    rivals = [
        (reference(style), of_ranks(folder, style, "regex"), of_ranks(folder, style, "tiktoken"))
        for style in styles
    ]
    specials = {name for theirs, _, _ in rivals for name in theirs.special_tokens_set}
    names = st.sampled_from([*sorted(specials), "<|", "|>", "<"])

    @examples(count)
    @given(texts(), st.lists(st.tuples(names, texts()), max_size=2))
    def check(text: str, more: list[tuple[str, str]]) -> None:
        text += "".join(name + rest for name, rest in more)
        for theirs, ours, through_it in rivals:
            tokens = theirs.encode(text, disallowed_special=())
            assert ours.encode(text) == through_it.encode(text) == tokens
            assert ours.decode(tokens) == text
            with_special = theirs.encode(text, allowed_special="all")
            assert ours.encode(text, allow_special=True) == with_special
            assert through_it.encode(text, allow_special=True) == with_special
            assert ours.decode(with_special) == text

    check()


@pytest.mark.parametrize("style", PATTERNS)
def test_tokens_are_those_of_tiktoken(folder: Path, style: str) -> None:
    check_ranks(folder, [style], EXAMPLES)


@pytest.mark.full
def test_tokens_are_those_of_tiktoken_on_many_texts(folder: Path) -> None:
    """Of all patterns, on the same texts: drawing them takes the most time."""
    check_ranks(folder, PATTERNS, STRINGS)


@pytest.mark.full
@pytest.mark.parametrize("style", PATTERNS)
def test_tokens_of_random_strings(folder: Path, style: str) -> None:
    """All characters alike, so that most are rare ones."""
    theirs, ours = reference(style), of_ranks(folder, style, "regex")
    rng = random.Random(7)
    characters = [
        chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c not in disagreeing()
    ]
    words = vocabularies.training_text().split(" ")
    for _ in range(STRINGS):
        pools = rng.choices((characters, words, FRAGMENTS), k=rng.randrange(12))
        text = "".join(map(rng.choice, pools)).translate(disagreeing())
        for each in (text, text.encode("ascii", "ignore").decode()):
            tokens = theirs.encode_ordinary(each)
            assert ours.encode(each) == tokens
            assert ours.decode(tokens) == each


@pytest.mark.parametrize("style", PATTERNS)
def test_ascii_is_split_as_the_pattern_says(style: str) -> None:
    """All strings of two characters, of three that patterns tell apart, and longer ones."""
    rng = random.Random(8)
    every, told_apart = map(chr, range(128)), "aAsStlLe' \t\n\r\x0b\x1c\x1f\0\x7f19/!_"
    strings = [*product(every, repeat=2), *product(told_apart, repeat=3)]
    strings += [rng.choices(told_apart, k=rng.randrange(4, 20)) for _ in range(10_000)]
    pattern = STYLES[style].pattern
    expected, found = regex.compile(pattern).findall, re.compile(for_ascii(pattern)).findall
    for text in map("".join, strings):
        assert found(text) == expected(text), repr(text)


@pytest.mark.parametrize("style", PATTERNS)
def test_a_whole_text_is_tokenized_as_tiktoken_does(folder: Path, style: str) -> None:
    text = vocabularies.training_text()
    tokens = reference(style).encode_ordinary(text)
    assert of_ranks(folder, style, "regex").encode(text) == tokens
    assert of_ranks(folder, style, "tiktoken").encode(text) == tokens


def test_special_tokens_have_the_ids_that_people_know() -> None:
    """In the vocabularies of their own sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
        patch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **_: {})
        for style, ranks in {"gpt2": 50256, "cl100k_base": 100256, "o200k_base": 199998}.items():
            theirs = getattr(openai_public, style)()["special_tokens"]
            assert STYLES[style].special(ranks, 0) == theirs
    llama3 = STYLES["llama3"].special(128_000, 0)
    assert sorted(llama3.values()) == list(range(128_000, 128_256))
    assert (llama3["<|begin_of_text|>"], llama3["<|end_of_text|>"]) == (128_000, 128_001)
    assert (llama3["<|eot_id|>"], llama3["<|finetune_right_pad_id|>"]) == (128_009, 128_004)
    megatron = STYLES["v2"].special(0, 1000)
    assert sorted(megatron.values()) == list(range(1000))
    assert (megatron["</s>"], megatron["<SPECIAL_999>"]) == (2, 999)


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_megatrons_tiktokenizer(folder: Path, style: str) -> None:
    """Against megatron-core's own class."""
    library = pytest.importorskip("megatron.core.tokenizers.text.libraries.tiktoken_tokenizer")
    theirs = library.TikTokenTokenizer(
        str(folder / "ranks.json"), num_special_tokens=100, pattern=style, vocab_size=2000
    )
    ours = rank_tokenizer(str(folder / "ranks.json"), style, 100, 2000, "regex")
    assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod) == (2000, 2)
    for text in (vocabularies.MIXED, vocabularies.training_text()):
        assert ours.encode(text) == theirs.text_to_ids(text)


def test_ranks_are_counted_as_megatron_counts_them(folder: Path) -> None:
    path = str(folder / "ranks.json")
    count = len(vocabularies.ranks())
    assert rank_tokenizer(path, "v2").vocab_size == 1000 + count
    assert rank_tokenizer(path, "v2", 1000, 1300).vocab_size == 1300
    whole = rank_tokenizer(path, "v2", 1000, 1000 + count).encode(vocabularies.MIXED)
    assert max(rank_tokenizer(path, "v2", 1000, 1300).encode(vocabularies.MIXED)) < 1300
    assert max(whole) >= 1300


# Lone surrogates, bytes that are no text

SURROGATES = ["a\ud800b", "\udc00", "\ud83d\ude00", "\ude00\ud83d", "x\ud83d", "\udcff y"]


@pytest.mark.parametrize("style", PATTERNS)
def test_surrogates_are_replaced_as_tiktoken_does(folder: Path, style: str) -> None:
    letters = st.sampled_from(["a", " ", "😀", "\ud83d", "\ude00", "\ud800", "\udfff"])

    @examples(EXAMPLES)
    @given(st.text(letters))
    def check(text: str) -> None:
        tokens = reference(style).encode_ordinary(text)
        assert of_surrogates(folder, style, "regex").encode(text) == tokens
        assert of_surrogates(folder, style, "tiktoken").encode(text) == tokens

    of_surrogates = cache(of_ranks)
    check()


def test_bytes_that_are_no_text_are_decoded_as_tiktoken_does(folder: Path) -> None:
    ours, theirs = of_ranks(folder, "llama3", "regex"), reference("llama3")
    rng = random.Random(5)
    for _ in range(500):
        tokens = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(8))]
        assert ours.decode(tokens) == theirs.decode(tokens)
    assert ours.decode([72, 10**6, -1]) == ours.decode([72]), "unknown ids are dropped"


# GPT-2's files


def plain(text: str) -> list[int]:
    """Tokens of the tokenizers package, special tokens as text."""
    model = vocabularies.byte_level()
    model.encode_special_tokens = True
    return model.encode(text).ids


def check_gpt2(folder: Path, count: int) -> None:
    ours = gpt2_tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))

    @examples(count)
    @given(texts())
    def check(text: str) -> None:
        tokens = plain(text)
        assert ours.encode(text) == tokens
        assert ours.decode(tokens) == text

    check()


def test_gpt2_files_give_the_tokens_of_the_tokenizers_package(folder: Path) -> None:
    check_gpt2(folder, EXAMPLES)
    ours = gpt2_tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    text = vocabularies.training_text()
    assert ours.encode(text) == plain(text)
    assert ours.special == {"<|endoftext|>": ours.eod}
    assert ours.eod == ours.vocab_size - 1
    assert ours.encode("a<|endoftext|>b", allow_special=True) == [
        *(*plain("a"), ours.eod),
        *plain("b"),
    ]
    assert ours.encode("<|endoftext|>") == plain("<|endoftext|>") != [ours.eod]


@pytest.mark.full
def test_gpt2_files_on_many_texts(folder: Path) -> None:
    check_gpt2(folder, ALL_EXAMPLES)


def test_gpt2_files_merge_listed_pairs_only(tmp_path: Path) -> None:
    """Where a rank file would merge any two neighbours that are a token together: `abc` is reached
    through `ab` alone, and a piece that is a token need not become it."""
    letters = {letter: i for i, letter in enumerate(vocabularies._bytes_of_letters())}
    names = ["bc", "ab", "abc"]
    vocabulary = {**letters, **{n: 256 + i for i, n in enumerate(names)}, "<|endoftext|>": 259}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nb c\na b\nab c\n")
    ours = gpt2_tokenizer(f"{tmp_path}/vocab.json", f"{tmp_path}/merges.txt")
    model = tokenizers.models.BPE.from_file(f"{tmp_path}/vocab.json", f"{tmp_path}/merges.txt")
    theirs = tokenizers.Tokenizer(model)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert ours.encode("abc") == theirs.encode("abc").ids == [letters["a"], 256]
    by_rank = BytePairTokenizer(r"\p{L}+", ours._tokens, None, {}, 0, "regex")
    assert by_rank.encode("abc") == [258]


# Merging


def naive(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The definition: merge the leftmost of the pairs with the lowest rank, until there is none."""
    parts = [bytes([byte]) for byte in piece]
    while True:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not found:
            return [ranks[part] for part in parts]
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_short_and_long_pieces_merge_by_the_definition() -> None:
    ranks = vocabularies.ranks()
    merges = merges_of_ranks(ranks)
    rng = random.Random(1)
    content = vocabularies.training_text().encode()
    for length in [*range(1, 40), 100, 255, 256, 257, 600]:
        start = rng.randrange(len(content) - length)
        for piece in (
            content[start : start + length],
            rng.randbytes(length),
            b"a" * length,
            bytes(rng.choice(b"aab ") for _ in range(length)),
        ):
            want = naive(piece, ranks)
            tokens = [merges.byte_ids[byte] for byte in piece]
            assert merges._short([*tokens]) == merges._long([*tokens]) == want
            assert merges.merge(piece) == want


def test_merges_of_pairs_by_the_definition() -> None:
    """With random merges, also such as no training would give."""
    rng = random.Random(2)
    single = {bytes([byte]): byte for byte in range(256)}
    for _ in range(200):
        tokens, pairs = [b"a", b"b", b"c"], []
        for _ in range(rng.randrange(1, 9)):
            pair = (rng.choice(tokens), rng.choice(tokens))
            if pair[0] + pair[1] not in tokens:
                pairs.append(pair)
                tokens.append(pair[0] + pair[1])
        ids = single | {token: 300 + i for i, token in enumerate(reversed(tokens[3:]))}
        merges = merges_of_pairs(ids, pairs)
        piece = bytes(rng.choice(b"abc") for _ in range(rng.randrange(1, 30)))
        parts = [bytes([byte]) for byte in piece]
        while found := [(pairs.index(p), i) for i, p in enumerate(pairwise(parts)) if p in pairs]:
            _, i = min(found)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        want = [ids[part] for part in parts]
        start = [merges.byte_ids[byte] for byte in piece]
        assert merges._short([*start]) == merges._long([*start]) == want


# Long texts

LONG = {
    "one letter": lambda n: "a" * n,
    "spaces": lambda n: " " * n,
    "line ends": lambda n: " \n" * (n // 2),
    "random letters": lambda n: "".join(random.Random(3).choices("abcdefgh", k=n)),
    "capitals": lambda n: "Ab" * (n // 2),
    "marks": lambda n: "!?" * (n // 2),
    "digits": lambda n: "12345678" * (n // 8),
    "emoji": lambda n: "😀" * (n // 4),
    "chinese": lambda n: "中文字" * (n // 3),
}


MOST_GROWTH = 24
"""Of the time for eight times the text: between 8, which is linear, and 64, which is quadratic."""


def growth(tokenizer: Tokenizer, text: Callable[[int], str], length: int = 1 << 16) -> float:
    """How many times as long the text takes as an eighth of it."""

    def seconds(text_: str) -> float:
        times = []
        for _ in range(3):
            started = time.process_time()
            tokenizer.encode(text_)
            times.append(time.process_time() - started)
        return min(times)

    tokenizer.encode("built when first needed")
    # In less than a millisecond there is nothing to see but the noise of the machine.
    return seconds(text(length)) / max(seconds(text(length // 8)), 1e-3)


@pytest.mark.parametrize("kind", LONG)
def test_no_text_takes_quadratic_time(folder: Path, kind: str) -> None:
    gpt2 = gpt2_tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    assert growth(gpt2, LONG[kind]) < MOST_GROWTH
    for style in ("cl100k_base", "o200k_base", "llama3"):
        assert growth(of_ranks(folder, style, "regex"), LONG[kind]) < MOST_GROWTH, style


def test_quadratic_time_would_be_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of merges that look through the whole piece for each next one."""
    monkeypatch.setattr(Merges, "_long", lambda self, tokens: self._short([*tokens]))
    assert growth(of_ranks(folder, "llama3", "regex"), LONG["spaces"], 1 << 13) > MOST_GROWTH


@pytest.mark.full
@pytest.mark.parametrize("style", PATTERNS)
@pytest.mark.parametrize("kind", LONG)
def test_a_megabyte_without_a_place_to_split(folder: Path, kind: str, style: str) -> None:
    """Also where tiktoken alone runs out of stack."""
    text = LONG[kind](1 << 20)
    ours = of_ranks(folder, style, "regex")
    tokens = ours.encode(text)
    assert tokens == of_ranks(folder, style, "tiktoken").encode(text)
    assert ours.decode(tokens) == text


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("style", PATTERNS)
def test_tiktoken_takes_texts_of_the_length_that_it_is_given(
    folder: Path, kind: str, style: str
) -> None:
    text = LONG[kind](bpe_module._TIKTOKEN_CHARACTERS)
    assert of_ranks(folder, style, "tiktoken")._encoding.encode_ordinary(text)


@pytest.mark.parametrize("style", PATTERNS)
def test_a_long_text_is_split_where_its_tokens_are(
    folder: Path, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = of_ranks(folder, style, "regex")
    theirs = reference(style)
    rng = random.Random(4)
    monkeypatch.setattr(bpe_module, "_CHUNK_CHARACTERS", 7)
    monkeypatch.setattr(bpe_module, "_PART_CHARACTERS", 2)
    count = 0
    for _ in range(200):
        text = "".join(rng.choice(FRAGMENTS) for _ in range(30)).translate(disagreeing())
        parts = list(split_points(text, 7))
        count += len(parts)
        assert "".join(parts) == text
        assert ours.encode(text) == theirs.encode_ordinary(text)
    assert count > 300


def test_what_is_remembered_has_a_bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe_module, "_KEPT", 50)
    ours = of_ranks(folder, "llama3", "regex")
    rng = random.Random(6)
    words = vocabularies.training_text().split(" ")
    for _ in range(100):
        text = " ".join(rng.choices(words, k=20)) + " " + "y" * rng.randrange(99)
        assert ours.encode(text) == reference("llama3").encode_ordinary(text)
        assert len(ours._pieces) <= 50
    assert all(len(piece) <= bpe_module._KEPT_CHARACTERS for piece in ours._pieces)


# SentencePiece


@cache
def sentencepiece_model(kind: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(
        model_proto=vocabularies.sentencepiece_content(kind)
    )


def of_sentencepiece(folder: Path, kind: str, name: str) -> Tokenizer:
    return open_tokenizer(
        TokenizerSettings(tokenizer_type=name, tokenizer_model=str(folder / f"{kind}.model"))
    )


def check_sentencepiece(folder: Path, kind: str, count: int) -> None:
    theirs = sentencepiece_model(kind)
    plain = of_sentencepiece(folder, kind, "SentencePieceTokenizer")
    llama = of_sentencepiece(folder, kind, "Llama2Tokenizer")

    @examples(count)
    @given(st.one_of(texts(), st.text()))
    def check(text: str) -> None:
        tokens = theirs.encode(text)
        assert plain.encode(text) == tokens
        assert llama.encode(text) == [theirs.bos_id(), *tokens]
        assert plain.decode(tokens) == theirs.decode(tokens)

    check()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_tokens_are_those_of_sentencepiece(folder: Path, kind: str) -> None:
    check_sentencepiece(folder, kind, EXAMPLES)
    ours = of_sentencepiece(folder, kind, "GPTSentencePieceTokenizer")
    theirs = sentencepiece_model(kind)
    assert (ours.vocab_size, ours.eod) == (theirs.get_piece_size(), theirs.eos_id())
    assert ours.special == {"<s>": theirs.bos_id(), "</s>": theirs.eos_id()}
    assert ours.encode("a</s>b") == theirs.encode("a</s>b")
    assert ours.encode("a</s>b", allow_special=True) == [
        *(*theirs.encode("a"), theirs.eos_id()),
        *theirs.encode("b"),
    ]
    assert ours.decode([5, -1, 10**7, 6]) == theirs.decode([5, 6])


@pytest.mark.full
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_tokens_are_those_of_sentencepiece_on_many_texts(folder: Path, kind: str) -> None:
    check_sentencepiece(folder, kind, ALL_EXAMPLES)


# tokenizer.json


def check_hf(folder: Path, count: int) -> None:
    ours = open_tokenizer(
        TokenizerSettings(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / "hf"))
    )
    theirs = tokenizers.Tokenizer.from_file(str(folder / "hf/tokenizer.json"))

    @examples(count)
    @given(st.one_of(texts(), st.text()))
    def check(text: str) -> None:
        for text_ in (text, text + "<|endoftext|>" + text):
            theirs.encode_special_tokens = True
            tokens = theirs.encode(text_).ids
            assert ours.encode(text_) == tokens
            theirs.encode_special_tokens = False
            assert ours.encode(text_, allow_special=True) == theirs.encode(text_).ids
            assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=False)

    check()


def test_tokenizer_json_gives_the_tokens_of_its_package(folder: Path) -> None:
    check_hf(folder, EXAMPLES)


@pytest.mark.full
def test_tokenizer_json_on_many_texts(folder: Path) -> None:
    check_hf(folder, ALL_EXAMPLES)


def test_what_tokenizer_json_puts_around_a_text_is_there(tmp_path: Path) -> None:
    """LLaMA 3's file begins every text with <|begin_of_text|>; cutting and padding are left out."""
    model = tokenizers.Tokenizer.from_str(vocabularies.byte_level().to_str())
    model.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    begin = model.token_to_id("<|begin_of_text|>")
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    model.enable_truncation(4)
    model.enable_padding(length=9)
    model.save(str(tmp_path / "tokenizer.json"))
    settings_ = TokenizerSettings(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "tokenizer.json")
    )
    for name, content in {
        "tokenizer_config.json": {"eos_token": "<|end_of_text|>"},
        "special_tokens_map.json": {"eos_token": {"content": "<|endoftext|>", "lstrip": False}},
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
        ours = open_tokenizer(settings_)
        token = content["eos_token"]
        token = token["content"] if isinstance(token, dict) else token
        assert ours.eod == model.token_to_id(token)
        (tmp_path / name).unlink()
    assert ours.encode("") == [begin]
    assert ours.encode("a long text of more tokens")[1:] == plain("a long text of more tokens")
    assert set(ours.special) == {"<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>"}
    assert ours.vocab_size == model.get_vocab_size()


# Every tokenizer


def every(folder: Path) -> dict[str, Tokenizer]:
    """One of each type, of each pattern and engine."""
    path = folder
    found: dict[str, Tokenizer] = {}
    for name, needed in TYPES.items():
        given_ = {
            "tokenizer_model": {
                "TikTokenizer": path / "ranks.tiktoken",
                "HuggingFaceTokenizer": path / "hf/tokenizer.json",
            }.get(name, path / "bpe.model"),
            "vocab_file": path / "vocab.json",
            "merge_file": path / "merges.txt",
            "tiktoken_pattern": "llama3",
        }
        values = {key: str(given_[key]) for key in needed if key in given_}
        found[name] = open_tokenizer(TokenizerSettings(tokenizer_type=name, **values), 5000)
    for style in PATTERNS:
        for engine in ("regex", "tiktoken"):
            found[f"{style} {engine}"] = of_ranks(path, style, engine)
    return found


def test_every_tokenizer_keeps_the_interface(folder: Path) -> None:
    texts_ = ["", "a", vocabularies.MIXED, "x" * 3000, *SURROGATES, "<|endoftext|></s>"]
    for name, tokenizer in every(folder).items():
        here = ["", "1 2 3", "4999"] if name == "NullTokenizer" else texts_
        batch = tokenizer.encode_batch(here)
        assert [row.tolist() for row in batch] == [tokenizer.encode(text) for text in here], name
        assert {row.dtype for row in batch} == {np.dtype(np.int32)}, name
        assert all(0 <= t < tokenizer.vocab_size for row in batch for t in row), name
        assert 0 <= tokenizer.eod < tokenizer.vocab_size, name
        assert all(0 <= t < tokenizer.vocab_size for t in tokenizer.special.values()), name
        assert isinstance(tokenizer.decode(iter([tokenizer.eod, 0])), str), name
        assert tokenizer.encode_batch([]) == [], name
        # Documents hold no special token but what stands before each.
        before = tokenizer.encode("")
        assert tokenizer.eod not in tokenizer.encode("<|endoftext|></s>" if here is texts_ else "5")
        assert tokenizer.encode(here[1])[: len(before)] == before


@pytest.mark.parametrize("style", PATTERNS)
def test_a_batch_of_long_texts_is_encoded_as_each_alone(folder: Path, style: str) -> None:
    """Texts that are cut at spaces, one that cannot be, with surrogates in them."""
    tokenizer = of_ranks(folder, style, "tiktoken")
    mixed = f"{vocabularies.MIXED} </s> <|endoftext|> "
    texts_ = [mixed * (200_000 // len(mixed)), "ab" * 50_001, f"\ud83d {mixed}" * 1000]
    batch = tokenizer.encode_batch(texts_)
    assert [row.tolist() for row in batch] == [tokenizer.encode(text) for text in texts_]


def test_fingerprints_name_the_mapping(folder: Path, tmp_path: Path) -> None:
    """Equal for every path and engine, different for every pattern, type and content."""
    found = every(folder)
    for style in PATTERNS:
        assert found[f"{style} regex"].fingerprint == found.pop(f"{style} tiktoken").fingerprint
    # The same but for the number of special tokens, or for what stands before a text.
    found["other count"] = rank_tokenizer(str(folder / "ranks.tiktoken"), "v2", 60)
    ranks = vocabularies.ranks()
    swapped = ranks | {b"a": ranks[b"b"], b"b": ranks[b"a"]}
    path = vocabularies.write_ranks(tmp_path / "swapped", swapped)
    found["other ranks"] = rank_tokenizer(str(path), "gpt2")
    pairs = vocabularies.write_gpt2(tmp_path)
    lines = pairs[1].read_text().splitlines()
    pairs[1].write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]))
    found["other order of merges"] = gpt2_tokenizer(*map(str, pairs))
    same = {"SentencePieceTokenizer", "GPTSentencePieceTokenizer"}
    assert len({found[name].fingerprint for name in same}) == 1
    found.pop("GPTSentencePieceTokenizer")
    # The type's rank tokenizer is the pattern's.
    assert found.pop("TikTokenizer").fingerprint == found["llama3 regex"].fingerprint
    prints = [tokenizer.fingerprint for tokenizer in found.values()]
    assert len(set(prints)) == len(prints)
    json_file = vocabularies.write_ranks(tmp_path / "moved.tiktoken")
    assert rank_tokenizer(str(json_file), "gpt2").fingerprint == found["gpt2 regex"].fingerprint


def test_tiktoken_works_where_it_is_installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("not needed")

    monkeypatch.setattr(Merges, "merge", refuse)
    text = vocabularies.MIXED
    assert of_ranks(folder, "llama3", "auto").encode(text) == reference("llama3").encode(text)
    with pytest.raises(AssertionError, match="not needed"):
        of_ranks(folder, "llama3", "regex").encode(text)
    monkeypatch.setattr(bpe_module, "find_spec", lambda _: None)
    with pytest.raises(AssertionError, match="not needed"):
        of_ranks(folder, "llama3", "auto").encode(text)


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("a\ud800") == [97, 0xED, 0xA0, 0x80]
    assert tokenizer.decode([104, 256, 105, 0xFF]) == "hi\ufffd"
