"""Pipeline schedules on this machine's GPUs, measured against what was planned.

    python examples/bench_schedules.py                               all of it, on 2 ranks
    python examples/bench_schedules.py --op bubble --pp 4
    python examples/bench_schedules.py --op bubble --cases 1f1b zb-h2 v-half interleaved/4
    python examples/bench_schedules.py --op 1b --cases one-rank 1f1b@8.5,7.5 auto
    python examples/bench_schedules.py --op executor                 on any machine

A case is NAME[/CHUNKS][@LAYERS]: a schedule, stages of a rank, layers of each stage. All cases of
an op run in one start of the ranks, one after the other. Each row is appended to the CSV as soon as
it is measured, and cases with a row are not measured again, so a command that was cut off goes on
where it was when it is given again. One that fails gets a row that says so; the next ones are
measured in a new start.

bubble    Measured step against the simulator's prediction by the stage times of the same run; the
          bubble, and what it is made of. The default model has 8 layers of hidden size 4096, ffn
          14336, 8 kv heads, so 218 M parameters each; a vocabulary so small that the head costs
          nothing; 4 samples of 1024 tokens a micro-batch, 16 of them. Two layers, which is a stage
          where 2 ranks have 2 each, take 2 x 2 x 218 M x 4096 = 3.6 TFLOP in forward, and twice
          that in backward: at the 650 TFLOP/s that large products reach on an H100, 5.5 ms and 11.
1b        Tokens/s of each rank of the preset 1b at sequence 4096, beside one rank alone
          (`one-rank`, measured on the first one while the others wait).
executor  The executor's own host time for a computation, without stages and autograd; and what the
          host needs for a call that sends or receives.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from schedule_bench import rows
from schedule_bench.case import ALONE, FIRST_TIMED, RECORDED, Case
from schedule_bench.goals import BUBBLE, EXECUTOR, PRESET, judge
from surroundings import devices, surroundings

from megalite import cli
from megalite.check import check
from megalite.config import Config, resolve_device
from megalite.errors import ConfigError
from megalite.pretrain import PROGRAM
from megalite.program import checked, end

if TYPE_CHECKING:
    from megalite.parallel.launch import Prepared

ALWAYS = "--mock-data --eval-steps 0 --sample-length 0 --no-save-weights"


@dataclass(frozen=True)
class Op:
    """A part of the benchmark.

    Attributes:
        flags: of `megalite.pretrain`: the model and its batch.
        cases: measured if none are named, on 2 ranks.
    """

    flags: str
    cases: tuple[str, ...]


FIVE = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")
OPS = {
    BUBBLE: Op(
        "--model llama3-8b --num-layers 8 --vocab-size 1024 --seq-length 1024 "
        "--micro-batch-size 4 --global-batch-size 64",
        FIVE,
    ),
    PRESET: Op(
        "--model 1b --seq-length 4096 --micro-batch-size 2 --global-batch-size 32",
        (
            *(ALONE, "1f1b@8,8", "zb-h1@8,8", "zb-h2@8,8", "zb-v@4,4,4,4"),
            *("1f1b@8.5,7.5", "zb-h1@8.5,7.5", "zb-h2@8.5,7.5", "zb-v@4,4.5,4,3.5", "auto"),
        ),
    ),
    EXECUTOR: Op("--model tiny --micro-batch-size 1 --global-batch-size 16", FIVE),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured, 1 a case failed, 2 bad input, 128 + signal when stopped."""
    options = parser().parse_args(arguments)
    try:
        return run(options)
    except ConfigError as error:
        print(error.message(), file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"bench_schedules.py: {error}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--op", choices=OPS, help="all if left out")
    made.add_argument("--pp", type=int, default=2, help="pipeline ranks, all of this machine")
    made.add_argument("--cases", nargs="+", metavar="CASE", help="of --op; see above")
    made.add_argument("--flags", help="of megalite.pretrain, in place of the model of --op")
    made.add_argument("--steps", type=int, default=5, help="timed steps of each case")
    made.add_argument("--csv", type=Path, default=Path("bench_schedules.csv"), help="appended to")
    made.add_argument("--commit", help="for the CSV, where there is no checkout to ask")
    return made


