"""What a run reads, and in which order: the default does not depend on the length of the run;
`--data-order megatron` is what Megatron-LM reads, token for token; neither knows the layout."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import run, violations
from datasets import data_config, open_data, open_splits, rows, write_dataset

from megalite.config import Config
from megalite.config_file import to_toml
from megalite.data.blended_samples import BlendedSamples
from megalite.data.loader import Loader
from megalite.data.mixture import prepare_mixture
from megalite.data.splits import of_epochs
from megalite.errors import DataError


@pytest.fixture
def sets(tmp_path: Path) -> list[Path]:
    """Three datasets, the last one with empty documents and documents of two sequences."""
    return [
        write_dataset(tmp_path / "a", 1, 150),
        write_dataset(tmp_path / "b", 2, 60),
        write_dataset(tmp_path / "c", 3, 80, gaps=True),
    ]


Words = Callable[[list[Path]], list[object]]
BLENDS: dict[str, Words] = {
    "one": lambda s: [s[0]],
    "without weights": lambda s: s,
    "with weights": lambda s: [0.5, s[0], 0.2, s[1], 0.3, s[2]],
}


# Prefix stability


@pytest.mark.parametrize("blend", BLENDS)
def test_a_longer_run_begins_as_the_shorter_one(
    tmp_path: Path, sets: list[Path], blend: str
) -> None:
    words = BLENDS[blend](sets)
    lengths = (3, 20, 60, 61)  # 24 samples to 488: up to some epochs
    runs = [rows(open_data(data_config(tmp_path, *words, steps=n))[0], 8 * n) for n in lengths]
    for n, found in zip(lengths, runs, strict=True):
        assert found == runs[-1][: 8 * n]
    assert len({tuple(row) for row in runs[-1]}) < len(runs[-1]), "more than one epoch"


@pytest.mark.parametrize("blend", ["one", "with weights"])
def test_megatrons_order_does_depend_on_the_length(
    tmp_path: Path, sets: list[Path], blend: str
) -> None:
    words = BLENDS[blend](sets)
    runs = []
    for steps, samples in ((5, 0), (60, 0), (5, 480)):
        config = data_config(
            tmp_path, *words, steps=steps, data_order="megatron", order_samples=samples
        )
        assert config.data.order_samples == (samples or 8 * steps)
        runs.append(rows(open_data(config)[0], 40))
    assert runs[0] != runs[1], "extending a run reshuffles it"
    assert runs[2] == runs[1], "unless the order is made for the longer one from the start"


def test_the_sample_count_of_megatrons_order_is_part_of_the_run(tmp_path: Path) -> None:
    config = data_config(tmp_path, "x", data_order="megatron", steps=7)
    assert config.to_saved()["data"]["order_samples"] == 56
    assert data_config(tmp_path, "x", steps=7).data.order_samples == 0


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_the_order_of_a_saved_run_stays(tmp_path: Path, suffix: str) -> None:
    """More steps than it was made for would reshuffle the run from its first sample on."""
    prefix = write_dataset(tmp_path / "a", 1)
    words = ["--data", str(prefix), "--vocab-size", "1000", "--global-batch-size", "8"]
    ran = run(*words, "--data-order", "megatron", "--steps", "12")
    assert ran.data.order_samples == 96
    file = tmp_path / f"saved.{suffix}"
    file.write_text(to_toml(ran) if suffix == "toml" else json.dumps(ran.to_saved()))
    saved = ("--config", str(file))
    assert run(*saved) == ran
    fewer = run(*saved, "--steps", "3")
    assert (fewer.train.steps, fewer.data.order_samples) == (3, 96)
    (found,) = violations(*saved, "--steps", "36")
    assert found == (
        "--order-samples 96 is below the 288 samples of the run: give fewer steps, or "
        "--order-samples 0 for an order of this length, which is another one from its first sample "
        "on"
    )
    (found,) = violations(*saved, "--steps", "13")
    assert found.startswith("--order-samples 96 is below the 104 samples of the run")
    assert run(*saved, "--steps", "36", "--order-samples", "0").data.order_samples == 288
    assert run(*saved, "--data-order", "epoch", "--order-samples", "0").data.order_samples == 0


# Epochs


def test_an_epoch_takes_every_sample_once(tmp_path: Path, sets: list[Path]) -> None:
    for words in (sets[:1], sets):
        train, _ = open_data(data_config(tmp_path, *words, steps=100))
        first = train.order(np.arange(train.num_samples))
        second = train.order(train.num_samples + np.arange(train.num_samples))
        assert (second // train.num_samples == 1).all(), "counted over all epochs"
        again = second % train.num_samples
        assert sorted(first) == sorted(again) == list(range(train.num_samples))
        assert first.tolist() != again.tolist()


@pytest.mark.parametrize("order", ["epoch", "megatron"])
def test_steps_follow_from_epochs(tmp_path: Path, sets: list[Path], order: str) -> None:
    config = data_config(tmp_path, sets[0], steps=0, num_epochs=3, data_order=order)
    mixture = prepare_mixture(config.data)
    found = of_epochs(config, mixture)
    samples = open_data(data_config(tmp_path, sets[0]))[0].num_samples
    assert found.train.steps == 3 * samples // 8
    assert found.train.lr_decay_steps == found.train.steps
    assert found.train.lr_warmup_steps == int(0.1 * found.train.steps)
    assert found.data.order_samples == (8 * found.train.steps if order == "megatron" else 0)
    assert {"steps", "lr_decay_steps", "lr_warmup_steps"} <= found.derived
    open_data(found)


def test_one_epoch_of_a_blend_in_either_order(tmp_path: Path, sets: list[Path]) -> None:
    for order in ("epoch", "megatron"):
        config = data_config(tmp_path, *sets, steps=0, num_epochs=1, data_order=order)
        config = of_epochs(config, prepare_mixture(config.data))
        numbers = open_data(config)[0].order(np.arange(config.num_train_samples))
        assert max(Counter(numbers.tolist()).values()) == 1


def test_epochs_that_do_not_fill_a_batch_are_refused(tmp_path: Path, sets: list[Path]) -> None:
    config = data_config(
        tmp_path, sets[1], steps=0, num_epochs=1, global_batch_size=800, eval_steps=0
    )
    with pytest.raises(DataError, match=r"--num-epochs 1: .* samples? cannot fill"):
        of_epochs(config, prepare_mixture(config.data))


# The layout


@pytest.mark.parametrize("order", ["epoch", "megatron"])
@pytest.mark.parametrize("blend", BLENDS)
def test_a_global_batch_is_the_same_samples_in_every_layout(
    tmp_path: Path, sets: list[Path], blend: str, order: str
) -> None:
    words = BLENDS[blend](sets)
    samples = open_data(data_config(tmp_path, *words, data_order=order))

    def batch(dp: int, rows: int, step: int) -> list[tuple[int, ...]]:
        config = data_config(tmp_path, *words, dp=dp, micro_batch_size=rows, data_order=order)
        found = []
        for rank in range(dp):
            group: Any = SimpleNamespace(rank=rank, size=dp)
            loader = Loader(config, *samples, group, torch.device("cpu"))
            for micro_batch in loader.train_batch(step).micro_batches:
                found += [tuple(row) for row in micro_batch.tokens.tolist()]
        return sorted(found)

    for step in (0, 9):
        want = batch(1, 1, step)
        assert len(set(want)) == 8
        for dp, size in ((1, 8), (2, 2), (4, 1), (8, 1)):
            assert batch(dp, size, step) == want


# Validation


def test_validation_data_of_its_own(tmp_path: Path, sets: list[Path]) -> None:
    a, b, c = map(str, sets)
    config = data_config(tmp_path, train_data_path=(a,), valid_data_path=("2", b, "1", c))
    train, valid = open_data(config)
    whole = np.fromfile(f"{sets[0]}.bin", "<u2")
    assert train.num_samples == (len(whole) - 1) // 16, "nothing is held out"
    assert train.read(0).tolist() == whole[:17].tolist()
    assert isinstance(valid, BlendedSamples)
    first = np.fromfile(f"{sets[1]}.bin", "<u2")
    assert valid.read(0).tolist() == first[:17].tolist()


def test_all_parts_that_are_too_short_are_named(tmp_path: Path, sets: list[Path]) -> None:
    short = [write_dataset(tmp_path / name, 4, 2, 3) for name in ("short", "shorter")]
    with pytest.raises(DataError) as caught:
        open_data(data_config(tmp_path, sets[0], *short))
    assert [v.split(":")[0] for v in caught.value.violations] == list(map(str, short))


def test_all_parts_that_cannot_be_used_are_named(tmp_path: Path, sets: list[Path]) -> None:
    for path in sets[1:]:
        Path(f"{path}.bin").write_bytes(b"xxx")
    with pytest.raises(DataError) as caught:
        prepare_mixture(data_config(tmp_path, *sets).data)
    assert len(caught.value.violations) == 2
    for path, sentence in zip(sets[1:], caught.value.violations, strict=True):
        assert sentence.startswith(f"{path}.bin: ")


def test_a_dataset_that_was_rewritten_gets_another_index(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", 1)
    config = data_config(tmp_path, tmp_path / "a", data_order="megatron")
    before = rows(open_data(config)[0], 80)
    write_dataset(tmp_path / "a", 2)
    after = rows(open_data(config)[0], 80)
    write_dataset(tmp_path / "a", 1)
    assert before == rows(open_data(config)[0], 80) != after
    text = {tuple(row) for row in after}
    stream = np.fromfile(tmp_path / "a.bin", "<u2")
    assert len(stream) and not {tuple(row) for row in before} & text


# Megatron-LM itself


class Tokenizer:
    """All that its datasets ask of one."""

    eod, pad, vocab_size, unique_identifiers = 0, -1, 1000, {"a": 1}


@pytest.fixture(scope="module")
def megatron() -> Callable[..., Any]:
    """Builds megatron-core's datasets: (words or words by split, sizes) -> splits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset")
        builder = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_builder")
        utils = pytest.importorskip("megatron.core.datasets.utils")
        pytest.importorskip("megatron.core.datasets.helpers_cpp")

    def build(config: Config, sizes: list[int]) -> list[Any]:
        data = config.data
        if data.train_data_path:
            words = map(list, (data.train_data_path, data.valid_data_path, data.test_data_path))
            what: dict[str, Any] = {
                "blend_per_split": [utils.get_blend_from_list(w or None) for w in words]
            }
        else:
            what = {"blend": utils.get_blend_from_list(list(data.data)), "split": data.split}
        theirs = gpt.GPTDatasetConfig(
            random_seed=config.train.seed,
            sequence_length=config.model.seq_length,
            path_to_cache=None,
            tokenizer=Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            **what,
        )
        return builder.BlendedMegatronDatasetBuilder(
            gpt.GPTDataset, sizes, lambda: True, theirs
        ).build()

    return build


