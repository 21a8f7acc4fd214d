"""Llama 3 8B on one host of eight GPUs: how fast each layout trains it, and that all train alike.

    python examples/bench_eight_gpus.py                                all of it
    python examples/bench_eight_gpus.py --op speed --layouts "--tp 4 --pp 2"
    python examples/bench_eight_gpus.py --op losses
    python examples/bench_eight_gpus.py --plan --gpu-memory 80         what would run; needs no GPU

Every row is appended to the CSV as soon as it is measured, and what has a good row there is not
measured again: a command that was cut off goes on where it was when it is given again, and one
layout can be measured by each call.

speed     3 steps to warm up, 2 recorded, 1 to settle, 5 timed; then one under the profiler.
          Sequence 8192, bf16, random tokens; 32 samples a step, in micro-batches of one. A layout
          that would not fit computes all activations again, and its row says so.
losses    20 steps on real text at sequence 512: the loss of every layout beside one rank's, whose
          optimizer states stay in the host's memory if they don't fit. What noise is,
          `loss_noise.py` says: what one-rank runs differ by that sum micro-batches in opposite
          order, two of each; and one in fp32.

With `--share-gpu` all ranks of the loss pass run on one GPU, each as the only rank of a machine of
its own as far as NCCL knows: the same program, for correctness. Other models and layouts, on two
GPUs or none:

    python examples/bench_eight_gpus.py --flags "--model 1b" --layouts "--tp 2" "--pp 2" "--dp 2"
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from eight_gpus import agreement, goals
from eight_gpus.layouts import (
    ALWAYS,
    LAYOUTS,
    configuration,
    fitted,
    peak_bytes,
    planned_bubble,
    too_few_micro_batches,
)
from eight_gpus.rows import FAILED, HEAD, LEGEND, LOSSES, SPEED, Row, measured, show
from row_table import RowTable
from schedule_bench.case import FIRST_TIMED, RECORDED
from settings import sharing_ranks
from surroundings import devices, surroundings

from megalite.config import Config, resolve_device
from megalite.errors import ConfigError
from megalite.program import end

GIB = 2**30


@dataclass(frozen=True)
class Bench:
    """What is asked for, checked.

    Attributes:
        runs: by layout; each as it runs here.
        losses: flags of all runs of the loss pass.
        one_rank: those that one rank needs beside them.
        gpus: of this machine; 0: the ranks compute on its CPU.
        share: all ranks of the loss pass on the first GPU.
        table: with what is there already.
    """

    runs: dict[str, Config]
    losses: str
    one_rank: str
    gpus: int
    share: bool
    table: RowTable[Row]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured, 1 a run failed, 2 bad input, 128 + signal when stopped."""
    options = parser().parse_args(arguments)
    try:
        if options.plan:
            print(plan(options))
            return 0
        bench = prepared(options)
    except ConfigError as error:
        print(error.message(), file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"bench_eight_gpus.py: {error}", file=sys.stderr)
        return 2
    code = 0
    if options.op in (SPEED, None):
        code = max(code, measure_speed(bench))
    if options.op in (LOSSES, None) and code <= 1:
        code = max(code, measure_losses(bench))
    if code <= 1:
        print("\n" + "\n".join(map(str, goals.judge(bench.table.rows()))))
    return code


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--op", choices=(SPEED, LOSSES), help="both if left out")
    made.add_argument("--layouts", nargs="+", default=list(LAYOUTS), metavar="FLAGS")
    made.add_argument(
        "--flags",
        default="--model llama3-8b --micro-batch-size 1 --global-batch-size 32",
        help="of megalite.pretrain, in both ops",
    )
    made.add_argument("--speed-flags", default="--seq-length 8192 --mock-data")
    made.add_argument("--loss-flags", default="--seq-length 512 --lr-decay-steps 1000")
    made.add_argument("--steps", type=int, default=5, help="timed steps")
    made.add_argument("--loss-steps", type=int, default=20)
    made.add_argument("--share-gpu", action="store_true", help="see above; with --op losses")
    made.add_argument("--gpu-memory", type=float, metavar="GIB", help="if not this GPU's")
    made.add_argument("--plan", action="store_true", help="print what would run, and run nothing")
    made.add_argument("--csv", type=Path, default=Path("bench_eight_gpus.csv"), help="appended to")
    made.add_argument("--commit", help="for the CSV, where there is no checkout to ask")
    return made


def plan(options: argparse.Namespace) -> str:
    """Each layout's memory, and what follows from it."""
    usable = float("inf") if options.gpu_memory is None else options.gpu_memory * GIB
    lines = [f"{'layout':<30s} {'GiB':>6s} {'bubble':>6s}  recompute"]
    for layout, asked in configurations(options).items():
        config = fitted(resolve_device(asked, "cuda"), usable)
        lines.append(
            f"{layout:<30s} {peak_bytes(config) / GIB:6.1f} {planned_bubble(config):6.1%}  "
            f"{config.train.recompute}"
        )
    return "\n".join(lines)