def run(options: argparse.Namespace) -> int:
    """Measure what is asked for and not in the CSV yet.

    Raises:
        ConfigError, ValueError, OSError: it can't be measured.
    """
    if options.op is None and (options.cases or options.flags):
        raise ValueError(f"--cases and --flags go with --op: one of {', '.join(OPS)}")
    if options.steps < 1:
        raise ValueError(f"--steps {options.steps}: at least 1")
    chosen = [options.op] if options.op else list(OPS)
    if options.op is None and options.pp != 2:
        # Its layers are those of 2 ranks.
        chosen.remove(PRESET)
    code = 0
    found: list[rows.Row] = []
    for op in chosen:
        cases = [Case.parse(text) for text in options.cases or OPS[op].cases]
        config = configuration(options.flags or OPS[op].flags, options.pp, options.steps, cases)
        table = rows.Table(options.csv, first_columns(options, op, config))
        code = max(code, measure(op, cases, config, table))
        found += table.rows()
        if code > 1:
            break
    print("\n" + "\n".join(map(str, judge(found))))
    return code


def configuration(flags: str, pp: int, steps: int, cases: Sequence[Case]) -> Config:
    """The run that all cases are variants of, with its device.

    Raises:
        ConfigError: all that is wrong with the flags, or with a case.
    """
    length = f"--steps {FIRST_TIMED - 1 + steps} --trace-steps {RECORDED}"
    words = f"{flags} {ALWAYS} {length} --pp {pp}".split()
    command = cli.parse(words, prog="", description="", switches=PROGRAM.switches)
    config = checked(command, None)
    problems: list[str] = []
    for case in cases:
        try:
            check(case.of(config))
        except ConfigError as error:
            problems += [f"case {case}: {each}" for each in error.violations]
        except KeyError:
            problems.append(f"case {case}: no such schedule")
    if problems:
        raise ConfigError(problems)
    from megalite.parallel.devices import choose_device, own_machine, require_kernels

    machine = own_machine(config)
    device, _ = choose_device(config, machine)
    require_kernels(device, [resolve_device(config, device).train.precision], machine)
    return resolve_device(config, device)


def measure(op: str, cases: Sequence[Case], config: Config, table: rows.Table) -> int:
    """Start the ranks for the cases without a row; again for those after one that fails."""
    names = {str(case): case for case in cases}
    print(f"\n{op}: {config.parallel.pp} ranks, {config.num_micro_batches} micro-batches")
    there = [row for row in table.rows() if row.op == op and row.case in names]
    if op != EXECUTOR:
        print(f"{rows.LEGEND}\n{rows.HEAD}")
    for row in there:
        print(rows.show(row))
    sys.stdout.flush()
    failed = any(row.status == rows.FAILED for row in there)
    while todo := rows.missing(table.rows(), op, names):
        code = start(op, [names[name] for name in todo], config, table)
        left = rows.missing(table.rows(), op, names)
        if code == 0:
            break
        if code != 1 or not left:
            return code
        failed = True
        why = "the ranks ended; see above"
        table.add(rows.Row(op=op, case=left[0], status=rows.FAILED, note=why))
    return int(failed)


def start(op: str, cases: Sequence[Case], config: Config, table: rows.Table) -> int:
    """Start the ranks once; returns their exit code."""
    from megalite.parallel.launch import launch

    with tempfile.TemporaryDirectory(prefix="bench-schedules-") as runs:
        return launch(prepared(op, cases, config.replace(runs=runs), table))


def prepared(op: str, cases: Sequence[Case], config: Config, table: rows.Table) -> Prepared:
    """What the ranks run."""
    from schedule_bench import ranks

    from megalite.data.mixture import prepare_mixture
    from megalite.parallel.launch import Prepared

    if op == EXECUTOR:
        count = config.num_micro_batches
        job = partial(ranks.measure_executor, op=op, cases=cases, count=count, rows=table)
    else:
        mixture = prepare_mixture(config.data)
        job = partial(ranks.measure_cases, op=op, cases=cases, mixture=mixture, rows=table)
    return Prepared(config, job, {})


def first_columns(options: argparse.Namespace, op: str, config: Config) -> dict[str, str]:
    """Of the CSV."""
    where = surroundings(options.commit, devices(config.parallel.device, options.pp))
    flags = options.flags or OPS[op].flags
    return {**where, "flags": flags, "timed_steps": str(options.steps)}


if __name__ == "__main__":
    end(main)
