"""NCCL: every two-rank layout trains as one GPU does, on two GPUs or with both ranks on one."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from runs import SMALL, Run, launch, pretrain_command, read_run, worst
from settings import sharing_ranks

FLAGS = [*SMALL, "--steps", "20", "--lr-warmup-steps", "5", "--device", "cuda"]
BOUNDS = {"fp32": (1e-5, 1e-4, 1e-5), "fp64": (1e-11, 1e-10, 1e-11)}
LAYOUTS = [
    *("--tp 2", "--tp 2 --no-sequence-parallel", "--pp 2", "--pp 2 --schedule gpipe"),
    *(f"--dp 2 --zero {level}" for level in range(4)),
]
SCHEDULES = [
    *("interleaved", "zb-h1", "zb-v --recompute full", "v-min", "dualpipe-v", "auto"),
    "zb-h2 --post-validation --pp-layers 2.5,1.5",
]


def run(folder: Path, *flags: str, layout: str = "") -> Run:
    name = re.sub("[ ,]+", "-", " ".join(["run", *flags, layout]).strip())
    command = pretrain_command(*FLAGS, *flags, *layout.split())
    command += ["--runs", str(folder), "--name", name]
    together = layout and torch.cuda.device_count() < 2
    processes = sharing_ranks(layout) if together else [{}]
    with ThreadPoolExecutor(len(processes)) as pool:
        results = list(pool.map(lambda env: launch(command, env=env, timeout=120), processes))
    assert [result.returncode for result in results] == [0] * len(results), results
    assert ("NCCL" if layout else "one rank") in results[0].stdout
    return read_run(folder / name)


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    folder = tmp_path_factory.mktemp("one")
    return functools.cache(lambda *flags: run(folder, *flags))


@pytest.mark.parametrize("tied", [(), ("--tie-embeddings",)], ids=["untied", "tied"])
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(
    one_gpu: Callable[..., Run],
    tmp_path: Path,
    layout: str,
    precision: str,
    tied: tuple[str, ...],
) -> None:
    want = one_gpu("--precision", precision, *tied)
    equals(run(tmp_path, "--precision", precision, *tied, layout=layout), want, precision)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule(one_gpu: Callable[..., Run], tmp_path: Path, schedule: str) -> None:
    flags = ("--precision", "fp32", "--tie-embeddings")
    got = run(tmp_path, *flags, layout=f"--pp 2 --schedule {schedule}")
    equals(got, one_gpu(*flags), "fp32")


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradients_that_travel_in_bf16(
    one_gpu: Callable[..., Run], tmp_path: Path, zero: int
) -> None:
    """As near to one GPU as their rounding is, and no nearer."""
    flags = ("--precision", "fp32")
    layout = f"--dp 2 --zero {zero} --grad-reduce-dtype bf16"
    got, want = run(tmp_path, *flags, layout=layout), one_gpu(*flags)
    assert 1e-6 < worst(got.losses, want.losses) <= 2e-3
    assert 1e-5 < worst(got.grad_norms, want.grad_norms) <= 2e-2


@pytest.mark.parametrize("layout", ["--tp 2", "--pp 2 --tie-embeddings", "--dp 2"])
def test_weights_without_a_master(one_gpu: Callable[..., Run], tmp_path: Path, layout: str) -> None:
    tied = tuple(word for word in layout.split() if word == "--tie-embeddings")
    want = one_gpu("--precision", "fp32", *tied)
    got = run(tmp_path, "--precision", "bf16-pure", layout=layout)
    assert worst(got.losses, want.losses) <= 2e-2


def equals(got: Run, want: Run, precision: str) -> None:
    loss_bound, norm_bound, weight_bound = BOUNDS[precision]
    assert worst(got.losses, want.losses) <= loss_bound
    assert worst(got.grad_norms, want.grad_norms) <= norm_bound
    for name, weight in want.weights.items():
        assert (got.weights[name] - weight).abs().max() <= weight_bound, name
