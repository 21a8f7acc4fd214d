"""The first command learns more than letter pairs, in any layout; without attention it cannot."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from runs import launch, pretrain_command, read_run

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


def train(tmp_path: Path, layout: str) -> None:
    result = launch(pretrain_command(*layout.split(), "--runs", str(tmp_path), "--name", "first"))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    run = read_run(tmp_path / "first")
    assert run.valid_losses[-1] < goal(result.stdout)
    assert f"final valid loss {run.valid_losses[-1]:.4f}" in result.stdout
    assert "sample, continuing" in result.stdout


def test_the_first_command(tmp_path: Path) -> None:
    train(tmp_path, "--tp 4 --pp 2")


@pytest.mark.full
@pytest.mark.parametrize("layout", ["", "--tp 2", "--pp 2", "--dp 2"])
def test_the_same_on_fewer_ranks(tmp_path: Path, layout: str) -> None:
    train(tmp_path, layout)


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
