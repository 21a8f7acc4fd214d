"""`verify`, `doctor` and the explanation of hangs on GPUs, several or one that ranks share."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hangs import HANGS
from runs import launch
from settings import sharing_ranks

from megalite.config import Config, resolve, resolve_device
from megalite.layers import norm
from megalite.layers.sdpa import fastest_attention
from megalite.parallel.groups import ParallelGroups
from megalite.verification.run import verify
from megalite.verification.shrink import MOST_RANKS, shrink

HANGS_SCRIPT = Path(__file__).parents[1] / "launch/hangs.py"


def start(layout: str, *command: str) -> list[subprocess.CompletedProcess[str]]:
    """Run a command on the ranks of a layout: on GPUs of their own, or all on one."""
    words = dict(zip(layout.split()[::2], layout.split()[1::2], strict=True))
    ranks = 1
    for size in words.values():
        ranks *= int(size)
    shared = ranks > torch.cuda.device_count()
    processes = sharing_ranks(layout) if shared else [{}]

    def one(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return launch([sys.executable, *command], env=environment, timeout=120)

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, processes))


@pytest.mark.parametrize("layout", ["--dp 1", "--tp 2", "--pp 2", "--dp 2"])
def test_verify(layout: str) -> None:
    flags = ["--model", "llama3-8b", *layout.split(), "--device", "cuda"]
    results = start(layout, "-m", "megalite.verify", *flags)
    assert [result.returncode for result in results] == [0] * len(results), results
    last = results[0].stdout.splitlines()[-1]
    assert last.startswith("verified: ") and "fp64: " in last and "bf16: " in last


def test_verify_in_bf16_finds_a_kernel_that_is_wrong_in_bf16_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = norm.rms_norm

    def wrong(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y = right(x, weight, eps)
        return y * 1.3 if x.dtype == torch.bfloat16 else y

    config = resolve_device(resolve(Config().replace(steps=5, mock_data=True)), "cuda")
    small = shrink(config, MOST_RANKS).config.replace(device="cuda")
    device = torch.device("cuda", 0)
    precisions = ("fp64", "bf16")
    with fastest_attention(device):
        groups = ParallelGroups.solo()
        assert verify(small, groups, device, precisions=precisions).failed is None
        monkeypatch.setattr(norm, "rms_norm", wrong)
        failed = verify(small, groups, device, precisions=precisions, watch=True).failed
    assert failed is not None and failed.config.train.precision == "bf16"
    assert failed.failure is not None and failed.failure.first is not None
    assert failed.failure.first.name == "layers.0.attention_norm"


@pytest.mark.parametrize("ranks", [1, 2])
def test_doctor(ranks: int) -> None:
    command = ["-m", "megalite.doctor", "--device", "cuda", "--json", "--ranks", str(ranks)]
    result = start(f"--dp {ranks}", *command)[0]
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    states = {row["component"]: row["state"] for row in told["components"]}
    assert {states[name] for name in ("GPUs", "NCCL", "torch", "attention")} == {"ok"}
    assert {one["dtype"] for one in told["operations"]} == {"float32", "bfloat16"}
    assert len(told["collectives"]) == (6 if ranks > 1 else 0)


@pytest.mark.parametrize(
    "name", ["missing send", "asleep in forward", "exits early", "never starts"]
)
def test_hang(tmp_path: Path, name: str) -> None:
    results = start("--tp 2 --pp 2", str(HANGS_SCRIPT), name, str(tmp_path), "cuda")
    told = "\n".join(result.stderr for result in results)
    words = HANGS[name].words
    if name == "missing send":
        # NCCL's messages have no names: the next one is taken for it, and a later one is missed.
        words = words[:1]
    assert all(word in told for word in words), told
    guilty = HANGS[name].guilty if name == "exits early" else -1
    assert all(result.returncode == 5 for i, result in enumerate(results) if i != guilty), told
    assert "GPU in step" in told or name == "never starts"
