"""Checkpoints of whole runs: any layout's is any other's, and a run goes on as if never stopped."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_jobs import contents, load_and_save, train_and_save
from pool import Outcome, RankPool
from runs import SMALL

from megalite import pretrain
from megalite.checkpoint.directory import Directory

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": dict(),
    "tp2 pp2": dict(tp=2, pp=2),
    "dp4 zero3": dict(dp=4, zero=3),
    "pp2 interleaved": dict(pp=2, schedule="interleaved", chunks=2),
    "tp2 dp2 zero2": dict(tp=2, dp=2, zero=2),
    "pp2 zb-v dp2 zero1": dict(pp=2, schedule="zb-v", dp=2, zero=1),
}
MODEL = dict(tie_embeddings=True, num_kv_heads=2, precision="bf16")


def world(layout: dict[str, Any]) -> int:
    return math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "dp"))


def check_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, values in a.items():
        assert values.dtype == b[name].dtype and values.shape == b[name].shape, name
        assert torch.equal(bits(values), bits(b[name])), name


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).view(torch.uint8)


PAIRS = list(product(LAYOUTS, LAYOUTS))
SAMPLE = [(a, b) for i, (a, b) in enumerate(PAIRS) if a != b and i % 12 == 2]


@pytest.mark.parametrize(
    ("source", "target"),
    [pair if pair in SAMPLE else pytest.param(*pair, marks=pytest.mark.full) for pair in PAIRS],
)
def test_any_layout_s_state_is_any_other_s_bit_for_bit(
    pool: RankPool, tmp_path: Path, source: str, target: str
) -> None:
    """Weights, master weights, both moments, counters: after three steps, saved and loaded."""
    here, there = LAYOUTS[source], LAYOUTS[target]
    job = partial(train_and_save, **MODEL, **here)
    pool.run(world(here), job, tmp_path / "a", 3)
    folder = Directory(tmp_path / "a").folder(3)
    saved = contents(folder)
    assert any(name.startswith("optimizer.master.") for name in saved)
    assert saved["optimizer.state.steps"] == 3.0
    pool.run(world(there), partial(load_and_save, **MODEL, **there), folder, tmp_path / "b")
    check_same(saved, contents(Directory(tmp_path / "b").folder(3)))


@pytest.mark.parametrize(
    ("values", "layout"),
    [
        (dict(optimizer="muon"), "tp2 dp2 zero2"),
        (dict(precision="fp16", skip_spikes=3.0, spike_window=4), "tp2 pp2"),
        (dict(freeze=("*embed_tokens*", "model.layers.1.*"), tie_embeddings=False), "dp4 zero3"),
        pytest.param(dict(precision="bf16-pure"), "dp4 zero3", marks=pytest.mark.full),
        pytest.param(dict(moments_dtype="bf16"), "pp2 interleaved", marks=pytest.mark.full),
        pytest.param(
            dict(freeze=("*embed_tokens*",), tie_embeddings=False),
            "tp2 pp2",
            marks=pytest.mark.full,
        ),
        pytest.param(dict(precision="fp64"), "tp2 dp2 zero2", marks=pytest.mark.full),
    ],
    ids=str,
)
def test_states_of_every_kind(
    pool: RankPool, tmp_path: Path, values: dict[str, Any], layout: str
) -> None:
    there = LAYOUTS[layout]
    model = {**MODEL, **values}
    pool.run(1, partial(train_and_save, **model), tmp_path / "a", 3)
    folder = Directory(tmp_path / "a").folder(3)
    pool.run(world(there), partial(load_and_save, **model, **there), folder, tmp_path / "b")
    check_same(contents(folder), contents(Directory(tmp_path / "b").folder(3)))


@pytest.mark.parametrize(("then", "now"), [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16")])
def test_another_precision_takes_the_most_precise_weights(
    pool: RankPool, tmp_path: Path, then: str, now: str
) -> None:
    values = dict(MODEL, precision=then)
    pool.run(1, partial(train_and_save, **values), tmp_path / "a", 3)
    folder = Directory(tmp_path / "a").folder(3)
    values["precision"] = now
    pool.run(2, partial(load_and_save, **values, dp=2), folder, tmp_path / "b")
    before, after = contents(folder), contents(Directory(tmp_path / "b").folder(3))
    name = "model.layers.1.mlp.down_proj.weight"
    exact = before.get(f"optimizer.master.{name}", before[name])
    assert exact.dtype == torch.float32
    if now == "fp32":
        assert torch.equal(after[name], exact)
    else:
        assert torch.equal(after[f"optimizer.master.{name}"], exact)
        assert torch.equal(after[name], exact.bfloat16())
    assert torch.equal(after[f"optimizer.exp_avg.{name}"], before[f"optimizer.exp_avg.{name}"])


RUN = [
    *SMALL,
    "--steps",
    "6",
    "--eval-steps",
    "1",
    "--eval-interval",
    "4",
    "--hidden-dropout",
    "0.2",
]
RUN += ["--attention-dropout", "0.1", "--sample-length", "0", "--device", "cpu"]


def train(
    pool: RankPool, folder: Path, save: Path, *flags: str, code: int = 0, run: list[str] = RUN
) -> list[Outcome]:
    """A run by the public entry point, named after its checkpoints' folder."""
    argv = [*run, *flags, "--runs", str(folder), "--name", f"{save.name}-run"]
    argv += ["--save", str(save)]
    layout = {flag: int(value) for flag, value in pairwise(argv) if flag in AXES}
    outcomes = pool.run(math.prod(layout.values()), pretrain.main, argv)
    assert [outcome.value for outcome in outcomes] == [code] * len(outcomes), outcomes
    return outcomes


