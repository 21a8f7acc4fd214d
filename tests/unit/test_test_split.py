"""The test after training: what it reads, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import data_config, open_splits
from pool import RankPool
from runs import run_in_pool

from megalite.data.indexed_writer import IndexedWriter
from megalite.errors import DataError

SMALL = (
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--ffn-hidden-size", "48", "--seq-length", "16", "--vocab-size", "1000"),
    *(
        "--micro-batch-size",
        "2",
        "--global-batch-size",
        "4",
        "--steps",
        "4",
        "--sample-length",
        "0",
    ),
    *("--precision", "fp32", "--eval-steps", "4", "--lr", "1e-2", "--sample-length", "0"),
)


def write(prefix: Path, low: int, high: int) -> Path:
    """Documents of token ids from a range, so that sets differ in their losses."""
    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    draw = np.random.default_rng(low)
    for _ in range(40):
        writer.add_sequence(draw.integers(low, high, draw.integers(5, 30)))
        writer.end_document()
    writer.close()
    return prefix


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    """Three datasets: one to train on, one much like it, one that is not."""
    ranges = ((0, 8), (4, 12), (500, 900))
    return [str(write(tmp_path / name, *ids)) for name, ids in zip("abc", ranges, strict=True)]


def last_records(runs: Path) -> dict[str, float]:
    """The evaluations that a run wrote."""
    (file,) = runs.glob("*/metrics.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return {key: r[key] for r in records for key in ("valid_loss", "test_loss") if key in r}


def test_the_test_is_an_evaluation_of_its_own_data(
    pool: RankPool, tmp_path: Path, sets: list[str]
) -> None:
    a, b, c = sets

    def evaluations(valid: str, test: str, ranks: int) -> dict[str, float]:
        runs = tmp_path / f"{Path(valid).name}{Path(test).name}{ranks}"
        words = ["--train-data-path", a, "--valid-data-path", valid, "--test-data-path", test]
        words += ["--dp", str(ranks)]
        run = run_in_pool(pool, [*SMALL, *words], ranks, runs)
        found = last_records(runs)
        assert f"final test loss {found['test_loss']:.4f}" in run.stdout
        return found

    one = evaluations(b, c, 1)
    assert one["test_loss"] > one["valid_loss"] + 0.5
    # The same data is the same loss, whichever of the two it is called.
    other = evaluations(c, b, 1)
    assert (other["valid_loss"], other["test_loss"]) == (one["test_loss"], one["valid_loss"])
    for name, loss in evaluations(b, c, 2).items():
        assert loss == pytest.approx(one[name], rel=1e-5)


def test_a_third_share_of_the_split_is_tested_on(
    pool: RankPool, tmp_path: Path, sets: list[str]
) -> None:
    words = ["--data", sets[0], "--split"]
    run_in_pool(pool, [*SMALL, *words, "6,2,2"], 1, tmp_path / "three")
    assert last_records(tmp_path / "three").keys() == {"valid_loss", "test_loss"}
    run_in_pool(pool, [*SMALL, *words, "6,2"], 1, tmp_path / "two")
    assert last_records(tmp_path / "two").keys() == {"valid_loss"}


def test_splits_share_nothing(tmp_path: Path, sets: list[str]) -> None:
    splits = open_splits(data_config(tmp_path, sets[0], split="5,3,2"))
    assert splits.test is not None
    seen = [
        {piece.document for i in range(split.num_samples) for piece in split.pieces(i)}
        for split in (splits.train, splits.valid, splits.test)
    ]
    assert all(seen) and sum(map(len, seen)) == len(set.union(*seen))
    assert max(seen[0]) < min(seen[1]) and max(seen[1]) < min(seen[2])


@pytest.mark.parametrize("values", [dict(split="5,3,0"), dict(split="5,3"), dict(eval_steps=0)])
def test_nothing_is_tested(tmp_path: Path, sets: list[str], values: dict[str, object]) -> None:
    values = {"split": "5,3,2", **values}
    assert open_splits(data_config(tmp_path, sets[0], **values)).test is None


def test_a_share_that_is_too_short_for_a_test(tmp_path: Path, sets: list[str]) -> None:
    with pytest.raises(DataError, match=r"the test share of --split 90,9\.9,0\.1 holds 0 tokens"):
        open_splits(data_config(tmp_path, sets[0], split="90,9.9,0.1"))
