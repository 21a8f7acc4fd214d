"""A run's record is one JSON object a line, whatever the numbers; scalars are read one step late;
the printed line is formatted for people."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.config import Config, resolve
from megalite.data.corpus import Corpus
from megalite.data.mixture import Mixture, Part
from megalite.metrics import DelayedScalars, Reading, RunLog, peak_flops, peak_memory_bytes

CPU = torch.device("cpu")
RANDOM = Mixture((Part(Corpus("", "random tokens", "mock", 0, 0, 0)),))
TEXT = Mixture((Part(Corpus("x", "a text", "abc", 1, 100, 256, text_bytes=200)),))
KEYS = ["step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "step_ms", "memory_bytes"]


def settings(**values: Any) -> Config:
    base = dict(steps=20, global_batch_size=4, seq_length=100, tensorboard=False)
    return resolve(Config().replace(**{**base, **values}))


def strict(line: str) -> dict[str, Any]:
    """JSON without Python's NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


def records(folder: Path) -> list[dict[str, Any]]:
    return [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# The record


def test_one_record_a_step(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "deep"
    with RunLog(settings(log_interval=10), RANDOM, folder, CPU) as log:
        for step in (1, 2, 3):
            log.step(step, Reading([0.5 * step, 3.0 - step], 0.25 * step), 1e-3 * step)
            assert len(records(folder)) == step, "each is on disk when its step is done"
    for step, record in enumerate(records(folder), start=1):
        assert list(record) == [*KEYS, "steps_skipped"]
        assert (record["step"], record["loss"]) == (step, 3.0 - step)
        assert (record["lr"], record["grad_norm"]) == (1e-3 * step, 0.5 * step)
        assert record["tokens"] == 400 * step
        assert record["tokens_per_s"] == 400 / (0.25 * step)
        assert record["step_ms"] == 250 * step
        assert 2**20 < record["memory_bytes"] < 2**45


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["loss", "grad_norm"])
def test_numbers_that_json_does_not_have_are_text(
    tmp_path: Path, capsys: pytest.CaptureFixture, place: str, value: float
) -> None:
    values = {"grad_norm": 0.5, "loss": 2.0, place: value}
    with RunLog(settings(), TEXT, tmp_path, CPU) as log:
        log.step(7, Reading([values["grad_norm"], values["loss"]], 0.5), 1e-3)
        log.validation(7, value)
    train, valid = records(tmp_path)
    assert train[place] == str(value)
    assert float(train[place]) == value or math.isnan(value)
    assert ("skipped" in train) == (place == "grad_norm")
    assert train.get("skipped", True) is True
    assert valid == {"step": 7, "valid_loss": str(value), "valid_bits_per_byte": str(value)}
    line = capsys.readouterr().out.splitlines()[0]
    assert ("gradient not finite: step skipped" in line) == (place == "grad_norm")


def test_the_loss_scale_and_what_was_skipped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of fp16, whose readings hold a third figure."""
    steps = [(0.5, 2.0**24), (math.inf, 2.0**24), (math.nan, 2.0**23), (0.5, 0.125)]
    with RunLog(settings(precision="fp16"), RANDOM, tmp_path, CPU) as log:
        for step, (norm, scale) in enumerate(steps, start=1):
            log.step(step, Reading([norm, 2.5, scale], 0.5), 1e-3)
    assert [list(r)[:8] for r in records(tmp_path)] == [KEYS] * 4
    assert [r["loss_scale"] for r in records(tmp_path)] == [scale for _, scale in steps]
    assert [r["steps_skipped"] for r in records(tmp_path)] == [0, 1, 2, 2]
    lines = capsys.readouterr().out.splitlines()
    assert "  norm 0.500  scale 16777216  800 tok/s  " in lines[0]
    assert "  scale 8388608  2 skipped  " in lines[2] and lines[2].endswith("step skipped")
    assert "  scale 0.125  2 skipped  " in lines[3] and not lines[3].endswith("step skipped")


def test_spikes_are_counted_with_what_is_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Readings of runs that skip spikes end in whether the step was one, behind the loss scale."""
    for scale, precision in (([], "fp32"), ([8.0], "fp16")):
        steps = [(0.5, 0.0), (9.0, 1.0), (math.nan, 0.0), (0.5, 0.0)]
        config = settings(precision=precision, skip_spikes=6.0)
        folder = tmp_path / precision
        with RunLog(config, RANDOM, folder, CPU) as log:
            for step, (norm, spike) in enumerate(steps, start=1):
                log.step(step, Reading([norm, 2.5, *scale, spike], 0.5), 1e-3)
        assert [r["steps_skipped"] for r in records(folder)] == [0, 1, 2, 2]
        assert [r.get("spike", False) for r in records(folder)] == [False, True, False, False]
        assert [r.get("loss_scale") for r in records(folder)] == [scale[0] if scale else None] * 4
        lines = capsys.readouterr().out.splitlines()
        assert "skipped" not in lines[0]
        assert "  1 skipped  " in lines[1] and lines[1].endswith("  spike: step skipped")
        assert "  2 skipped  " in lines[2] and lines[2].endswith("not finite: step skipped")
        assert "  2 skipped  " in lines[3] and not lines[3].endswith("step skipped")


@pytest.mark.parametrize("mixture", [RANDOM, TEXT])
def test_validations(tmp_path: Path, capsys: pytest.CaptureFixture, mixture: Mixture) -> None:
    with RunLog(settings(), mixture, tmp_path, CPU) as log:
        log.validation(15, 2.5)
    want = {"step": 15, "valid_loss": 2.5}
    out = capsys.readouterr().out
    if mixture is TEXT:  # two bytes a token
        want["valid_bits_per_byte"] = pytest.approx(2.5 / math.log(2) / 2, rel=1e-14)
        assert out == "valid     15  loss 2.5000  1.8034 bits per byte\n"
    else:
        assert out == "valid     15  loss 2.5000\n"
    assert records(tmp_path) == [want]


def test_a_run_that_goes_on_adds_to_its_record(tmp_path: Path) -> None:
    log = RunLog(settings(), RANDOM, tmp_path, CPU)
    with log:
        log.validation(1, 2.5)
    assert [record["step"] for record in records(tmp_path)] == [1]
    with pytest.raises(ValueError, match="closed"):
        log.validation(2, 2.5)
    with RunLog(settings(), RANDOM, tmp_path, CPU) as log:
        log.validation(3, 2.5)
    assert [record["step"] for record in records(tmp_path)] == [1, 3]


def test_without_tensorboard_only_the_record_is_written(tmp_path: Path) -> None:
    with RunLog(settings(), RANDOM, tmp_path, CPU) as log:
        log.validation(1, 2.5)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# The line


def line(
    capsys: pytest.CaptureFixture, folder: Path, seconds: float, step: int = 1, **values: Any
) -> str:
    config = settings(**values)
    with RunLog(config, RANDOM, folder, CPU) as log:
        log.step(step, Reading([0.12345, 2.34567], seconds), 1.23e-4)
    return capsys.readouterr().out


def test_a_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = line(capsys, tmp_path, 0.5, step=3, steps=120)
    want = (
        r"step   3/120  loss 2\.3457  lr 1\.23e-04  norm 0\.123  800 tok/s  500 ms  "
        r"\d+\.\d\d GiB  ETA 0:58\n"
    )
    assert re.fullmatch(want, out), out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.0, "100 tok/s"),
        (400 / 999.4, "999 tok/s"),
        (0.4, "1.0k tok/s"),
        (0.016, "25.0k tok/s"),
        (400 / 123_456, "123.5k tok/s"),
        (400 / 999_949, "999.9k tok/s"),
        (400 / 999_999, "1.0M tok/s"),
        (400 / 1e6, "1.0M tok/s"),
        (400 / 12_345_678, "12.3M tok/s"),
    ],
)
def test_counts(tmp_path: Path, capsys: pytest.CaptureFixture, seconds: float, text: str) -> None:
    assert f"  {text}  " in line(capsys, tmp_path, seconds)


