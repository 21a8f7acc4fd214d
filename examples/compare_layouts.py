"""Is the loss of a layout the loss of one rank, up to the noise of its precision?

    python examples/compare_layouts.py
    python examples/compare_layouts.py --flags "--model tiny --precision bf16" --layouts "--dp 2"
    python examples/compare_layouts.py --share-gpu
    python examples/compare_layouts.py --layouts MEGALITE_KERNELS=torch --steps 100

What noise is, `loss_noise.py` says: what one rank's runs differ by when they sum micro-batches in
opposite order.

A word NAME=VALUE of a layout is set in its environment: so kernels are held against plain torch.

With `--share-gpu` all ranks of a layout run on one GPU, each as the only rank of a machine of its
own as far as NCCL knows, and talk over loopback: the same program, for correctness, not for speed.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack

from loss_noise import FailedRunError, Yardstick, describe, training_run
from settings import on_gpu, sharing_ranks, words_and_settings

from megalite.program import end

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
    try:
        return compare(flags, options)
    except FailedRunError as error:
        print(error, file=sys.stderr)
        return 1


def compare(flags: list[str], options: argparse.Namespace) -> int:
    """Run and print.

    Raises:
        FailedRunError: a run failed.
    """
    yardstick = Yardstick(*one_rank_losses(flags, options.draws))
    reference = yardstick.reference
    print(f"one rank: loss {reference[0]:.4f} -> {reference[-1]:.4f}", flush=True)
    for pair in yardstick.pairs:
        print(f"{'micro-batches reversed':<24s} {describe(pair)}", flush=True)
    failures = 0
    for layout in options.layouts:
        more, settings = words_and_settings(layout)
        ranks = sharing_ranks(layout) if options.share_gpu else [{}]
        ranks = [{**rank, **settings} for rank in ranks]
        with training_run([*flags, *more], ranks) as losses:
            verdict = yardstick.judge(losses())
        failures += not verdict.is_noise
        print(f"{layout:<24s} {verdict.text}", flush=True)
    return min(1, failures)


def one_rank_losses(flags: list[str], draws: int) -> tuple[list[list[float]], list[list[float]]]:
    """Losses of one-rank runs in forward and in reversed order; side by side on several GPUs."""
    gpus = max(1, gpu_count())
    orders = [order for _ in range(draws) for order in (flags, [*flags, "--reverse-micro-batches"])]
    found: list[list[float]] = []
    while len(found) < len(orders):
        with ExitStack() as held:
            together = [
                held.enter_context(training_run(order, [on_gpu(gpu) if gpus > 1 else {}]))
                for gpu, order in enumerate(orders[len(found) :][:gpus])
            ]
            found += [losses() for losses in together]
    return found[::2], found[1::2]


def gpu_count() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    end(main)
