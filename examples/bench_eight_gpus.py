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
GPUs or, with `--device cpu` among the flags, on none:

    python examples/bench_eight_gpus.py --flags "--model 1b" --layouts "--tp 2" "--pp 2" "--dp 2"
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
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
from eight_gpus.rows import HEAD, LEGEND, LOSSES, SPEED, Row, show
from row_table import FAILED, RowTable, measured
from schedule_bench.case import FIRST_TIMED, RECORDED
from settings import sharing_ranks
from surroundings import devices, surroundings

from megalite.config import Config, resolve_device
from megalite.errors import ConfigError
from megalite.estimate import rank_estimates
from megalite.exit_codes import ExitCode
from megalite.program import end

GIB = 2**30
OFFLOADED = "--offload-optimizer"


@dataclass(frozen=True)
class Bench:
    """What is asked for, checked.

    Attributes:
        runs: of the speed op, by layout; each as it runs here.
        one_rank: flags of the one-rank cases of the loss op.
        losses: flags of the loss op, by layout.
        side_by_side: so many one-rank cases run at once; 0: on the CPU, one after the other.
        share: all ranks of the loss pass on the first GPU.
        table: of each op, with what is there already.
    """

    runs: Mapping[str, Config]
    one_rank: Mapping[str, str]
    losses: Mapping[str, str]
    side_by_side: int
    share: bool
    table: Mapping[str, RowTable[Row]]


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
        code = measure_speed(bench)
    if options.op in (LOSSES, None) and not is_stop(code):
        code = max(code, measure_losses(bench))
    if not is_stop(code):
        rows = [*bench.table[SPEED].rows(), *bench.table[LOSSES].rows()]
        print("\n" + "\n".join(map(str, goals.judge(rows))))
    return code


def is_stop(code: int) -> bool:
    """Whether somebody stopped a run: then the others are not wanted either."""
    return code == ExitCode.STOPPED or code >= 128


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
    made.add_argument("--gpu-memory", type=float, metavar="GIB", help="if not this machine's")
    made.add_argument("--plan", action="store_true", help="print what would run, and run nothing")
    made.add_argument("--csv", type=Path, default=Path("bench_eight_gpus.csv"), help="appended to")
    made.add_argument("--commit", help="for the CSV, where there is no checkout to ask")
    return made


def plan(options: argparse.Namespace) -> str:
    """Each layout's memory, and what follows from it.

    Raises:
        ConfigError, ValueError: something is wrong with the flags.
    """
    limit = usable_bytes(options)
    if limit == float("inf"):
        raise ValueError("--plan: this machine has no GPU; say what one has with --gpu-memory GIB")
    lines = [
        f"{'layout':<30s} {'GiB':>6s} {'bubble':>6s}  recompute (GPUs of {limit / GIB:.1f} GiB)"
    ]
    for layout, asked in configurations(options).items():
        config = fitted(resolve_device(asked, "cuda"), limit)
        fits = "" if peak_bytes(config) <= limit else ", and does not fit"
        lines.append(
            f"{layout:<30s} {peak_bytes(config) / GIB:6.1f} {planned_bubble(config):6.1%}  "
            f"{config.train.recompute}{fits}"
        )
    return "\n".join(lines)


def usable_bytes(options: argparse.Namespace) -> float:
    """What a run may take of a GPU's memory [bytes]; any amount without one."""
    import torch

    from megalite.planning.shared import USABLE

    if options.gpu_memory is not None:
        return USABLE * options.gpu_memory * GIB
    if torch.cuda.is_available():
        return USABLE * torch.cuda.get_device_properties(0).total_memory
    return float("inf")


def speed_flags(options: argparse.Namespace) -> str:
    """Of all runs of the speed op."""
    length = f"--steps {FIRST_TIMED - 1 + options.steps} --trace-steps {RECORDED}"
    return f"{options.flags} {options.speed_flags} {length} {ALWAYS}"


def loss_flags(options: argparse.Namespace) -> str:
    """Of all runs of the loss op."""
    return f"{options.flags} {options.loss_flags} --steps {options.loss_steps} {ALWAYS}"


def configurations(options: argparse.Namespace) -> dict[str, Config]:
    """The speed runs by layout, checked, as are those of losses; nothing has been asked of this
    machine.

    Raises:
        ConfigError: all that is wrong with the flags of any run.
        ValueError: something is wrong with the other options.
    """
    for name, least in (("steps", 1), ("loss_steps", 2)):
        if getattr(options, name) < least:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {getattr(options, name)}: at least {least}")
    if options.share_gpu and options.op != LOSSES:
        raise ValueError("--share-gpu goes with --op losses: ranks that share a GPU are slow")
    found, problems = {}, []
    for layout in options.layouts:
        try:
            runs = [
                configuration(f"{flags(options)} {layout}") for flags in (speed_flags, loss_flags)
            ]
            wrong = [each for run in runs for each in too_few_micro_batches(run)]
            found[layout] = runs[0]
        except ConfigError as error:
            wrong = error.violations
        problems += [f"layout {layout}: {each}" for each in dict.fromkeys(wrong)]
    if problems:
        raise ConfigError(problems)
    return found