@pytest.mark.parametrize(
    ("seconds", "steps", "text"),
    [
        (1.0, 1, "0:00"),
        (1.0, 10, "0:09"),
        (1.0, 60, "0:59"),
        (1.0, 61, "1:00"),
        (0.51, 118, "1:00"),  # 59.67 s: never 0:60
        (1.0, 3600, "59:59"),
        (1.0, 3601, "1:00:00"),
        (1.0, 3 * 3600 + 4 * 60 + 6, "3:04:05"),
        (3600.0, 101, "100:00:00"),
    ],
)
def test_durations(
    tmp_path: Path, capsys: pytest.CaptureFixture, seconds: float, steps: int, text: str
) -> None:
    assert line(capsys, tmp_path, seconds, steps=steps).endswith(f"  ETA {text}\n")


def test_time_left_follows_the_mean_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with RunLog(settings(steps=102), RANDOM, tmp_path, CPU) as log:
        log.step(1, Reading([1.0, 1.0], 9.0), 1e-3)
        log.step(2, Reading([1.0, 1.0], 1.0), 1e-3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("ETA 15:09")
    assert lines[1].endswith("ETA 8:20"), "100 steps of 5 s"


@pytest.mark.parametrize(
    ("interval", "shown"), [(1, [*range(1, 11)]), (3, [3, 6, 9, 10]), (10, [10]), (99, [10])]
)
def test_lines_at_the_interval_and_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture, interval: int, shown: list[int]
) -> None:
    with RunLog(settings(log_interval=interval, steps=10), RANDOM, tmp_path, CPU) as log:
        for step in range(1, 11):
            log.step(step, Reading([1.0, 1.0], 0.1), 1e-3)
    out = capsys.readouterr().out
    assert [int(n) for n in re.findall(r"step +(\d+)/10", out)] == shown
    assert "\r" not in out, "no bar where nobody looks"
    assert len(records(tmp_path)) == 10


