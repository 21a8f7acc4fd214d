"""Is the loss of a layout the loss of one rank, up to the noise of its precision?

    python examples/compare_layouts.py
    python examples/compare_layouts.py --flags "--model tiny --precision bf16" --layouts "--dp 2"
    python examples/compare_layouts.py --share-gpu
    python examples/compare_layouts.py --layouts MEGALITE_KERNELS=torch --steps 100

The yardstick is the difference between two one-rank runs that compute the same mathematics but sum
the micro-batches in opposite order: the largest over a few such pairs, because on a GPU no two runs
are alike and one pair is a matter of luck. A layout passes if its largest relative loss difference
to the first one-rank run is at most twice the yardstick, and if the differences have no sign: their
mean is within two standard errors of zero, or not larger than the yardstick's own.

A word NAME=VALUE of a layout is set in its environment: so kernels are held against plain torch.

With `--share-gpu` all ranks of a layout run on one GPU, each as the only rank of a machine of its
own as far as NCCL knows, and talk over loopback: the same program, for correctness, not for speed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from settings import words_and_settings

DEFAULT_FLAGS = (
    "--model 1b --global-batch-size 8 --lr-decay-steps 1000 --eval-steps 0 --sample-length 0"
)
"""The first steps of the preset's own 1000-step schedule, which are part of its warm-up."""


def main() -> int:
    """Run, compare, print; 1 if a layout differs by more than noise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flags", default=DEFAULT_FLAGS, help="flags of every run")
    parser.add_argument("--layouts", nargs="*", default=["--tp 2", "--pp 2", "--dp 2"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--draws", type=int, default=2, help="one-rank runs of each order")
    parser.add_argument("--share-gpu", action="store_true", help="all ranks on the first GPU")
    options = parser.parse_args()
    flags = [*options.flags.split(), "--steps", str(options.steps), "--no-save-weights"]
    print(f"flags: {' '.join(flags)}")
    forward, backward = one_rank_losses(flags, options.draws)
    reference = forward[0]
    print(f"one rank: loss {reference[0]:.4f} -> {reference[-1]:.4f}", flush=True)
    pairs = [differences(b, f) for f in forward for b in backward]
    for pair in pairs:
        print(f"{'micro-batches reversed':<24s} {describe(pair)}", flush=True)
    largest = max(max(map(abs, pair)) for pair in pairs)
    offset = max(abs(statistics.mean(pair)) for pair in pairs)
    failures = 0
    for layout in options.layouts:
        more, settings = words_and_settings(layout)
        ranks = sharing_ranks(layout) if options.share_gpu else [{}]
        ranks = [{**rank, **settings} for rank in ranks]
        found = differences(losses([*flags, *more], ranks), reference)
        signless = abs(statistics.mean(found)) <= max(2 * standard_error(found), offset)
        ratio = max(map(abs, found)) / largest if largest else float("inf")
        good = signless and (ratio <= 2 or not any(found))
        failures += not good
        verdict = "within noise" if good else "MORE THAN NOISE"
        print(
            f"{layout:<24s} {describe(found)}, {ratio:.2f} x the yardstick: {verdict}", flush=True
        )
    return min(1, failures)


def one_rank_losses(flags: list[str], draws: int) -> tuple[list[list[float]], list[list[float]]]:
    """Losses of one-rank runs in forward and in reversed order; side by side on several GPUs."""
    gpus = max(1, gpu_count())
    runs = [order for _ in range(draws) for order in (flags, [*flags, "--reverse-micro-batches"])]
    with ThreadPoolExecutor(gpus) as pool:
        places = [
            [{"CUDA_VISIBLE_DEVICES": str(i % gpus)}] if gpus > 1 else [{}]
            for i in range(len(runs))
        ]
        found = list(pool.map(losses, runs, places))
    return found[::2], found[1::2]


def gpu_count() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def sharing_ranks(layout: str) -> list[dict[str, str]]:
    """What each rank finds in its environment if all ranks of the layout share one GPU."""
    words, _ = words_and_settings(layout)
    sizes = dict(zip(words[::2], words[1::2], strict=False))
    world_size = math.prod(int(sizes.get(axis, 1)) for axis in ("--tp", "--pp", "--dp"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "GROUP_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "NCCL_HOSTID": f"machine-{rank}",
            "NCCL_SOCKET_IFNAME": "lo",
        }
        for rank in range(world_size)
    ]


def losses(flags: Sequence[str], processes: Sequence[Mapping[str, str]] = ({},)) -> list[float]:
    """The training losses of one run, of one process for each of these environments."""
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "megalite.pretrain", *flags, "--runs", runs, "--name", "c"]
        started = [
            subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **environment},
            )
            for environment in processes
        ]
        errors = [process.communicate()[1] for process in started]
        if any(process.returncode for process in started):
            sys.exit(f"{' '.join(command)}\n{''.join(errors)}")
        lines = (Path(runs) / "c" / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for line in lines if "loss" in (record := json.loads(line))]


def differences(ours: list[float], reference: list[float]) -> list[float]:
    """Relative, by step."""
    return [a / b - 1 for a, b in zip(ours, reference, strict=True)]


def standard_error(values: list[float]) -> float:
    """Of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5


def describe(values: list[float]) -> str:
    """Largest and mean with its standard error."""
    mean, error = statistics.mean(values), standard_error(values)
    return f"largest {max(map(abs, values)):.2e}, mean {mean:+.1e} ± {error:.1e}"


if __name__ == "__main__":
    sys.exit(main())
