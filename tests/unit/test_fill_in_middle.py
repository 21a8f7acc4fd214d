"""Fill-in-the-middle rearranges the text of documents and loses none of it; what is drawn follows
from seed, data and number of the sample alone."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import vocabularies
from commands import run, violations
from datasets import open_data
from pool import RankPool
from runs import SMALL, run_in_pool

from megalite.config import Config, resolve
from megalite.data.fill_in_middle import FillInTheMiddle
from megalite.data.ledger import ledger
from megalite.data.loader import Loader
from megalite.data.samples import PADDING, Samples
from megalite.data.sentinels import Sentinels, find_sentinels
from megalite.errors import ConfigError
from megalite.tokenizer.base import Tokenizer
from megalite.tokenizer.choose import open_tokenizer

NAMES = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
TEXTS = (
    "def add(a, b):\n    return a + b\n",
    "Größe, café, naïve, Straße 😀 👩‍👩‍👧‍👦 すばやい",
    "x",
    "  two spaces,  and two more  ",
    "The quick brown fox can't jump over the lazy dog's 12345 fences; we'll see.\n" * 3,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers with tokens for fill-in-the-middle, special ones and others, and texts."""
    folder = tmp_path_factory.mktemp("files")
    vocabularies.write_ranks(folder / "ranks.tiktoken")
    for name, special in (("special", True), ("ordinary", False)):
        tokenizer = tokenizers.Tokenizer.from_str(vocabularies.byte_level().to_str())
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add(list(NAMES))
        (folder / name).mkdir()
        tokenizer.save(str(folder / name / "tokenizer.json"))
    for name, option in (("a", "control_symbols"), ("user", "user_defined_symbols")):
        vocabularies.write_sentencepiece(folder / f"{name}.model", **{option: ",".join(NAMES)})
    lines = [{"text": f"{number}: {text}"} for number in range(60) for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


CL100K = {
    "tokenizer_type": "TikTokenizer",
    "tiktoken_pattern": "cl100k_base",
    **{f"fim_{part}_token": f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix")},
}


def kinds(files: Path) -> dict[str, dict[str, str]]:
    hf = {"tokenizer_type": "HuggingFaceTokenizer"}
    return {
        "tiktoken": {**CL100K, "tokenizer_model": f"{files}/ranks.tiktoken"},
        "special": {**hf, "tokenizer_model": f"{files}/special"},
        "ordinary": {**hf, "tokenizer_model": f"{files}/ordinary"},
        "sentencepiece": {
            "tokenizer_type": "Llama2Tokenizer",
            "tokenizer_model": f"{files}/a.model",
        },
        "user": {"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": f"{files}/user.model"},
    }


BYTE_LEVEL = ("tiktoken", "special", "ordinary")


def settings(files: Path, tmp_path: Path, kind: str = "tiktoken", **values: object) -> Config:
    small = dict(
        data=(f"{files}/a.jsonl",),
        data_cache_path=f"{tmp_path}/cache",
        seq_length=64,
        micro_batch_size=2,
        global_batch_size=8,
        steps=20,
        split="80,20",
    )
    return resolve(Config().replace(**small, **kinds(files)[kind]).replace(**values))


def opened(files: Path, tmp_path: Path, kind: str) -> tuple[Tokenizer, Sentinels]:
    config = settings(files, tmp_path, kind)
    tokenizer = open_tokenizer(config.data)
    return tokenizer, find_sentinels(config.data, tokenizer)


def parts(tokens: list[int], marks: Sentinels) -> tuple[str, list[int], list[int], list[int]]:
    """(order, prefix, middle, suffix) of a document; in SPM prefix and middle are one."""
    at = {name: tokens.index(getattr(marks, name)) for name in ("prefix", "middle", "suffix")}
    assert at["prefix"] == 0 and at["suffix"] < at["middle"]
    suffix = tokens[at["suffix"] + 1 : at["middle"]]
    before, behind = tokens[1 : at["suffix"]], tokens[at["middle"] + 1 :]
    if at["suffix"] == 1:
        return "SPM or empty prefix", behind, [], suffix
    return "PSM", before, behind, suffix


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@pytest.mark.parametrize("spm", [False, True])
def test_the_parts_give_the_text_back(files: Path, tmp_path: Path, kind: str, spm: bool) -> None:
    tokenizer, marks = opened(files, tmp_path, kind)
    transform = FillInTheMiddle(1.0, 0.5, tokenizer, marks)
    draw = np.random.default_rng(0)
    lengths = Counter()
    for text in TEXTS:
        for _ in range(40):
            cuts = tuple(draw.random(2).tolist())
            tokens = transform.document(tokenizer.encode(text), cuts, spm=spm)
            start, stop = sorted(int(cut * (len(text) + 1)) for cut in cuts)
            want = [text[:start], text[start:stop], text[stop:]]
            if spm:
                assert tokens[:2] == [marks.prefix, marks.suffix]
                suffix, rest = split_at(tokens[2:], marks.middle)
                first = tokenizer.encode(want[0])
                found = [first, rest[len(first) :], suffix]
                assert rest[: len(first)] == first, "tokens of the parts, not of their sum"
            else:
                assert tokens[0] == marks.prefix
                prefix, rest = split_at(tokens[1:], marks.suffix)
                suffix, middle = split_at(rest, marks.middle)
                found = [prefix, middle, suffix]
            assert [tokenizer.decode(part) for part in found] == want
            assert found == [tokenizer.encode(part) for part in want]
            lengths.update(f"{part} {bool(t)}" for part, t in zip("pms", want, strict=True))
    assert len(lengths) == 6, "each part is empty at times"


def split_at(tokens: list[int], mark: int) -> tuple[list[int], list[int]]:
    assert tokens.count(mark) == 1
    at = tokens.index(mark)
    return tokens[:at], tokens[at + 1 :]


def test_cuts_are_at_any_character_also_at_both_ends(files: Path, tmp_path: Path) -> None:
    tokenizer, marks = opened(files, tmp_path, "tiktoken")
    transform = FillInTheMiddle(1.0, 0.0, tokenizer, marks)
    draw = np.random.default_rng(1)
    seen = Counter()
    for _ in range(3000):
        cuts = tuple(draw.random(2).tolist())
        tokens = transform.document(tokenizer.encode("abc"), cuts, spm=False)
        prefix, rest = split_at(tokens[1:], marks.suffix)
        seen[
            len(tokenizer.decode(prefix)), len(tokenizer.decode(split_at(rest, marks.middle)[0]))
        ] += 1
    # Two of four places: equal ones once in 16, others twice.
    assert set(seen) == {(a, 3 - b) for a in range(4) for b in range(a, 4)}
    for (before, behind), count in seen.items():
        wanted = 3000 / 16 * (1 if before + behind == 3 else 2)
        assert abs(count - wanted) < 5 * wanted**0.5


def test_the_beginning_of_text_stays_in_front(files: Path, tmp_path: Path) -> None:
    """A tokenizer that puts one before every text puts none before the parts."""
    tokenizer, marks = opened(files, tmp_path, "sentencepiece")
    (bos,) = tokenizer.encode("")
    tokens = tokenizer.encode("The quick brown fox")
    assert tokens[0] == bos
    transform = FillInTheMiddle(1.0, 0.5, tokenizer, marks)
    found = transform.document(tokens, (0.3, 0.7), spm=False)
    assert found[:2] == [bos, marks.prefix] and found.count(bos) == 1
    order, prefix, middle, suffix = parts(found[1:], marks)
    assert order == "PSM"
    assert "".join(map(tokenizer.decode, (prefix, middle, suffix))) == "The quick brown fox"


def test_what_is_no_text_stays(files: Path, tmp_path: Path) -> None:
    """The start of a sample may be inside of a character."""
    tokenizer, marks = opened(files, tmp_path, "tiktoken")
    transform = FillInTheMiddle(1.0, 0.5, tokenizer, marks)
    broken = [tokenizer.encode("😀😀ab")[0], *tokenizer.encode("text")]
    if "\ufffd" not in tokenizer.decode(broken):
        broken = [next(t for t in range(256) if "\ufffd" in tokenizer.decode([t])), *broken]
    assert transform.document(broken, (0.2, 0.7), spm=False) == broken
    assert transform.document([], (0.2, 0.7), spm=False) == []


# Samples


def all_rows(samples: Samples, places: np.ndarray) -> list[list[int]]:
    return [samples.read(int(number)).tolist() for number in samples.order(places)]


def documents_in(row: list[int], eod: int) -> list[list[int]]:
    """Documents of a sample without their ends; the last one may be cut."""
    tokens = [token for token in row if token != PADDING]
    ends = [-1, *(i for i, token in enumerate(tokens) if token == eod), len(tokens)]
    return [tokens[a + 1 : b] for a, b in pairwise(ends)]


def test_the_rate_holds(files: Path, tmp_path: Path) -> None:
    """Of 40,000 documents of a token, within five standard deviations, 1.2 %."""
    tokenizer, marks = opened(files, tmp_path, "tiktoken")
    transform = FillInTheMiddle(0.3, 0.5, tokenizer, marks)
    row = np.tile([tokenizer.encode("x")[0], tokenizer.eod], 40_000)
    longer = np.concatenate([row, np.full(200_000, PADDING)])
    changed = (transform.sample(longer, np.random.default_rng(0)) == marks.prefix).sum()
    assert abs(changed / 40_000 - 0.3) < 5 * (0.3 * 0.7 / 40_000) ** 0.5


@pytest.mark.parametrize("packing", ["stream", "best-fit"])
def test_rates_hold(
    files: Path, tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within five standard deviations, also from one epoch to the next."""
    seen: list[list[tuple[bool, tuple[float, float]]]] = []

    def watched(_: object, tokens: list[int], cuts: tuple[float, float], *, spm: bool) -> list[int]:
        seen[-1].append((spm, cuts))
        return tokens

    monkeypatch.setattr(FillInTheMiddle, "document", watched)
    for rate, spm_rate in ((1.0, 0.0), (0.3, 0.25), (1.0, 1.0)):
        values = dict(fim_rate=rate, fim_spm_rate=spm_rate, packing=packing)
        train, _ = open_data(settings(files, tmp_path, **values))
        seen.append([])
        all_rows(train, np.arange(40 * train.num_samples))
    total, some = len(seen[0]), len(seen[1])
    assert total == len(seen[2]) > 5000
    assert not any(spm for spm, _ in seen[0]) and all(spm for spm, _ in seen[2])
    assert abs(some / total - 0.3) < 5 * (0.3 * 0.7 / total) ** 0.5
    assert abs(sum(spm for spm, _ in seen[1]) / some - 0.25) < 5 * (0.25 * 0.75 / some) ** 0.5
    # Where a document is cut depends neither on whether it is, nor on the order.
    cuts = np.array([cuts for _, cuts in seen[1]])
    assert np.abs(cuts.mean(0) - 0.5).max() < 5 * (1 / 12 / some) ** 0.5
    assert set(map(tuple, cuts)) <= {cuts for _, cuts in seen[0]}
    assert len({cuts for _, cuts in seen[0]}) == total, "none is drawn twice"


@pytest.mark.parametrize("packing", ["stream", "best-fit"])
def test_documents_keep_their_text_and_ends(files: Path, tmp_path: Path, packing: str) -> None:
    values = dict(seq_length=64, packing=packing)
    tokenizer, marks = opened(files, tmp_path, "tiktoken")
    plain, _ = open_data(settings(files, tmp_path, **values))
    train, _ = open_data(settings(files, tmp_path, fim_rate=0.9, **values))
    assert train.num_samples == plain.num_samples
    changed = 0
    for number in range(train.num_samples):
        before, after = plain.read(number), train.read(number)
        assert after.shape == before.shape == (65,) and after.dtype == np.int64
        filled = after != PADDING
        assert (filled == np.sort(filled)[::-1]).all(), "padding stands at the end"
        rearranged = documents_in(after.tolist(), tokenizer.eod)
        originals = documents_in(before.tolist(), tokenizer.eod)
        # The last one of a full sample may be cut, and those behind it have no room.
        kept = rearranged if PADDING in after else rearranged[:-1]
        assert (
            len(rearranged) == len(originals)
            if PADDING in after
            else (1 <= len(rearranged) <= len(originals))
        )
        assert filled.all() or filled.sum() >= (before != PADDING).sum(), "nothing is lost"
        for original, found in zip(originals[: len(kept)], kept, strict=True):
            if found[:1] != [marks.prefix]:
                assert found == original
                continue
            changed += 1
            at = found.index(marks.suffix), found.index(marks.middle)
            pieces = found[1 : at[0]], found[at[1] + 1 :], found[at[0] + 1 : at[1]]
            text = "".join(map(tokenizer.decode, pieces))
            assert text == tokenizer.decode(original)
    assert changed > 50


def test_what_is_drawn_is_a_formula(files: Path, tmp_path: Path) -> None:
    values = dict(fim_rate=0.7)
    train, _ = open_data(settings(files, tmp_path, **values))
    places = np.arange(2 * train.num_samples)
    rows = all_rows(train, places)
    again, _ = open_data(settings(files, tmp_path, steps=500, dp=2, **values))
    backwards = all_rows(again, places[::-1])
    assert backwards[::-1] == rows, "neither order of reading, nor length of the run, nor layout"
    other, _ = open_data(settings(files, tmp_path, seed=5, **values))
    n = train.num_samples
    numbers = train.order(places)
    assert (np.sort(numbers) == np.arange(2 * n)).all()
    assert [other.read(i).tolist() for i in range(n)] != [train.read(i).tolist() for i in range(n)]
    differ = sum(train.read(i).tolist() != train.read(i + n).tolist() for i in range(n))
    assert differ > n / 2, "each epoch draws anew"


@pytest.mark.parametrize("weights", [False, True])
def test_data_ranks_share_the_samples_of_a_step(files: Path, tmp_path: Path, weights: bool) -> None:
    """In every layout, at any step; and parts of a blend draw apart."""
    text = f"{files}/a.jsonl"
    copy = tmp_path / "b.jsonl"
    copy.write_text("".join(Path(text).read_text().splitlines(keepends=True)[::-1]))
    words = ("0.5", text, "0.5", str(copy)) if weights else (text, str(copy))
    found = []
    for dp in (1, 2):
        config = settings(files, tmp_path, data=words, dp=dp, fim_rate=0.6, steps=100)
        samples = open_data(config)
        loaders = [
            Loader(config, *samples, SimpleNamespace(rank=r, size=dp), torch.device("cpu"))
            for r in range(dp)
        ]
        found.append(
            [
                sorted(
                    [*row, int(count)]
                    for loader in loaders
                    for mb in loader.train_batch(step).micro_batches
                    for row, count in zip(mb.tokens.tolist(), mb.mask.sum(1), strict=True)
                )
                for step in (60, 99)
            ]
        )
    assert found[0] == found[1]


def test_validation_is_as_it_was(files: Path, tmp_path: Path) -> None:
    (_, plain), (_, valid) = (
        open_data(settings(files, tmp_path, fim_rate=rate)) for rate in (0.0, 1.0)
    )
    places = np.arange(plain.num_samples)
    assert all_rows(plain, places) == all_rows(valid, places)


def test_the_ledger_shows_documents_as_they_are(files: Path, tmp_path: Path) -> None:
    plain = ledger(settings(files, tmp_path), 15, None)
    assert ledger(settings(files, tmp_path, fim_rate=1.0), 15, None) == plain
    assert max(entry.sample for entry in plain) > 0


def test_the_sample_of_a_seed_never_changes(files: Path, tmp_path: Path) -> None:
    tokenizer, marks = opened(files, tmp_path, "tiktoken")
    transform = FillInTheMiddle(0.8, 0.5, tokenizer, marks)
    eod = tokenizer.eod
    tokens = [*tokenizer.encode("one two"), eod, *tokenizer.encode("three four five"), eod]
    row = np.array([*tokens, *tokenizer.encode("six seven eight"), *[PADDING] * 8])
    random = np.random.Generator(np.random.Philox(key=[3, 10]))
    shown = "".join(
        "|" if t == PADDING else tokenizer.decode([t]) for t in transform.sample(row, random)
    )
    assert shown == (
        "<|fim_prefix|>o<|fim_suffix|>e two<|fim_middle|>n<|endoftext|>"
        "<|fim_prefix|><|fim_suffix|> four five<|fim_middle|>three<|endoftext|>"
        "<|fim_prefix|>six seve"
    ), "PSM, SPM, and what the sample has no room for is left out"
    random = np.random.Generator(np.random.Philox(key=[3, 11]))
    assert (transform.sample(row, random) == PADDING).sum() == 4


# Options


@pytest.mark.parametrize("rate", ["-0.1", "1.1", "nan"])
@pytest.mark.parametrize("flag", ["--fim-rate", "--fim-spm-rate"])
def test_rates_outside_0_to_1(flag: str, rate: str) -> None:
    (found,) = violations(flag, rate)
    assert found.startswith(f"{flag} {rate} must be from 0 to 1")


def test_tokens_that_the_tokenizer_lacks(files: Path) -> None:
    found = violations("--fim-rate", "0.5")
    assert found == [
        f"--fim-{part}-token <fim_{part}> is no special, added or user-defined token of "
        "ByteTokenizer, which has none: give a --tokenizer-type with such tokens, or --fim-rate 0"
        for part in ("prefix", "middle", "suffix")
    ]
    ranks = ("--tokenizer-type", "TikTokenizer", "--tokenizer-model", f"{files}/ranks.tiktoken")
    (found,) = violations(
        *(*ranks, "--tiktoken-pattern", "cl100k_base", "--fim-rate", "0.5"),
        *("--fim-prefix-token", "<|fim_prefix|>", "--fim-suffix-token", "<|fim_suffix|>"),
    )
    assert found == (
        "--fim-middle-token <fim_middle> is no special, added or user-defined token of "
        "TikTokenizer, which has <|fim_middle|>, <|fim_prefix|>, <|fim_suffix|>, "
        "<|endofprompt|>, <|endoftext|>"
    )
    found = violations(*ranks, "--tiktoken-pattern", "llama3", "--fim-rate", "1")
    assert len(found) == 3 and all(sentence.endswith(", ...") for sentence in found)
    (found,) = violations(
        *(*ranks, "--tiktoken-pattern", "cl100k_base", "--fim-rate", "0.5"),
        *("--fim-prefix-token", "<|fim_prefix|>", "--fim-suffix-token", "<|fim_prefix|>"),
        *("--fim-middle-token", "<|endoftext|>"),
    )
    assert "expected three tokens, none of which ends a document" in found


@pytest.mark.parametrize("kind", ["tiktoken", "special", "ordinary", "sentencepiece", "user"])
def test_what_is_right(files: Path, kind: str) -> None:
    words = [
        word
        for name, text in kinds(files)[kind].items()
        for word in (f"--{name.replace('_', '-')}", text)
    ]
    assert run("--fim-rate", "0.5", *words).data.fim_spm_rate == 0.5
    assert run("--fim-rate", "1", "--fim-data", "--fim-spm-rate", "1", *words).data.fim_rate == 1.0


@pytest.mark.parametrize("kind", ["tiktoken", "special", "user"])
def test_an_ordinary_word_marks_nothing(files: Path, tmp_path: Path, kind: str) -> None:
    config = settings(files, tmp_path, kind, fim_middle_token="the")
    tokenizer = open_tokenizer(config.data)
    assert len(set(tokenizer.encode("the")) - set(tokenizer.encode(""))) == 1, "it is one token"
    with pytest.raises(ConfigError, match="--fim-middle-token the is no special, added"):
        find_sentinels(config.data, tokenizer)


def test_data_without_a_known_text(files: Path, tmp_path: Path) -> None:
    (found,) = violations("--mock-data", "--fim-rate", "0.5")
    assert found == "--fim-rate 0.5 needs text: the random tokens of --mock-data have none"
    for suffix in ("bin", "idx"):
        (tmp_path / f"p.{suffix}").write_bytes(b"x")
    (found,) = violations("--data", f"{tmp_path}/p", "--fim-rate", "0.5")
    assert found.startswith("--fim-rate 0.5 needs text: that of a .bin is not known; give its")
    (found,) = violations("--fim-data")
    assert "give --fim-rate" in found


# Whole runs


def test_a_run_that_fills_in_the_middle(pool: RankPool, files: Path, tmp_path: Path) -> None:
    """The same losses in two layouts, other ones than without, and validated on plain text."""
    words = [
        *(*SMALL, "--data", f"{files}/a.jsonl", "--data-cache-path", f"{tmp_path}/cache"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{files}/special"),
        *("--eval-steps", "1", "--precision", "fp32", "--packing", "best-fit"),
    ]
    rearranged = [*words, "--fim-rate", "0.5"]
    plain = run_in_pool(pool, words, 1, tmp_path / "runs")
    one = run_in_pool(pool, rearranged, 1, tmp_path / "runs")
    two = run_in_pool(pool, [*rearranged, "--dp", "2"], 2, tmp_path / "runs")
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert two.valid_losses == pytest.approx(one.valid_losses, rel=1e-5)
    assert one.losses != pytest.approx(plain.losses, rel=1e-5)
