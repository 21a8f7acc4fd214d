"""Is the loss of a layout the loss of one rank, up to the noise of its precision?

    python examples/compare_layouts.py
    python examples/compare_layouts.py --flags "--model tiny --precision bf16" --layouts "--dp 2"

The yardstick is the difference between two one-rank runs that compute the same mathematics but sum
the micro-batches in opposite order. A layout passes if its largest relative loss difference to the
first of them is at most twice the yardstick's, and if the differences have no sign: their mean is
within two standard errors of zero, or below the yardstick's own mean in size.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DEFAULT_FLAGS = (
    "--model 1b --global-batch-size 16 --lr-decay-steps 1000 --eval-steps 0 --sample-length 0"
)
"""The first steps of the preset's own 1000-step schedule: 50 steps of warm-up."""


def main() -> int:
    """Run, compare, print; 1 if a layout differs by more than noise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flags", default=DEFAULT_FLAGS, help="flags of every run")
    parser.add_argument("--layouts", nargs="*", default=["--tp 2", "--pp 2", "--dp 2"])
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    flags = [*options.flags.split(), "--steps", str(options.steps), "--no-save-weights"]
    print(f"flags: {' '.join(flags)}")
    reference, reversed_order = one_rank_losses(flags, [*flags, "--reverse-micro-batches"])
    print(f"one rank: loss {reference[0]:.4f} -> {reference[-1]:.4f}", flush=True)
    noise = differences(reversed_order, reference)
    yardstick = max(map(abs, noise))
    print(f"{'micro-batches reversed':<24s} {describe(noise)}  (the yardstick)", flush=True)
    failures = 0
    for layout in options.layouts:
        found = differences(losses([*flags, *layout.split()]), reference)
        mean, error = statistics.mean(found), statistics.stdev(found) / len(found) ** 0.5
        signless = abs(mean) <= max(2 * error, abs(statistics.mean(noise)))
        good = max(map(abs, found)) <= 2 * yardstick and signless
        failures += not good
        verdict = "within noise" if good else "MORE THAN NOISE"
        print(f"{layout:<24s} {describe(found)}  {verdict}", flush=True)
    return min(1, failures)


def one_rank_losses(*runs: list[str]) -> list[list[float]]:
    """Losses of one-rank runs; side by side if each can have a GPU of its own."""
    if gpu_count() < len(runs):
        return [losses(flags) for flags in runs]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(losses, runs, map(str, range(len(runs)))))


def gpu_count() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def losses(flags: list[str], gpu: str | None = None) -> list[float]:
    """The training losses of one run, on one GPU if it is named."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu} if gpu else None
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "megalite.pretrain", *flags, "--runs", runs, "--name", "c"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        if result.returncode:
            sys.exit(f"{' '.join(command)}\n{result.stderr}")
        lines = (Path(runs) / "c" / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for line in lines if "loss" in (record := json.loads(line))]


def differences(ours: list[float], reference: list[float]) -> list[float]:
    """Relative, by step."""
    return [a / b - 1 for a, b in zip(ours, reference, strict=True)]


def describe(values: list[float]) -> str:
    """Largest and mean with its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"largest {max(map(abs, values)):.2e}, mean {statistics.mean(values):+.1e} ± {error:.1e}"


if __name__ == "__main__":
    sys.exit(main())
