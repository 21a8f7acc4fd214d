"""On GPUs: a run that goes on from a checkpoint has the bits of one that never stopped."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from runs import SMALL, launch, pretrain_command
from safetensors.torch import load_file
from settings import sharing_ranks

from megalite.checkpoint.directory import Directory
from megalite.checkpoint.reader import Checkpoint

FLAGS = [*SMALL, "--steps", "8", "--save-interval", "4", "--device", "cuda", "--deterministic"]
FLAGS += ["--hidden-dropout", "0.1", "--hidden-size", "256", "--num-attention-heads", "4"]
LAYOUTS = ["--dp 1", "--tp 2", "--pp 2", "--dp 2 --zero 3"]


def run(folder: Path, save: Path, *flags: str, layout: str = "--dp 1") -> str:
    """On GPUs of the ranks' own, or all on one; what the first rank printed."""
    command = pretrain_command(*FLAGS, *flags, *layout.split(), "--save", str(save))
    command += ["--runs", str(folder), "--name", f"{save.name}-run"]
    together = layout != "--dp 1" and torch.cuda.device_count() < 2
    processes = sharing_ranks(layout) if together else [{}]
    with ThreadPoolExecutor(len(processes)) as pool:
        results = list(pool.map(lambda env: launch(command, env=env, timeout=240), processes))
    assert [result.returncode for result in results] == [0] * len(results), results
    assert layout == "--dp 1" or "NCCL" in results[0].stdout
    return results[0].stdout


def contents(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    assert not checkpoint.damages()
    return {name: checkpoint.whole(name) for name in checkpoint.tensors}


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16 --moments-dtype bf16", "fp32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_going_on_changes_no_bit(tmp_path: Path, layout: str, precision: str) -> None:
    goes_on_alike(tmp_path, layout, "--precision", *precision.split())


def test_eight_ranks_go_on_alike(tmp_path: Path) -> None:
    if torch.cuda.device_count() in range(2, 8):
        pytest.skip("needs one GPU, or eight")
    goes_on_alike(tmp_path, "--tp 2 --pp 2 --dp 2", "--precision", "bf16")


def goes_on_alike(tmp_path: Path, layout: str, *flags: str) -> None:
    calm, broken = tmp_path / "calm", tmp_path / "broken"
    run(tmp_path, calm, *flags, layout=layout)
    shutil.copytree(Directory(calm).folder(4), Directory(broken).folder(4))
    assert "step 4" in run(tmp_path, broken, *flags, layout=layout)
    want, got = losses(tmp_path / "calm-run"), losses(tmp_path / "broken-run")
    assert got == {step: want[step] for step in (5, 6, 7, 8)}
    theirs, ours = contents(Directory(calm).folder(8)), contents(Directory(broken).folder(8))
    assert theirs.keys() == ours.keys()
    for name, values in theirs.items():
        assert torch.equal(values, ours[name]), name


def test_training_waits_for_nothing_but_copies(tmp_path: Path) -> None:
    """A save in every step, each while the next steps run: the weights are those of no saves."""
    flags = ["--precision", "bf16"]
    run(tmp_path, tmp_path / "often", *flags, "--save-interval", "1")
    run(tmp_path, tmp_path / "seldom", *flags)
    for step in (4, 8):
        often, seldom = (
            contents(Directory(tmp_path / which).folder(step)) for which in ("often", "seldom")
        )
        assert all(torch.equal(values, seldom[name]) for name, values in often.items())


def test_what_a_gpu_saved_a_cpu_loads(tmp_path: Path) -> None:
    run(tmp_path, tmp_path / "ck", "--precision", "bf16")
    command = pretrain_command(*FLAGS, "--runs", str(tmp_path), "--name", "cpu")
    words = [word if word != "cuda" else "cpu" for word in command]
    words += ["--load", str(tmp_path / "ck"), "--allow-change", "steps", "--steps", "9"]
    result = launch([*words, "--precision", "bf16", "--save", str(tmp_path / "on")], timeout=240)
    assert result.returncode == 0, result.stderr
    assert "step 8" in result.stdout and "step 9/9" in result.stdout


def test_a_hugging_face_model_out_and_in(tmp_path: Path) -> None:
    out, again = tmp_path / "hf", tmp_path / "again"
    run(tmp_path, tmp_path / "ck", "--precision", "bf16", "--export-hf", str(out))
    saved, exported = contents(Directory(tmp_path / "ck").folder(8)), {}
    for path in out.glob("*.safetensors"):
        exported |= load_file(path)
    assert exported and all(torch.equal(saved[name], values) for name, values in exported.items())
    still = ["--precision", "bf16", "--lr", "1e-30", "--min-lr", "0", "--init-from", str(out)]
    run(tmp_path, tmp_path / "on", *still, "--export-hf", str(again))
    for path in again.glob("*.safetensors"):
        for name, values in load_file(path).items():
            assert torch.equal(exported.pop(name), values), name
    assert not exported
