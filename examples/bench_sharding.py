"""What data ranks shard, measured: speed, memory, and communication that nothing hides.

    python examples/bench_sharding.py                          all cases, on 2 GPUs
    python examples/bench_sharding.py --cases one-rank zero-1 zero-3 fully-shard
    python examples/bench_sharding.py --dp 4 --flags "--model llama3-8b --global-batch-size 64"

Cases: one-rank (the first rank alone, with as many micro-batches as all together), zero-0 to
zero-3, and torch's own `fully_shard` over the same model, data, loss and kernels, with weights that
are gathered again for the backward (fully-shard, as zero-3 does) or kept (fully-shard-2). All train
in one start of the ranks, one after the other; rows are appended to the CSV. The step after the
timed ones is profiled for the two columns of communication.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sharding_bench.cases import CASES, WARM_UPS
from surroundings import devices, surroundings

from megalite import cli
from megalite.config import resolve_device
from megalite.errors import ConfigError
from megalite.pretrain import PROGRAM
from megalite.program import checked, end

ALWAYS = "--mock-data --eval-steps 0 --sample-length 0 --no-save-weights"
MODEL = "--model 1b --seq-length 4096 --micro-batch-size 2 --global-batch-size 32"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured, 1 a rank failed, 2 bad input, 128 + signal when stopped."""
    options = parser().parse_args(arguments)
    try:
        return run(options)
    except ConfigError as error:
        print(error.message(), file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"bench_sharding.py: {error}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--dp", type=int, default=2, help="data ranks, all of this machine")
    made.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    made.add_argument("--flags", default=MODEL, help="of megalite.pretrain: the model, its batch")
    made.add_argument("--steps", type=int, default=5, help="timed steps of each case")
    made.add_argument("--csv", type=Path, default=Path("bench_sharding.csv"), help="appended to")
    made.add_argument("--commit", help="for the CSV, where there is no checkout to ask")
    return made


def run(options: argparse.Namespace) -> int:
    """Start the ranks.

    Raises:
        ConfigError, ValueError, OSError: it can't be measured.
    """
    if options.steps < 1 or options.dp < 2:
        raise ValueError("--steps is at least 1, --dp at least 2")
    steps = WARM_UPS + options.steps + 1
    words = f"{options.flags} {ALWAYS} --steps {steps} --dp {options.dp} --zero 3".split()
    config = checked(cli.parse(words, prog="", description="", switches=PROGRAM.switches), None)
    from sharding_bench import ranks

    from megalite.data.mixture import prepare_mixture
    from megalite.parallel.devices import choose_device, own_machine, require_kernels
    from megalite.parallel.launch import Prepared, launch

    machine = own_machine(config)
    device, _ = choose_device(config, machine)
    require_kernels(device, [resolve_device(config, device).train.precision], machine)
    config = resolve_device(config, device)
    job = partial(
        ranks.measure_cases,
        cases=options.cases,
        steps=options.steps,
        mixture=prepare_mixture(config.data),
        path=options.csv,
        where={
            **surroundings(options.commit, devices(device, options.dp)),
            "flags": options.flags,
            "timed_steps": str(options.steps),
        },
    )
    with tempfile.TemporaryDirectory(prefix="bench-sharding-") as runs:
        return launch(Prepared(config.replace(runs=runs), job, {}))


if __name__ == "__main__":
    end(main)