def prepared(options: argparse.Namespace) -> Bench:
    """The runs as they are on this machine.

    Raises:
        ConfigError, ValueError, OSError: they can't be measured.
    """
    asked = configurations(options)
    import torch

    from megalite.parallel.devices import own_machine, require_kernels

    gpus, kinds = torch.cuda.device_count(), set[str]()
    problems = []
    for layout, config in asked.items():
        needed = 1 if options.share_gpu else config.world_size
        kind = "cpu" if config.parallel.device == "cpu" else "cuda"
        kinds.add(kind)
        if kind == "cuda" and gpus < needed:
            problems.append(
                f"layout {layout}: needs {needed} GPUs, and this machine shows {gpus}; choose "
                "others with --layouts, or put --device cpu among --flags"
            )
    if problems:
        raise ConfigError(problems)
    if len(kinds) > 1:
        raise ValueError("--layouts: some are on a CPU and some on GPUs")
    (kind,) = kinds
    limit = usable_bytes(options) if kind == "cuda" else float("inf")
    runs = {layout: fitted(resolve_device(c, kind), limit) for layout, c in asked.items()}
    first = next(iter(runs.values()))
    require_kernels(kind, [first.train.precision], own_machine(first.replace(tp=1, pp=1, dp=1)))
    flags = loss_flags(options)
    one_rank = {
        case: alone(f"{flags} {more}", kind, limit) for case, more in agreement.MORE.items()
    }
    where = surroundings(options.commit, devices(kind))
    if where["commit"] == "unknown":
        raise ValueError("--commit: needed where there is no checkout to ask, to find rows by")
    table = {
        op: RowTable(options.csv, {**where, "flags": of(options)}, Row, show)
        for op, of in ((SPEED, speed_flags), (LOSSES, loss_flags))
    }
    return Bench(
        runs=runs,
        one_rank=one_rank,
        losses={layout: f"{flags} {layout}" for layout in runs},
        side_by_side=together(list(one_rank.values()), gpus) if kind == "cuda" else 0,
        share=options.share_gpu,
        table=table,
    )


def alone(flags: str, kind: str, limit: float) -> str:
    """The flags of a one-rank run, with its optimizer's states in the host's memory if they do not
    fit into the GPU's."""
    fits = peak_bytes(resolve_device(configuration(flags), kind)) <= limit
    return flags if fits else f"{flags} {OFFLOADED}"


def together(flags: Sequence[str], gpus: int) -> int:
    """How many of some one-rank runs can go on side by side, by GPUs and the host's memory."""
    from megalite.parallel.machine import free_host_bytes

    configs = [resolve_device(configuration(each), "cuda") for each in flags]
    most = max(rank.host for config in configs for rank in rank_estimates(config))
    free = free_host_bytes()
    by_memory = len(flags) if not most or free is None else free // most
    return int(max(1, min(gpus, by_memory, len(flags))))


def measure_speed(bench: Bench) -> int:
    """Layouts without a good row, each in a start of its own, those that failed before at last;
    returns 1 if one failed, or the code of a stop."""
    print(f"{LEGEND}\n{HEAD}", flush=True)
    table, worst = bench.table[SPEED], 0
    there, tried = measured(table.rows(), SPEED), {row.case for row in table.rows()}
    for layout in sorted(bench.runs, key=lambda layout: layout in tried - there.keys()):
        config = bench.runs[layout]
        if layout in there and there[layout].recompute == config.train.recompute:
            print(show(there[layout]), flush=True)
            continue
        code = start(layout, config, table)
        if is_stop(code):
            return code
        if code:
            table.add(Row(SPEED, layout, status=FAILED, note=f"exit code {code}, see above"))
        worst = max(worst, int(layout not in measured(table.rows(), SPEED)))
    return worst


def start(layout: str, config: Config, table: RowTable[Row]) -> int:
    """Start a layout's ranks, which add its row; returns their exit code. The folder of a run that
    failed stays: if ranks hung, their stacks are in it."""
    from eight_gpus.speed import measure_layout

    from megalite.data.mixture import prepare_mixture
    from megalite.parallel.launch import Prepared, launch

    job = partial(measure_layout, case=layout, mixture=prepare_mixture(config.data), table=table)
    runs = tempfile.mkdtemp(prefix="bench-eight-gpus-")
    code = launch(Prepared(config.replace(runs=runs, name="speed"), job, {}))
    if code:
        print(f"{layout}: exit code {code}; its folder: {runs}", file=sys.stderr, flush=True)
    else:
        shutil.rmtree(runs)
    return code


def measure_losses(bench: Bench) -> int:
    """Runs without a good row; returns 1 if one failed."""
    print("\nlosses", flush=True)
    table = bench.table[LOSSES]
    there = measured(table.rows(), LOSSES)
    for row in there.values():
        print(show(row), flush=True)
    left = {case: flags for case, flags in bench.one_rank.items() if case not in there}
    notes = {case: OFFLOADED if OFFLOADED in flags else "" for case, flags in left.items()}
    good = agreement.measure_one_rank(table, left, notes, bench.side_by_side)
    for layout, flags in bench.losses.items():
        if layout not in there:
            ranks = sharing_ranks(layout) if bench.share else [{}]
            good &= agreement.measure_layout(table, layout, flags, ranks)
    return 0 if good else 1


if __name__ == "__main__":
    end(main)
