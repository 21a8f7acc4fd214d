"""Numbers that go wrong on one rank: what is not finite, and bits that flip."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import RankPool
from runs import SMALL, read_run, read_weights

from megalite import pretrain
from megalite.events import read_events
from megalite.exit_codes import ExitCode
from megalite.injected import flip_a_bit
from megalite.optim.replicas import odd_ones

STEADY = [*SMALL, "--lr-decay-style", "constant", "--lr-warmup-steps", "0", "--lr", "1e-3"]


def job(fault: str, argv: list[str]) -> int:
    os.environ["MEGALITE_FAULT"] = fault
    return pretrain.main(argv)


def run(pool: RankPool, folder: Path, fault: str, world: int, flags: str) -> Any:
    """Exit codes of the ranks, what they said, and the folder of the run."""
    name = uuid.uuid4().hex
    argv = [*STEADY, *flags.split(), "--runs", str(folder), "--name", name, "--device", "cpu"]
    outcomes = pool.run(world, job, fault, argv)
    told = "".join(outcome.stderr for outcome in outcomes)
    return {outcome.value for outcome in outcomes}, told, folder / name


LAYOUTS = [
    ("--pp 2 --dp 2 --zero 1", 4, 0),
    ("--tp 2 --pp 2 --schedule zb-h1 --post-validation", 4, 3),
    ("--dp 2 --zero 0", 2, 1),
    ("--pp 2 --precision fp64 --skip-spikes 9 --spike-window 2", 2, 0),
]


@pytest.mark.parametrize(("layout", "world", "rank"), LAYOUTS)
def test_a_gradient_that_is_not_finite_changes_no_weight(
    pool: RankPool, tmp_path: Path, layout: str, world: int, rank: int
) -> None:
    """Case 23, P8: only the backwards of one rank and of the stages before it see it."""
    codes, _, calm = run(pool, tmp_path, "", world, f"{layout} --steps 3")
    assert codes == {0}
    codes, told, hit = run(pool, tmp_path, f"nan:rank={rank},step=4", world, f"{layout} --steps 4")
    assert codes == {0}
    assert f"*** MEGALITE_FAULT injects faults: rank {rank} computes gradients that are NaN" in told
    before, after = (read_weights(folder / "weights") for folder in (calm, hit))
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    *_, last = map(json.loads, (hit / "metrics.jsonl").read_text().splitlines())
    assert (last["step"], last["skipped"], last["grad_norm"]) == (4, True, "nan")
    skipped = [e for e in read_events(hit / "events.jsonl") if e["event"] == "skipped"]
    assert [(e["step"], e["why"], e["samples"]) for e in skipped] == [(4, "not finite", [24, 31])]


def test_too_many_in_a_row_end_the_run(pool: RankPool, tmp_path: Path) -> None:
    """Case 23: on all ranks, naming the steps and samples; a finite step starts the count anew."""
    flags = "--pp 2 --dp 2 --steps 20 --max-nonfinite-steps 3"
    fault = "nan:rank=1,step=2,steps=2;nan:rank=3,step=5,steps=9"
    codes, told, folder = run(pool, tmp_path, fault, 4, flags)
    assert codes == {ExitCode.NOT_FINITE}
    (sentence,) = [line for line in told.splitlines() if line.startswith("megalite: ")]
    assert sentence.startswith(
        "megalite: loss or gradients of 3 steps in a row were not finite (--max-nonfinite-steps): "
        "steps 5 to 7, whose samples are 32 to 55 of the data order; the weights are those before "
        "step 5."
    )
    assert "Traceback" not in told
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 7


def test_never_if_it_is_not_asked_for(pool: RankPool, tmp_path: Path) -> None:
    flags = "--steps 4 --max-nonfinite-steps 0"
    codes, _, folder = run(pool, tmp_path, "nan:step=1,steps=4", 1, flags)
    assert codes == {0} and len(read_run(folder).losses) == 4


@pytest.mark.parametrize(
    ("layout", "world", "rank", "words"),
    [
        ("--dp 3 --zero 0", 3, 1, "weights of data ranks differ that should be equal: rank 1 from"),
        ("--dp 3 --zero 1", 3, 2, "weights of data ranks differ that should be equal: rank 2 from"),
        ("--dp 2 --tp 2 --zero 0", 4, 3, "ranks 1, 3; which of them is right cannot be told"),
        (
            "--dp 4 --zero 1 --zero-shard-size 2 --global-batch-size 8",
            4,
            0,
            "rank 0 from ranks 1-3",
        ),
    ],
)
def test_a_bit_that_flips_in_one_replica_is_found(
    pool: RankPool, tmp_path: Path, layout: str, world: int, rank: int, words: str
) -> None:
    """Case 25."""
    flags = f"{layout} --steps 6 --check-replicas 2"
    flags += "" if "--global" in layout else " --global-batch-size 12"
    codes, told, folder = run(pool, tmp_path, f"bitflip:rank={rank},step=4", world, flags)
    assert ExitCode.DAMAGED in codes, told
    (sentence,) = [line for line in told.splitlines() if line.startswith("megalite: after step")]
    assert sentence.startswith("megalite: after step 4 the ") and words in sentence
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3, "read a step late"


@pytest.mark.parametrize("layout", ["--dp 4 --zero 1 --zero-shard-size 2", "--dp 2 --zero 3"])
def test_replicas_that_are_well_are_not_accused(
    pool: RankPool, tmp_path: Path, layout: str
) -> None:
    world = 4 if "--dp 4" in layout else 2
    codes, told, _ = run(pool, tmp_path, "", world, f"{layout} --steps 4 --check-replicas 1")
    assert (codes, told) == ({0}, "")


def test_the_majority_is_right() -> None:
    assert odd_ones([5, 5, 5]) is None
    assert odd_ones([5, 7, 5]) == [1]
    assert odd_ones([5, 7]) == odd_ones([1, 2, 3]) == odd_ones([1, 1, 2, 2]) == []
    assert odd_ones([4, 3, 3, 2, 3, 3]) == [0, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_flipped_bit_is_one_bit(dtype: torch.dtype) -> None:
    x = torch.ones(2, 2, dtype=dtype)
    flip_a_bit(x)
    assert x.flatten().tolist() == [1.5, 1.0, 1.0, 1.0]
