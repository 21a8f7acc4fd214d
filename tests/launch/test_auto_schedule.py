"""`--schedule auto`: a real run chooses, says why, keeps its choice, and trains as any other."""

from __future__ import annotations

import json
from pathlib import Path

from runs import SMALL, launch, pretrain_command, read_run, worst

FLAGS = [*SMALL, "--steps", "5", "--lr-warmup-steps", "2", "--precision", "fp64"]


def test_a_run_chooses_its_schedule_once(tmp_path: Path) -> None:
    flags = [*FLAGS, "--runs", str(tmp_path), "--device", "cpu"]
    one = launch(pretrain_command(*flags, "--name", "one"))
    chosen = launch(pretrain_command(*flags, "--name", "auto", "--pp", "2", "--schedule", "auto"))
    assert (one.returncode, chosen.returncode) == (0, 0), chosen.stderr
    (marked,) = [line for line in chosen.stdout.splitlines() if line.endswith("  chosen")]
    assert "schedules by measured costs" in chosen.stdout
    schedule, chunks = marked.split()[:2]
    saved = json.loads((tmp_path / "auto/config.json").read_text())["parallel"]
    assert (saved["schedule"], saved["chunks"]) == (schedule, int(chunks))
    first, second = read_run(tmp_path / "one"), read_run(tmp_path / "auto")
    assert len(second.losses) == 5
    assert worst(second.losses, first.losses) <= 1e-11
    for name, weight in first.weights.items():
        assert (second.weights[name] - weight).abs().max() <= 1e-11
    config = str(tmp_path / "auto/config.json")
    again = launch(pretrain_command("--config", config, "--name", "again"))
    assert again.returncode == 0, again.stderr
    assert "schedules by measured costs" not in again.stdout
    # Where weight gradients are placed is measured anew and changes no bit.
    assert read_run(tmp_path / "again").losses == second.losses


def test_on_one_stage_nothing_is_measured(tmp_path: Path) -> None:
    flags = [*FLAGS, "--runs", str(tmp_path), "--device", "cpu", "--pp", "1", "--schedule", "auto"]
    plain = launch(pretrain_command(*flags, "--name", "one"))
    told = launch(pretrain_command(*flags, "--dry-run"))
    assert (plain.returncode, told.returncode) == (0, 0), plain.stderr + told.stderr
    assert "schedules by measured costs" not in plain.stdout
    saved = json.loads((tmp_path / "one/config.json").read_text())["parallel"]
    assert saved["schedule"] == "1f1b"
    assert "--schedule auto has no effect with --pp 1" in told.stdout
    assert "chosen again at start" not in told.stdout
