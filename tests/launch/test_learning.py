"""The first command learns more than letter pairs, in any layout; without attention it cannot.

The quick tier runs the first command for a few steps, and learns on one rank from half the text.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from runs import Run, launch, pretrain_command, read_run

from megalite import pretrain
from megalite.layers.attention import Attention


def goal(stdout: str) -> float:
    """One nat below the unigram entropy, and below the bigram entropy, as the run prints them."""
    match = re.search(r"entropy ([\d.]+) nats by token counts, ([\d.]+) by pairs", stdout)
    assert match
    unigram, bigram = float(match[1]), float(match[2])
    assert 3.0 < unigram < 3.6
    assert 2.2 < bigram < 2.7
    return min(unigram - 1.0, bigram)


def train(tmp_path: Path, *flags: str, **env: str) -> tuple[Run, str]:
    """A run to its end, and what it printed."""
    result = launch(
        pretrain_command(*flags, "--runs", str(tmp_path), "--name", "first"), env=env, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    run = read_run(tmp_path / "first")
    assert f"final valid loss {run.valid_losses[-1]:.4f}" in result.stdout
    assert "sample, continuing" in result.stdout
    return run, result.stdout


def test_the_first_command_runs_to_its_end(tmp_path: Path) -> None:
    run, _ = train(tmp_path, *"--tp 4 --pp 2 --steps 4 --sample-length 20".split())
    assert run.losses[-1] < run.losses[0] - 1.0


def test_one_rank_learns_from_half_the_text(tmp_path: Path) -> None:
    run, stdout = train(tmp_path, "--global-batch-size", "16", OMP_NUM_THREADS="1")
    assert run.valid_losses[-1] < goal(stdout)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["--tp 4 --pp 2", "", "--tp 2", "--pp 2", "--dp 2"])
def test_the_first_command(tmp_path: Path, layout: str) -> None:
    run, stdout = train(tmp_path, *layout.split())
    assert run.valid_losses[-1] < goal(stdout)


@pytest.mark.full
def test_without_attention_it_does_not_reach_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attend = Attention.forward

    def nothing(self: Attention, *args: torch.Tensor) -> torch.Tensor:
        return attend(self, *args) * 0.0

    monkeypatch.setattr(Attention, "forward", nothing)
    flags = ["--runs", str(tmp_path), "--name", "blind", "--device", "cpu"]
    assert pretrain.main(flags) == 0
    assert read_run(tmp_path / "blind").valid_losses[-1] > goal(capsys.readouterr().out)
