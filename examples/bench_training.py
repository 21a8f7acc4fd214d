"""Tokens/s, MFU and memory of training runs, one layout after the other on this machine.

    python examples/bench_training.py                                  1 rank, tp 2, pp 2, dp 2
    python examples/bench_training.py --layouts "--tp 2" --steps 20
    python examples/bench_training.py --layouts "" MEGALITE_KERNELS=torch   kernels and plain torch
    python examples/bench_training.py --flags "--model tiny --steps 10" --layouts "" "--dp 2"

Every line is a run of `python -m megalite.pretrain` with the flags shown; the figures are medians
over its steps after the warm-up, from its metrics.jsonl. A word NAME=VALUE of a layout is set in
its environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from settings import words_and_settings

WARM_UP_STEPS = 4
DEFAULT_FLAGS = (
    "--model 1b --mock-data --global-batch-size 32 --eval-steps 0 --sample-length 0 "
    "--no-save-weights"
)


def main() -> None:
    """Run the layouts and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flags", default=DEFAULT_FLAGS, help="flags of every run")
    parser.add_argument("--layouts", nargs="*", default=["", "--tp 2", "--pp 2", "--dp 2"])
    parser.add_argument("--steps", type=int, default=12, help="steps of each run")
    options = parser.parse_args()
    print(f"device: {device_name()}\nflags: {options.flags} --steps {options.steps}")
    print(f"{'layout':<24s} {'tok/s':>9s} {'ms/step':>9s} {'spread':>7s} {'MFU %':>6s} {'GiB':>6s}")
    for layout in options.layouts:
        words, settings = words_and_settings(layout)
        flags = [*options.flags.split(), "--steps", str(options.steps), *words]
        print(f"{layout or '1 rank':<24s} {measure(flags, settings)}", flush=True)


def measure(flags: list[str], settings: dict[str, str]) -> str:
    """Run once; the table's cells, or how the run failed."""
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "megalite.pretrain", *flags, "--runs", runs, "--name", "b"]
        environment = {**os.environ, **settings}
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment
        )
        if result.returncode:
            return f"failed ({result.returncode}): {result.stderr.strip().splitlines()[-1]}"
        lines = (Path(runs) / "b" / "metrics.jsonl").read_text().splitlines()
    steps = [record for line in lines if "step_ms" in (record := json.loads(line))]
    steps = steps[min(WARM_UP_STEPS, len(steps) - 1) :]
    times = [record["step_ms"] for record in steps]
    median = statistics.median(times)
    tokens = statistics.median(record["tokens_per_s"] for record in steps)
    mfu = statistics.median(record.get("mfu", 0.0) for record in steps)
    spread = (max(times) - min(times)) / median
    memory = max(record["memory_bytes"] for record in steps) / 2**30
    return f"{tokens:9.0f} {median:9.1f} {spread:7.1%} {100 * mfu:6.1f} {memory:6.1f}"


def device_name() -> str:
    """The first GPU's name, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