def configurations(options: argparse.Namespace) -> dict[str, Config]:
    """The speed runs by layout, checked; nothing has been asked of this machine.

    Raises:
        ConfigError: all that is wrong with the flags of any run.
        ValueError: something is wrong with the other options.
    """
    if options.steps < 1 or options.loss_steps < 2:
        raise ValueError("--steps is at least 1, --loss-steps at least 2")
    if options.share_gpu and options.op != LOSSES:
        raise ValueError("--share-gpu goes with --op losses: ranks that share a GPU are slow")
    length = f"--steps {FIRST_TIMED - 1 + options.steps} --trace-steps {RECORDED}"
    found, problems = {}, []
    for layout in options.layouts:
        try:
            flags = f"{options.flags} {options.speed_flags} {length} {layout}"
            found[layout] = configuration(flags)
            configuration(f"{loss_flags(options)} {layout}")
            problems += [f"layout {layout}: {each}" for each in few(found[layout])]
        except ConfigError as error:
            problems += [f"layout {layout}: {each}" for each in error.violations]
    if problems:
        raise ConfigError(problems)
    return found


def few(config: Config) -> list[str]:
    """What is wrong with the number of micro-batches."""
    return list(filter(None, [too_few_micro_batches(config)]))


def loss_flags(options: argparse.Namespace) -> str:
    """Of all runs of the loss pass."""
    return f"{options.flags} {options.loss_flags} --steps {options.loss_steps}"


def prepared(options: argparse.Namespace) -> Bench:
    """The runs as they are on this machine.

    Raises:
        ConfigError, ValueError, OSError: they can't be measured.
    """
    asked = configurations(options)
    import torch

    from megalite.parallel.devices import choose_device, own_machine, require_kernels
    from megalite.planning.shared import USABLE

    usable = float("inf")
    if torch.cuda.is_available():
        usable = USABLE * torch.cuda.get_device_properties(0).total_memory
    if options.gpu_memory is not None:
        usable = options.gpu_memory * GIB
    runs, problems, kinds = {}, list[str](), set()
    for layout, config in asked.items():
        try:
            machine = own_machine(config.replace(tp=1, pp=1, dp=1) if options.share_gpu else config)
            device, _ = choose_device(config, machine)
            resolved = resolve_device(config, device)
            require_kernels(device, [resolved.train.precision], machine)
        except ConfigError as error:
            problems += [f"layout {layout}: {each}" for each in error.violations]
            continue
        kinds.add(device)
        runs[layout] = fitted(resolved, usable if device == "cuda" else float("inf"))
    if problems:
        raise ConfigError(problems)
    flags = loss_flags(options)
    gpus = torch.cuda.device_count() if kinds == {"cuda"} else 0
    alone = resolve_device(configuration(flags), "cuda" if gpus else "cpu")
    one_rank = "--offload-optimizer" if gpus and peak_bytes(alone) > usable else ""
    ranks = max(config.world_size for config in runs.values())
    device = devices("cuda" if gpus else "cpu", 1 if options.share_gpu else ranks)
    where = {
        **surroundings(options.commit, device),
        "flags": f"{options.flags} {options.speed_flags}",
        "loss_flags": flags,
        "timed_steps": str(options.steps),
    }
    return Bench(
        runs, flags, one_rank, gpus, options.share_gpu, RowTable(options.csv, where, Row, show)
    )


def measure_speed(bench: Bench) -> int:
    """Layouts without a good row, each in a start of its own; returns the worst exit code."""
    print(f"{LEGEND}\n{HEAD}", flush=True)
    there, worst = measured(bench.table.rows(), SPEED), 0
    for layout, config in bench.runs.items():
        if layout in there:
            print(show(there[layout]), flush=True)
            continue
        code = start(layout, config, bench.table)
        if code > 1:
            return code
        worst = max(worst, code)
        if code:
            why = "the ranks ended; see above"
            bench.table.add(Row(SPEED, layout, status=FAILED, note=why))
    return worst


def start(layout: str, config: Config, table: RowTable[Row]) -> int:
    """Start a layout's ranks, which add its row; returns their exit code."""
    from eight_gpus.speed import measure_layout

    from megalite.data.mixture import prepare_mixture
    from megalite.parallel.launch import Prepared, launch

    job = partial(measure_layout, case=layout, mixture=prepare_mixture(config.data), table=table)
    with tempfile.TemporaryDirectory(prefix="bench-eight-gpus-") as runs:
        return launch(Prepared(config.replace(runs=runs, name="speed"), job, {}))


def measure_losses(bench: Bench) -> int:
    """Runs without a good row; returns 1 if one failed."""
    print("\nlosses", flush=True)
    there, good = measured(bench.table.rows(), LOSSES), True
    for row in there.values():
        print(show(row), flush=True)
    flags = f"{bench.losses} {ALWAYS}"
    for group in agreement.ONE_RANK:
        if missing := [case for case in group if case not in there]:
            alone = f"{flags} {bench.one_rank}"
            side_by_side = bench.gpus > 1
            good &= agreement.measure_one_rank(
                bench.table, missing, alone, note=bench.one_rank, side_by_side=side_by_side
            )
    for layout in bench.runs:
        if layout not in there:
            ranks = sharing_ranks(layout) if bench.share else [{}]
            good &= agreement.measure_layout(bench.table, layout, flags, ranks)
    return 0 if good else 1


if __name__ == "__main__":
    end(main)
