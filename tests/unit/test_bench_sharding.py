"""The sharding benchmark, but for its GPUs: rows, intervals, bad input, a run on the CPU."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
from commands import run
from runs import launch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import bench_sharding
from sharding_bench.cases import ALONE, CASES, config_of, formula_gib
from sharding_bench.overlap import length, union

EXAMPLES = Path(bench_sharding.__file__).parent


def test_intervals_by_hand() -> None:
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert length(union([(0, 2), (1, 3)])) == 3
    assert union([(0, 10), (2, 3)]) == [(0, 10)]
    assert union([]) == []


def test_the_case_is_a_layout_and_its_formula() -> None:
    config = run(*"--model 1b --dp 4 --precision bf16 --zero 3".split())
    assert config_of(ALONE, config).parallel.dp == 1
    assert [config_of(f"zero-{n}", config).parallel.zero for n in range(4)] == [0, 1, 2, 3]
    states = [formula_gib(config_of(f"zero-{n}", config))[0] for n in range(4)]
    assert states == sorted(states, reverse=True)
    whole = formula_gib(config_of(ALONE, config))[0]
    assert states[0] == pytest.approx(whole)
    assert states[1] == pytest.approx(whole * (2 + 4 + 12 / 4) / 18)


def test_a_run_on_the_cpu_trains_every_case_alike(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    flags = "--model tiny --precision fp32 --device cpu --seq-length 32 --micro-batch-size 2"
    flags += " --global-batch-size 8"
    command = [sys.executable, str(EXAMPLES / "bench_sharding.py"), "--flags", flags]
    result = launch([*command, "--steps", "1", "--csv", str(path)], timeout=240)
    assert result.returncode == 0, result.stderr
    with path.open(newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert tuple(rows) == CASES
    losses = {case: float(row["loss"]) for case, row in rows.items()}
    alone = losses[ALONE]
    for case, loss in losses.items():
        # The rival computes in bf16, whatever the run's precision.
        assert loss == pytest.approx(alone, rel=2e-3 if "fully" in case else 1e-5), case
    assert all(float(row["step_ms"]) > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dp", "1"], "bench_sharding.py: --steps is at least 1, --dp at least 2"),
        (["--flags", "--model 2b"], "--model 2b is not a preset"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_sharding.main(arguments) == 2
    assert message in capsys.readouterr().err
