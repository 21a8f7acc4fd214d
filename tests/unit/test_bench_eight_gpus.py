"""The benchmark for eight GPUs, but for its GPUs: rows, goals, what fits, going on, the command."""

from __future__ import annotations

import re
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from runs import launch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import bench_eight_gpus as bench
from eight_gpus import agreement, goals
from eight_gpus.agreement import BACKWARD, FORWARD, MORE
from eight_gpus.layouts import FLAGSHIP, LAYOUTS, fitted, peak_bytes
from eight_gpus.rows import HEAD, LOSSES, SPEED, Row, show
from kernel_bench.table import read
from loss_noise import FailedRunError, Yardstick, training_run
from row_table import FAILED, RowTable, row_of

from megalite.config import resolve_device
from megalite.exit_codes import ExitCode
from megalite.parallel import machine

EXAMPLES = Path(bench.__file__).parent
TINY = (
    "--model tiny --num-layers 16 --num-attention-heads 8 --num-kv-heads 8 --seq-length 32 "
    "--micro-batch-size 1 --global-batch-size 32 --device cpu"
)


def options(*words: str) -> Any:
    return bench.parser().parse_args(words)


# --- what is measured ---


def test_the_layouts_are_of_eight_gpus_with_the_same_samples() -> None:
    found = bench.configurations(options())
    assert tuple(found) == LAYOUTS and LAYOUTS[0] == FLAGSHIP == "--tp 4 --pp 2"
    for config in found.values():
        assert config.world_size == 8 and config.model.seq_length == 8192
        assert config.train.global_batch_size == 32
        assert config.parallel.pp == 1 or config.num_micro_batches >= 4 * config.parallel.pp


def test_what_does_not_fit_computes_activations_again() -> None:
    config = resolve_device(bench.configurations(options())["--dp 8 --zero 1"], "cuda")
    need = peak_bytes(config)
    assert fitted(config, need) == config
    again = fitted(config, need - 1)
    assert again == config.replace(recompute="full") and peak_bytes(again) < need
    told = bench.plan(options("--gpu-memory", "80"))
    rows = {line[:30].strip(): line.split()[-1] for line in told.splitlines()[1:]}
    assert rows == dict.fromkeys(LAYOUTS, "none") | {
        "--dp 8 --zero 1": "full",
        "--pp 8 --schedule interleaved": "full",
    }


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--steps", "0"], ["--steps 0: at least 1"]),
        (["--loss-steps", "1"], ["--loss-steps 1: at least 2"]),
        (["--plan"], ["--plan: this machine has no GPU; say what one has with --gpu-memory"]),
        (["--layouts", "--tp 8"], ["layout --tp 8: needs 8 GPUs, and this machine shows 0"]),
        (
            ["--loss-flags", "--global-batch-size 8", "--layouts", "--pp 8"],
            ["layout --pp 8: --global-batch-size 8: 8 micro-batches"],
        ),
        (["--share-gpu"], ["--share-gpu goes with --op losses"]),
        (["--layouts", "--tp 3", "--zp 2"], ["layout --tp 3: ", "layout --zp 2: "]),
        (
            ["--layouts", "--pp 8", "--flags", "--model llama3-8b --global-batch-size 16"],
            ["layout --pp 8: --global-batch-size 16: 16 micro-batches", "need 32 here"],
        ),
        (["--flags", TINY, "--csv", "/nowhere/a.csv"], ["/nowhere/a.csv"]),
    ],
)
def test_bad_input_is_told_before_anything_runs(words, messages, capsys) -> None:
    assert bench.main(words) == 2
    told = capsys.readouterr().err
    assert all(message in told for message in messages), told


# --- rows and goals ---


def row(case: str = FLAGSHIP, **values: Any) -> Row:
    return Row(**{"op": SPEED, "case": case, "recompute": "none", "pp": 2, **values})