AXES = ("--tp", "--pp", "--dp")


def losses(folder: Path) -> dict[int, float]:
    """By step; of one that was done twice the last."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}


SAME = ["--pp 2 --tie-embeddings", "--dp 2 --zero 3", "--tp 2 --pp 2 --dp 2"]
MORE = [
    "",
    "--tp 2",
    "--dp 2 --zero 1",
    "--dp 2 --zero 0",
    "--dp 2 --zero 2",
    "--dp 2 --precision bf16",
    "--dp 2 --optimizer muon",
    "--pp 2 --schedule zb-v",
    "--pp 2 --schedule zb-h1 --post-validation",
    "--precision fp16",
    "--dp 2 --precision bf16-pure",
    "--tp 2 --precision bf16 --moments-dtype bf16",
    "--skip-spikes 2 --spike-window 3",
    "--dp 2 --rampup-batch-size 4,4,20",
]


@pytest.mark.parametrize(
    "flags", [*SAME, *(pytest.param(flags, marks=pytest.mark.full) for flags in MORE)]
)
def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(
    pool: RankPool, tmp_path: Path, flags: str
) -> None:
    calm, broken = tmp_path / "calm", tmp_path / "broken"
    words = [*flags.split(), "--save-interval", "3"]
    train(pool, tmp_path, calm, *words)
    shutil.copytree(Directory(calm).folder(3), Directory(broken).folder(3))
    (said, *_) = train(pool, tmp_path, broken, *words)
    assert f"going on from {broken}/step-00000003: step 3" in said.stdout
    want, got = losses(tmp_path / "calm-run"), losses(tmp_path / "broken-run")
    assert set(want) == {*range(1, 7)} and set(got) == {4, 5, 6}
    assert got == {step: want[step] for step in got}
    check_same(contents(Directory(calm).folder(6)), contents(Directory(broken).folder(6)))


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("--tp 2 --pp 2", "--dp 2 --zero 3 --micro-batch-size 1"),
        pytest.param("--dp 4 --zero 2", "", marks=pytest.mark.full),
        pytest.param("", "--tp 4 --pp 2 --schedule zb-h1", marks=pytest.mark.full),
    ],
)
def test_another_layout_goes_on_with_the_same_samples(
    pool: RankPool, tmp_path: Path, then: str, now: str
) -> None:
    calm, broken = tmp_path / "calm", tmp_path / "broken"
    words = ["--save-interval", "3", "--num-kv-heads", "4", "--precision", "fp64"]
    train(pool, tmp_path, calm, *then.split(), *words)
    shutil.copytree(Directory(calm).folder(3), Directory(broken).folder(3))
    train(pool, tmp_path, broken, *now.split(), *words)
    want, got = losses(tmp_path / "calm-run"), losses(tmp_path / "broken-run")
    for step in (4, 5, 6):
        assert abs(got[step] - want[step]) <= 1e-11 * want[step]


def test_finished_and_run_again(pool: RankPool, tmp_path: Path) -> None:
    save = tmp_path / "ck"
    train(pool, tmp_path, save)
    first = contents(Directory(save).folder(6))
    (said, *_) = train(pool, tmp_path, save)
    assert "going on from" in said.stdout and "final valid loss" in said.stdout
    assert Directory(save).steps() == [6]
    (said, *_) = train(pool, tmp_path, save, "--steps", "8", code=2)
    assert "--steps was 6, and is 8: restore it, or give --allow-change steps" in said.stderr
    train(pool, tmp_path, save, "--steps", "8", "--allow-change", "steps")
    assert Directory(save).steps() == [8, 6]
    check_same(first, contents(Directory(save).folder(6)))


def test_what_may_not_change_is_told_all_at_once(pool: RankPool, tmp_path: Path) -> None:
    save = tmp_path / "ck"
    train(pool, tmp_path, save, "--steps", "1")
    changed = ["--steps", "1", "--lr", "0.5", "--seed", "7", "--data", __file__]
    (said, *_) = train(pool, tmp_path, save, *changed, code=2)
    for words in ("3 problems", "--lr was", "--seed was", "the data of", "--allow-change data"):
        assert words in said.stderr
    (said, *_) = train(pool, tmp_path, save, "--steps", "1", "--hidden-size", "64", code=2)
    assert "is of another model" in said.stderr and "hidden_size" in said.stderr
    (said, *_) = train(pool, tmp_path, save, "--steps", "1", "--no-resume", code=2)
    assert "holds checkpoints; choose another folder" in said.stderr
    (said, *_) = train(pool, tmp_path, save, "--allow-change", "lrr,tp,hidden_size", code=2)
    assert "3 problems" in said.stderr and "did you mean lr?" in said.stderr


def test_weights_of_another_run_and_its_optimizer_or_a_new_one(
    pool: RankPool, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    train(pool, tmp_path, first, "--steps", "3", "--precision", "bf16")
    taken = contents(Directory(first).folder(3))
    run = [word if word != "6" else "3" for word in RUN] + ["--precision", "bf16"]
    whole = partial(train, pool, tmp_path, run=run)
    load = ["--load", str(first), "--dp", "2"]
    (said, *_) = whole(tmp_path / "second", *load)
    assert "step 3" in said.stdout
    (said, *_) = whole(tmp_path / "third", *load, "--finetune", "--steps", "1", "--lr", "1e-30")
    assert "starting from the weights of" in said.stdout
    tuned = contents(Directory(tmp_path / "third").folder(1))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(tuned[name], taken[name])
    assert tuned["optimizer.state.steps"] == 1.0
    (said, *_) = whole(tmp_path / "fourth", *load, "--no-load-optim")
    assert "with a new optimizer" in said.stdout
    (said, *_) = whole(tmp_path / "fifth", "--load", str(tmp_path / "nowhere"), code=2)
    assert "does not exist" in said.stderr


def errors(outcomes: list[Outcome]) -> str:
    """What all ranks told: the first one that finds it does."""
    return "".join(outcome.stderr for outcome in outcomes)


def damage(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    pool: RankPool, tmp_path: Path
) -> None:
    save = tmp_path / "ck"
    words = ["--dp", "2", "--save-interval", "2"]
    train(pool, tmp_path, save, *words)
    want = contents(Directory(save).folder(6))
    damage(Directory(save).folder(6))
    told = errors(train(pool, tmp_path, save, *words, "--no-fallback", code=3))
    assert "step-00000006: rank-00001.safetensors: bytes" in told
    (said, *_) = train(pool, tmp_path, save, *words)
    assert "*** passed over:" in said.stdout and "step-00000004: step 4" in said.stdout
    check_same(want, contents(Directory(save).folder(6)))
    assert len(list(save.glob("step-00000006.damaged-*"))) == 1
    for step in (2, 4, 6):
        damage(Directory(save).folder(step))
    assert "no checkpoint can be used" in errors(train(pool, tmp_path, save, *words, code=3))
    (Directory(save).folder(6) / "rank-00000.safetensors").unlink()
    told = errors(train(pool, tmp_path, save, *words, "--no-fallback", code=3))
    assert "step-00000006/rank-00000.safetensors can't be read" in told
