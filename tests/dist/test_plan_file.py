"""A plan in a file on several ranks: all have the same one, and stages may lie in odd places."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from commands import run
from pool import RankPool
from runs import SMALL
from worlds import make_trainer, world_groups

from megalite import pretrain, verify
from megalite.config import Config
from megalite.verification.run import Verdict
from megalite.verification.run import verify as verified
from megalite.verification.shrink import shrink

RIGHT = "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1\n"
OTHER = "0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1\n"
PROGRAMS = {"pretrain": pretrain.main, "verify": verify.main}

TIED = {
    "both ends in the middle": """
        1F0 1F1 1B0 1B1
        0F0 0F1 3F0 3F1 3B0 3B1 0B0 0B1
        2F0 2F1 2B0 2B1""",
    "the first stage on the last rank": """
        2F0 2F1 2B0 2B1
        1F0 1F1 1B0 1B1
        0F0 0F1 0B0 0B1""",
}
"""Of three ranks, whose first and last stage share an embedding."""


def job(program: str, folder: str, flags: list[str]) -> int:
    before = os.getcwd()
    os.chdir(f"{folder}/{os.environ['RANK']}")
    try:
        return PROGRAMS[program](flags)
    finally:
        os.chdir(before)


def edited_job(path: str) -> float:
    """A run whose file is gone when its messages are placed anew."""
    trainer = make_trainer(pp=2, micro_batch_size=4, schedule=path, steps=5, eval_steps=0)
    trainer.groups.pp.all_reduce(torch.zeros(1))
    Path(path).unlink(missing_ok=True)
    return trainer.fit(None).train_loss


def test_a_plan_is_read_once(pool: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(RIGHT)
    losses = [outcome.value for outcome in pool.run(2, edited_job, str(path))]
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_ranks_with_different_plans_in_a_file_of_one_name(
    pool: RankPool, tmp_path: Path, program: str
) -> None:
    for rank, text in enumerate((RIGHT, OTHER)):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "mine.txt").write_text(f"# edited\n{text}")
    flags = [*SMALL, "--pp", "2", "--micro-batch-size", "4", "--global-batch-size", "8"]
    flags += ["--schedule", "mine.txt", "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    outcomes = pool.run(2, job, program, str(tmp_path), flags)
    assert [outcome.value for outcome in outcomes] == [2, 2]
    (message,) = [outcome.stderr for outcome in outcomes if outcome.stderr]
    assert re.fullmatch(
        "megalite: ranks disagree on the plan in mine.txt: rank 0 has '[0-9a-f]{16}', rank 1 has "
        "'[0-9a-f]{16}'\n",
        message,
    )


def verify_job(config: Config) -> Verdict:
    return verified(config, world_groups(config), torch.device("cpu"), precisions=("fp64",))


@pytest.mark.parametrize("case", TIED)
def test_a_tied_embedding_trains_as_on_one_rank(pool: RankPool, tmp_path: Path, case: str) -> None:
    (tmp_path / "plan.txt").write_text(TIED[case])
    flags = "--device cpu --pp 3 --tie-embeddings --micro-batch-size 4 --global-batch-size 8"
    config = shrink(run(*flags.split(), "--schedule", f"{tmp_path}/plan.txt")).config
    verdict = pool.run(config.world_size, verify_job, config)[0].value
    assert verdict.failed is None, verdict.failed
    assert len(verdict.passes) == 2, "one rank, then the layout"