def test_cells_stand_under_their_heads() -> None:
    shares = dict.fromkeys(("spread", "mfu", "planned_bubble", "bubble"), 0.05)
    names = "step_ms predicted_ms tokens_per_s messages_ms comm_ms comm_exposed_ms peak_gib"
    shown = show(row(**shares, **dict.fromkeys([*names.split(), "estimate_gib"], 9.0)))
    heads = "tok/s/GPU,MFU,step ms,spread,/ sim,plan,bubble,msgs ms,comm ms,exposed,GiB,est."
    for head in heads.split(","):
        end = HEAD.index(f" {head}") + 1 + len(head)
        assert shown[end - 1] != " " and shown[end] == " ", head
    assert "failed: why" in show(row(status=FAILED, note="why"))


def verdicts(*given: Row) -> dict[str, bool]:
    return {verdict.goal: verdict.met for verdict in goals.judge(given)}


def test_goals_of_speed_and_memory() -> None:
    times = dict(step_ms=109.0, predicted_ms=100.0, peak_gib=50.0, estimate_gib=56.0)
    found = verdicts(
        row(mfu=0.45, **times),
        row("--pp 2", mfu=0.519, **times | dict(step_ms=111.0, estimate_gib=54.0)),
        row("--tp 8", pp=1, step_ms=150.0, predicted_ms=100.0),
        row("--pp 8", status=FAILED),
    )
    assert found == {
        "--tp 4 --pp 2: MFU >= 45%": True,
        "best layout: MFU >= 52%": False,
        "--tp 4 --pp 2: step within 10% of the simulator's": True,
        "--tp 4 --pp 2: memory within 10% of the prediction": False,
        "--pp 2: step within 10% of the simulator's": False,
        "--pp 2: memory within 10% of the prediction": True,
        "--pp 8: trains": False,
    }
    on_a_cpu = row(**times | dict(peak_gib=None))
    assert list(verdicts(on_a_cpu)) == ["--tp 4 --pp 2: step within 10% of the simulator's"]
    assert "--pp 8: trains" not in verdicts(row("--pp 8", status=FAILED), row("--pp 8"))


def losses(case: str, *values: float) -> Row:
    return Row(LOSSES, case, losses=" ".join(map(repr, values)))


def test_losses_are_held_against_noise() -> None:
    one = [losses(case, 4.0, 2.0, 1.0) for case in FORWARD]
    other = [losses(case, 4.0, 2.002, 0.999) for case in BACKWARD]
    good, bad = losses("--tp 8", 4.0, 1.9981, 1.001), losses("--dp 8", 4.0, 2.005, 1.0)
    assert verdicts(*one, *other, good, bad) == {
        "--tp 8: losses are one rank's": True,
        "--dp 8: losses are one rank's": False,
    }
    assert verdicts(*one, good) == {}, "nothing to measure noise by"


def test_differences_with_a_sign_are_no_noise() -> None:
    yardstick = Yardstick([[1.0] * 4], [[1.001, 0.999, 1.001, 0.999]])
    assert yardstick.judge([1.0015, 0.9985, 1.0015, 0.9985]).is_noise
    drift = yardstick.judge([1.001, 1.0012, 1.0008, 1.001])
    assert not drift.is_noise and "MORE THAN NOISE" in drift.text


def test_a_verdict_says_by_which_noise() -> None:
    ours = [1.003, 0.997, 1.003, 0.997]
    forward, backward = [[1.0] * 4], [[1.001, 0.999, 1.001, 0.999]]
    assert not Yardstick(forward, backward).judge(ours).is_noise
    told = Yardstick(forward, backward, [[1.002, 0.998, 1.002, 0.998]]).judge(ours)
    assert told.is_noise
    words = "3.00 x the yardstick, 1.50 x fp32's distance: more than the order's noise, within that"
    assert words in told.text
    assert "inf x the yardstick" in Yardstick(forward, forward).judge(ours).text
    # A sign that only fp32's distance has is none of the layouts'.
    drifts = Yardstick(forward, backward, [[1.01] * 4]).judge([1.004, 1.0042, 1.0038, 1.004])
    assert not drifts.is_noise