def megatron_rows(dataset: Any, count: int) -> list[list[int]]:
    if not hasattr(dataset, "dataset_index"):
        return [dataset._query_document_sample_shuffle_indices(i)[0].tolist() for i in range(count)]
    places = zip(dataset.dataset_index[:count], dataset.dataset_sample_index[:count], strict=True)
    return [
        dataset.datasets[part]._query_document_sample_shuffle_indices(sample)[0].tolist()
        for part, sample in places
    ]


CASES: dict[str, tuple[Words, dict[str, object]]] = {
    "one": (BLENDS["one"], {}),
    "one, part of an epoch": (BLENDS["one"], dict(steps=2)),
    "one, many epochs": (BLENDS["one"], dict(steps=97)),
    "one, another seed and split": (BLENDS["one"], dict(seed=7, split="70,25,5", steps=50)),
    "one, of which much is for the test": (BLENDS["one"], dict(split="6,2,2", steps=30)),
    "weights and a test": (BLENDS["with weights"], dict(split="5,3,4")),
    "no weights and a test": (BLENDS["without weights"], dict(split="5,3,4", steps=5)),
    "one with a weight": (lambda s: [3.0, s[0]], dict(steps=40)),
    "weights": (BLENDS["with weights"], {}),
    "weights, many epochs": (BLENDS["with weights"], dict(steps=90)),
    "weights that round": (lambda s: [1 / 3, s[0], 0.1, s[1], 0.7, s[2]], dict(steps=33)),
    "no weights": (BLENDS["without weights"], dict(steps=12)),
    "two without weights": (lambda s: s[:2], dict(steps=15)),
    "gaps": (lambda s: s[2:], dict(steps=30)),
}


