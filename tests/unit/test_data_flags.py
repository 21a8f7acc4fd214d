"""`--data` takes one dataset or a blend as Megatron-LM writes it; what is wrong with it, with
epochs and with the order is said at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from commands import parse, run, violations, word_violations

from megalite.config import Config
from megalite.config_data import DataConfig
from megalite.config_file import to_toml
from megalite.data.corpus import Corpus
from megalite.data.mixture import Mixture, Part, prepare_mixture, shares
from megalite.data.source import train_ingredients, valid_ingredients


def blend(*words: str) -> list[tuple[float | None, tuple[str, ...]]]:
    return [(part.weight, part.data.data) for part in train_ingredients(DataConfig(data=words))]


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ((), [(None, ())]),
        (("a",), [(None, ("a",))]),
        (("a", "b"), [(None, ("a",)), (None, ("b",))]),
        (("a", "b", "c"), [(None, ("a",)), (None, ("b",)), (None, ("c",))]),
        (("0.7", "a", "0.3", "b"), [(0.7, ("a",)), (0.3, ("b",))]),
        (("30", "a"), [(30.0, ("a",))]),
        # As Megatron-LM reads them: an odd number of words, or one that is no number.
        (("1", "a", "2"), [(None, ("1",)), (None, ("a",)), (None, ("2",))]),
        (("1", "a", "x", "b"), [(None, (w,)) for w in ("1", "a", "x", "b")]),
    ],
)
def test_words(words: tuple[str, ...], want: list) -> None:
    assert blend(*words) == want
    per_split = DataConfig(train_data_path=words, valid_data_path=words)
    if words:
        assert [(p.weight, p.data.data) for p in train_ingredients(per_split)] == want
        assert [(p.weight, p.data.data) for p in valid_ingredients(per_split)] == want


@pytest.mark.parametrize("flag", ["--data", "--data-path", "--train-data-path"])
def test_flags_take_many_words(flag: str, tmp_path: Path) -> None:
    words = ("0.7", "a b.txt", "0.3", "c")
    config = parse(flag, *words, "--tp", "1").config
    assert words in (config.data.data, config.data.train_data_path)
    file = tmp_path / "a.toml"
    file.write_text(to_toml(config))
    assert parse("--config", str(file)).config.data == config.data
    assert parse(f"{flag}=a").config == parse(flag, "a").config


def test_a_file_may_give_one_text(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('data = "my corpus.txt"\n')
    assert parse("--config", str(file)).config.data.data == ("my corpus.txt",)
    file.write_text("data = [1, 'a']\n")
    (found,) = word_violations("--config", str(file))
    assert "data = [1, 'a']: expected text, or a list of texts" in found


def test_one_flag_takes_the_others_place(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('data = ["a", "b"]\n')
    config = parse("--config", f"{tmp_path}/a.toml", "--train-data-path", "c").config
    assert (config.data.data, config.data.train_data_path) == ((), ("c",))
    assert word_violations("--data", "a", "--train-data-path", "b") == [
        "--data and --train-data-path contradict: give one"
    ]
    assert word_violations("--num-epochs", "1", "--steps", "5") == [
        "--steps and --num-epochs contradict: give one"
    ]
    assert parse("--num-epochs", "1").config.train.steps == 0, "in place of the preset's"


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "a.txt").write_text("some text\n" * 500)
    return str(tmp_path / "a.txt")


def test_problems_of_all_parts_are_said(text: str, tmp_path: Path) -> None:
    found = violations("--data", "0.5", f"{tmp_path}/b.txt", "-1", text, "nan", f"{tmp_path}/c.gz")
    words = f"--data 0.5 {tmp_path}/b.txt -1 {text} nan {tmp_path}/c.gz"
    assert found[:2] == [
        f"{words}: weight -1 must be above 0",
        f"{words}: weight nan must be above 0",
    ]
    assert found[2].startswith(f"--data {tmp_path}/b.txt: there is no file {tmp_path}/b.txt")
    assert found[3].startswith(f"--data {tmp_path}/c.gz is not text")


@pytest.mark.parametrize("words", ["0.7 {} {}", "{} 0.7 {}", "0.7 {} x {}"])
def test_weights_before_some_paths_only(text: str, words: str) -> None:
    given = words.format(text, text).split()
    (found, *_) = violations("--data", *given)
    assert "a weight stands before every path or before none" in found


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--train-data-path {0}", "--train-data-path leaves nothing to validate on"),
        ("--valid-data-path {0}", "--valid-data-path {0} has no effect without --train-data-path"),
        (
            "--train-data-path {0} --valid-data-path {0} --eval-steps 0",
            "--valid-data-path {0} has no effect with --eval-steps 0",
        ),
        (
            "--train-data-path {0} --valid-data-path {0} --split 9,1",
            "--split 9,1 has no effect with --train-data-path",
        ),
        ("--train-data-path {0}x --eval-steps 0", "--train-data-path {0}x: there is no file"),
        ("--num-epochs 2 --data 1 {0} 2 {0}", "datasets with weights end at different times"),
        ("--num-epochs 2 --mock-data", "the random tokens of --mock-data never end"),
        ("--num-epochs -2", "--num-epochs -2 must not be negative"),
        ("--steps 0", "--steps 0 trains nothing: give --steps, --tokens or --num-epochs"),
        ("--order-samples 99", "--order-samples 99 has no effect without --data-order megatron"),
        (
            "--data-order megatron --mock-data",
            "--data-order megatron has no effect with --mock-data",
        ),
        (
            "--data-order megatron --order-samples 3 --steps 10 --global-batch-size 8",
            "--order-samples 3 is below the 80 samples of the run",
        ),
        (
            "--packing best-fit --data-order megatron",
            "--packing best-fit contradicts --data-order megatron",
        ),
        ("--data-order random", "--data-order random: expected one of epoch, megatron"),
        ("--test-data-path {0}", "--test-data-path {0} has no effect without --train-data-path"),
        (
            "--train-data-path {0} --test-data-path {0} --eval-steps 0",
            "--test-data-path {0} has no effect with --eval-steps 0",
        ),
        (
            "--train-data-path {0} --valid-data-path {0} --test-data-path {0}x",
            "--test-data-path {0}x: there is no file",
        ),
    ],
)
def test_rules(text: str, words: str, part: str) -> None:
    (found,) = violations(*words.format(text).split())
    assert part.format(text) in found


@pytest.mark.parametrize(
    "words",
    [
        "--data {0} {0}",
        "--data 0.7 {0} 0.3 {0} --data-order megatron",
        "--train-data-path {0} --eval-steps 0",
        "--train-data-path {0} --valid-data-path {0} {0}",
        "--train-data-path {0} --valid-data-path {0} --test-data-path 1 {0} 2 {0}",
        "--num-epochs 3 --data {0} {0}",
        "--data-order megatron --order-samples 4000 --steps 10 --global-batch-size 8",
        "--data {0} {0} --data-cache-path x",
        "--data {0} {0} --packing best-fit --num-epochs 1",
        "--num-epochs 1 --lr-warmup-steps 5",
    ],
)
def test_what_is_right(text: str, words: str) -> None:
    run(*words.format(text).split())


# Mixtures


def corpus(name: str, tokens: int, text_bytes: int) -> Corpus:
    return Corpus(name, name, f"print of {name}", 3, tokens, 99, text_bytes, 2.0, 1.0)


def test_a_mixture_of_one_is_that_corpus() -> None:
    one = corpus("a", 100, 200)
    mixture = Mixture((Part(one),))
    assert mixture.fingerprint == one.fingerprint
    assert mixture.describe() == one.describe()
    assert mixture.bits_per_byte(1.5) == one.bits_per_byte(1.5)
    assert (mixture.unigram_nats, mixture.bigram_nats) == (2.0, 1.0)


def test_bits_per_byte_of_a_blend() -> None:
    """Three quarters of the tokens have 2 bytes, a quarter has 6: 3 bytes each."""
    parts = (Part(corpus("a", 100, 200), 3.0), Part(corpus("b", 50, 300), 1.0))
    mixture = Mixture(parts)
    assert shares(parts) == [0.75, 0.25]
    nats_per_bit = 0.6931471805599453
    assert mixture.bits_per_byte(1.5) == pytest.approx(1.5 / nats_per_bit / 3)
    assert mixture.unigram_nats == 0.0, "that of a blend is not the parts'"
    # The loss is that of the validation data.
    apart = Mixture(parts, (Part(corpus("c", 100, 400)),))
    assert apart.bits_per_byte(1.5) == pytest.approx(1.5 / nats_per_bit / 4)
    unknown = Mixture((*parts, Part(corpus("d", 10, 0), 1.0)))
    assert unknown.bits_per_byte(1.5) is None and not unknown.is_text


def test_without_weights_parts_count_by_their_tokens() -> None:
    parts = (Part(corpus("a", 300, 1)), Part(corpus("b", 100, 1)))
    assert shares(parts) == [0.75, 0.25]
    assert [line.split()[0] for line in Mixture(parts).describe().splitlines()] == ["75%", "25%"]


def test_what_is_read_has_another_fingerprint() -> None:
    a, b = corpus("a", 1, 1), corpus("b", 1, 1)
    mixtures = [
        Mixture((Part(a),)),
        Mixture((Part(a), Part(b))),
        Mixture((Part(b), Part(a))),
        Mixture((Part(a, 1.0), Part(b, 2.0))),
        Mixture((Part(a, 1.0), Part(b, 3.0))),
        Mixture((Part(a),), (Part(b),)),
    ]
    assert len({mixture.fingerprint for mixture in mixtures}) == len(mixtures)
    other = Mixture((Part(a), Part(replace(b, fingerprint="x"))))
    assert other.fingerprint != mixtures[1].fingerprint


def test_one_corpus_in_two_places_is_tokenized_once(text: str, tmp_path: Path) -> None:
    data = Config().replace(data=(text, text), data_cache_path=f"{tmp_path}/cache").data
    first, second = prepare_mixture(data).train
    assert first.corpus == second.corpus
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 1