# Scalars


def test_scalars_are_read_one_push_late() -> None:
    scalars = DelayedScalars(CPU)
    assert scalars.flush() is None
    assert scalars.push(torch.tensor([1.0, 2.0])) is None
    assert scalars.push(torch.tensor([3.0, 4.0])).values == [1.0, 2.0]
    assert scalars.push(torch.tensor([5.0])).values == [3.0, 4.0]
    assert scalars.flush().values == [5.0]
    assert scalars.flush() is None
    assert scalars.push(torch.tensor([6.0])) is None, "nothing is left of before the flush"
    assert scalars.flush().values == [6.0]


def test_scalars_may_be_changed_after_the_push() -> None:
    scalars, buffer = DelayedScalars(CPU), torch.tensor([1.0], dtype=torch.float64)
    scalars.push(buffer)
    buffer.fill_(9.0)
    assert scalars.flush().values == [1.0]


def test_seconds_are_those_between_begin_and_push(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    scalars = DelayedScalars(CPU)
    now = 100.0  # building a model, say
    scalars.begin()
    now = 103.0
    scalars.push(torch.tensor([1.0]))
    now = 110.0  # a validation
    scalars.begin()
    now = 114.0
    assert scalars.push(torch.tensor([1.0])).seconds == 3.0
    now = 200.0
    assert scalars.flush().seconds == 4.0


def test_scalars_may_be_pushed_after_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the seconds of its own step."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    scalars = DelayedScalars(CPU)
    for end in (3.0, 7.0):
        scalars.begin()
        now = end
        scalars.end()
    assert scalars.push(torch.tensor([1.0])) is None
    assert scalars.push(torch.tensor([2.0])) == Reading([1.0], 3.0)
    assert scalars.flush() == Reading([2.0], 4.0)


# The device


def test_a_cpu_has_no_peak_rate_and_its_memory_is_the_process() -> None:
    assert peak_flops(CPU) is None
    before = peak_memory_bytes(CPU)
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_memory_bytes(CPU) >= before > 20 << 20
    assert held.numel() == 64 << 20


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Some other GPU", None),
    ],
)
def test_peak_rate_by_name(monkeypatch: pytest.MonkeyPatch, name: str, rate: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda")) == rate


def test_mfu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """FLOP of a step over its time, the ranks and the peak."""
    monkeypatch.setattr("megalite.metrics.peak_flops", lambda _: 1e9)
    monkeypatch.setattr("megalite.metrics.flops_per_token", lambda _: 5e6)
    config = settings(tp=2, pp=2, global_batch_size=4)
    with RunLog(config, RANDOM, tmp_path, CPU) as log:
        log.step(1, Reading([1.0, 1.0], 2.0), 1e-3)
    (record,) = records(tmp_path)
    assert record["mfu"] == pytest.approx(5e6 * 400 / 2.0 / 4 / 1e9, rel=1e-12)
    assert "  MFU 25.0%  " in capsys.readouterr().out