@pytest.mark.parametrize("case", CASES)
def test_megatrons_order_is_what_megatron_reads(
    tmp_path: Path, sets: list[Path], case: str, megatron: Callable[..., Any]
) -> None:
    words, values = CASES[case]
    values = {"eval_interval": 5, "eval_steps": 2, **values}
    config = data_config(tmp_path, *words(sets), data_order="megatron", **values)
    check_against_megatron(config, megatron)


@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_also_with_data_for_each_split(
    tmp_path: Path, sets: list[Path], weights: bool, test: bool, megatron: Callable[..., Any]
) -> None:
    a, b, c = map(str, sets)
    train = ("0.7", a, "0.3", c) if weights else (a, c)
    config = data_config(
        tmp_path,
        train_data_path=train,
        valid_data_path=("1.0", b) if weights else (b,),
        test_data_path=train[::-1] if test and not weights else train if test else (),
        data_order="megatron",
        eval_steps=1,
    )
    check_against_megatron(config, megatron)


def check_against_megatron(config: Config, megatron: Callable[..., Any]) -> None:
    train = config.train
    validations = train.steps // train.eval_interval + 1 if train.eval_interval else 1
    first = train.eval_steps * 8
    ours = open_splits(config)
    sizes = [config.num_train_samples, validations * first, first if ours.test else 0]
    theirs = megatron(config, sizes)
    assert rows(ours.train, sizes[0]) == megatron_rows(theirs[0], sizes[0])
    assert rows(ours.valid, first) == megatron_rows(theirs[1], first)
    if ours.test is not None:
        assert rows(ours.test, first) == megatron_rows(theirs[2], first)
    assert (ours.test is not None) == bool(
        config.data.test_data_path or len(config.data.split.split(",")) == 3
    )


def test_more_than_megatron_would_read_is_refused(tmp_path: Path, sets: list[Path]) -> None:
    with pytest.raises(DataError, match="uses each dataset of a blend without weights once"):
        open_data(data_config(tmp_path, *sets, data_order="megatron", steps=100))
