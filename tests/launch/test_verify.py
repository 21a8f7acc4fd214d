"""`python -m megalite.verify` as people start it: what it says, and its exit codes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from runs import launch

VERIFY = [sys.executable, "-m", "megalite.verify"]
FAULTY = """
import sys
import pytest
from faults import FAULTS
from megalite import verify

FAULTS["missing f"].plant(pytest.MonkeyPatch())
sys.exit(verify.main(sys.argv[1:]))
"""
CATCHES = Path(__file__).parents[1] / "verify_catches"


def test_a_right_layout() -> None:
    started = time.monotonic()
    result = launch([*VERIFY, "--model", "llama3-8b", "--tp", "4", "--pp", "2"])
    assert time.monotonic() - started < 60
    assert (result.returncode, result.stderr) == (0, "")
    first, last = result.stdout.splitlines()
    assert first.startswith("verify tp 4 x pp 2 x dp 1 on cpu, llama3-8b shrunk to layers 3,2, ")
    assert last.startswith("verified: ") and "fp64: " in last and "fp32: " in last


def test_a_wrong_layout(tmp_path: Path) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(CATCHES), os.environ.get("PYTHONPATH", "")])
    command = [*launcher, str(script), "--tp", "2", "--no-sequence-parallel"]
    result = launch(command, env={"PYTHONPATH": path})
    assert result.returncode == 1
    lines = result.stdout[result.stdout.index("FAILED") :].splitlines()
    assert lines[0] == "FAILED in fp64: tp 2 x pp 1 x dp 1 differs from the definition"
    assert lines[1].startswith("  first: gradient of model.norm.weight in step 0, on rank ")
    assert " instead of " in lines[2] and "rounding explains" in lines[2]
    assert lines[4].startswith("  likely cause: ") and "(f) is missing" in lines[4]


def test_activations_too() -> None:
    one_thread = {"OMP_NUM_THREADS": "1"}
    plain, watched = (
        launch([*VERIFY, *flags], env=one_thread)
        for flags in ([], ["--activations", "--sequence-parallel"])
    )
    assert (plain.returncode, watched.returncode) == (0, 0)
    assert "note: --sequence-parallel has no effect with --tp 1" in watched.stdout
    count = [
        int(run.stdout.split("verified: ")[1].split()[0].replace(",", ""))
        for run in (plain, watched)
    ]
    assert count[1] > 1.5 * count[0]


def test_what_runs_can_be_seen_without_running_it(tmp_path: Path) -> None:
    result = launch([*VERIFY, "--model", "llama3-8b", "--tp", "4", "--pp", "2", "--print-config"])
    assert (result.returncode, result.stderr) == (0, "")
    file = tmp_path / "small.toml"
    file.write_text(result.stdout)
    again = launch([*VERIFY, "--config", str(file), "--print-config"])
    # What is small already stays as it is.
    assert again.stdout == result.stdout


def test_a_schedule_that_a_run_would_choose() -> None:
    result = launch([*VERIFY, "--pp", "2", "--schedule", "auto"])
    assert (result.returncode, result.stderr) == (0, "")
    first, note, last = result.stdout.splitlines()
    name, chunks = (
        note.removeprefix("note: --schedule auto: ")
        .split(" is verified")[0]
        .split(" with --chunks ")
    )
    assert f", {name}; 4 steps in " in first
    assert last.startswith("verified: ")
    shown = launch([*VERIFY, "--pp", "2", "--schedule", "auto", "--print-config"])
    assert f'schedule = "{name}"\nchunks = {chunks}\n' in shown.stdout


@pytest.mark.parametrize("switch", [[], ["--print-config"]])
def test_bad_flags(switch: list[str]) -> None:
    result = launch([*VERIFY, "--tp", "3", "--lr-wsd-decay-steps", "3", *switch])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("megalite: 4 problems:")
    assert "--tp 3 does not divide --num-attention-heads 4" in result.stderr
    assert "--lr-wsd-decay-steps 3 has no effect" in result.stderr


def test_flags_about_files_are_not_held_against_a_machine_without_them() -> None:
    flags = ["--data", "/no/such/corpus", "--split", "99,1", "--sample-length", "9"]
    assert launch([*VERIFY, *flags, "--print-config"]).returncode == 0