def fake_run(folder: Path, monkeypatch, script: str) -> None:
    """`megalite.pretrain` is a script that gets the run's flags."""
    (folder / "megalite").mkdir()
    (folder / "megalite/__init__.py").touch()
    (folder / "megalite/pretrain.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.chdir(folder)


WRITES = """
import sys, pathlib
folder = pathlib.Path(sys.argv[sys.argv.index("--runs") + 1]) / "run"
folder.mkdir()
(folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\\n{"step": 2, "loss": %s}\\n')
"""


def test_losses_of_a_run(tmp_path, monkeypatch) -> None:
    fake_run(tmp_path, monkeypatch, WRITES % "1.5")
    with training_run(["--tp", "2"]) as losses:
        assert losses() == [2.5, 1.5]


def test_a_loss_that_is_not_finite_fails_the_run(tmp_path, monkeypatch) -> None:
    fake_run(tmp_path, monkeypatch, WRITES % '"nan"')
    table = RowTable(tmp_path / "a.csv", {"commit": "abc"}, Row, show)
    assert not agreement.measure_layout(table, "--tp 2", "--tp 2", [{}])
    (row,) = table.rows()
    assert (row.status, row.note) == (FAILED, "the loss of step 2 is nan")


def test_a_run_that_fails_keeps_its_folder_and_one_that_is_left_ends(tmp_path, monkeypatch) -> None:
    fake_run(
        tmp_path,
        monkeypatch,
        "import sys, time\nif 'x' in sys.argv: sys.exit('why')\ntime.sleep(600)",
    )
    with training_run(["x"], [{}, {}]) as losses, pytest.raises(FailedRunError) as failed:
        losses()
    assert str(failed.value).count("why") == 2
    folder = Path(re.search(r"kept in (\S+)", str(failed.value))[1])
    assert folder.is_dir()
    shutil.rmtree(folder)
    begun = time.monotonic()
    with suppress(KeyboardInterrupt), training_run(["y"]):
        raise KeyboardInterrupt
    assert time.monotonic() - begun < 30


# --- going on ---


@pytest.mark.parametrize("code", [1, ExitCode.HUNG, ExitCode.INTERNAL])
def test_what_fails_does_not_keep_the_others(code, tmp_path, monkeypatch, capsys) -> None:
    """It is tried again by the next call, after the others; what has a good row is not."""
    started: list[str] = []

    def start(layout: str, _config: object, table: RowTable[Row]) -> int:
        started.append(layout)
        if layout == "--tp 2" and started.count(layout) == 1:
            return code
        table.add(row(layout, step_ms=1.0))
        return 0

    monkeypatch.setattr(bench, "start", start)
    words = ["--op", "speed", "--flags", TINY, "--csv", str(tmp_path / "a.csv"), "--commit", "abc"]
    layouts = ["--layouts", "--tp 2", "--pp 2", "--dp 2"]
    assert bench.main([*words, *layouts]) == 1
    told = capsys.readouterr().out
    assert f"--tp 2                         failed: exit code {code}" in told
    assert "missed  --tp 2: trains" in told
    assert bench.main([*words, *layouts, "--tp 4"]) == 0
    assert started == ["--tp 2", "--pp 2", "--dp 2", "--tp 4", "--tp 2"]
    assert bench.main([*words[:-1], "def", *layouts]) == 0, "other code is another figure"
    assert len(started) == 8
    assert bench.main([*words, "--loss-flags", "--lr 1e-3", *layouts]) == 0
    assert len(started) == 8, "the other op's flags are none of its business"
    again = [f"{layout} --recompute full" for layout in layouts[1:2]]
    assert bench.main([*words, "--layouts", *again]) == 0 and started[8:] == again


def test_a_stop_stops_all(tmp_path, monkeypatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(bench, "start", lambda layout, *_: started.append(layout) or 143)
    words = ["--flags", TINY, "--csv", str(tmp_path / "a.csv"), "--commit", "abc"]
    assert bench.main([*words, "--layouts", "--tp 2", "--pp 2"]) == 143
    assert started == ["--tp 2"]


def test_losses_go_on_too(tmp_path, monkeypatch, capsys) -> None:
    ran: list[str] = []

    @contextmanager
    def run(flags: list[str], _processes: object):
        ran.append(" ".join(flags))

        def losses() -> list[float]:
            if "--tp" in flags and len(ran) < 7:
                raise FailedRunError("the command\nwhy it failed")
            return [2.0, 1.001 if "--reverse-micro-batches" in flags else 1.0]

        yield losses

    monkeypatch.setattr(agreement, "training_run", run)
    words = ["--op", "losses", "--flags", TINY, "--csv", str(tmp_path / "a.csv"), "--commit", "abc"]
    words += ["--layouts", "--tp 2"]
    assert bench.main(words) == 1
    assert [flags.endswith(more) for flags, more in zip(ran, MORE.values(), strict=False)] == [
        True
    ] * 5
    assert "failed: why it failed" in capsys.readouterr().out
    assert bench.main(words) == 0
    assert len(ran) == 7 and ran[-1].endswith("--no-save-weights --tp 2")
    assert "met     --tp 2: losses are one rank's" in capsys.readouterr().out


def test_one_rank_runs_share_the_hosts_memory(monkeypatch) -> None:
    """Each that is offloaded pins 96 GiB of the 8B model's states."""
    flags = [f"{bench.loss_flags(options())} {more}" for more in MORE.values()]
    limit = bench.usable_bytes(options("--gpu-memory", "139.8"))
    flags = [bench.alone(each, "cuda", limit) for each in flags]
    assert [bench.OFFLOADED in each for each in flags] == [True] * 4 + [False]
    for free, count in ((560, 5), (200, 2), (50, 1)):
        monkeypatch.setattr(machine, "free_host_bytes", lambda free=free: free * 2**30)
        assert bench.together(flags, 8) == count
    assert bench.together([each.replace(bench.OFFLOADED, "") for each in flags], 2) == 2


# --- the command ---


def command(csv: Path, *words: str) -> str:
    given = ["--flags", TINY, "--loss-flags", "--lr 1e-3", "--csv", str(csv), "--commit", "abc"]
    given += ["--speed-flags=--mock-data", *words]
    done = launch(
        [sys.executable, str(EXAMPLES / "bench_eight_gpus.py"), *given],
        env={"OMP_NUM_THREADS": "1"},
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_on_two_ranks(tmp_path: Path) -> None:
    csv = tmp_path / "a.csv"
    command(csv, "--op", "speed", "--layouts", "--pp 2 --schedule zb-v", "--steps", "2")
    (found,) = [row_of(Row, each) for each in read(csv)]
    assert (found.ranks, found.micro_batches, found.recompute) == (2, 32, "none")
    assert found.step_ms > 0 and found.mfu is None and 0 < found.planned_bubble < found.bubble < 1
    assert found.tokens_per_s == pytest.approx(32 * 32 / found.step_ms * 1e3 / 2, rel=1e-5)


DRY = dict(zip(LAYOUTS, (4, 8, 2, 2, 2, 1, 1, 1), strict=True))
"""Micro-batch sizes with which eight ranks on two cores come to an end: the samples stay."""


@pytest.mark.full
def test_every_layout_on_eight_ranks(tmp_path: Path) -> None:
    """In fp32, in which layouts agree to its rounding."""
    csv = tmp_path / "a.csv"
    layouts = [f"{layout} --micro-batch-size {size}" for layout, size in DRY.items()]
    command(csv, "--steps", "2", "--loss-steps", "4", "--layouts", *layouts)
    found = [row_of(Row, each) for each in read(csv)]
    speed = [each for each in found if each.op == SPEED]
    assert [(each.case, each.ranks) for each in speed] == [(layout, 8) for layout in layouts]
    trained = {each.case: each.by_step() for each in found if each.op == LOSSES}
    assert set(trained) == {*MORE, *layouts}
    for case, by_step in trained.items():
        assert len(by_step) == 4
        assert by_step == pytest.approx(trained[FORWARD[0]], rel=1e-5), case
