"""Times of megalite's kernels beside their rivals', on one GPU in one run.

    python examples/bench_kernels.py --table                    the rows of the goals, and host time
    python examples/bench_kernels.py --table --part 1/2         half of them, for a short lease
    python examples/bench_kernels.py --op rms_norm              an op's full sweep
    python examples/bench_kernels.py --op softmax_causal --sizes 16x4096x4096 8x8192x8192
    python examples/bench_kernels.py --op cross_entropy --rivals ours,liger,quack
    python examples/bench_kernels.py --op host                  host time of every op
    python examples/bench_kernels.py --op vocab_parallel_cross_entropy    needs 2 GPUs
    python examples/bench_kernels.py --plot figures.png         a picture of what the CSV holds
    python examples/bench_kernels.py --list                     ops, sizes, contestants

bf16; medians of 20 replays of a CUDA graph, each after a flush of the cache, contestants in turn.
Every contestant is first checked on fresh random inputs against fp64; a wrong one is not timed.
"% copy" is floor bytes / time, over the GB/s of a copy_ that reads and writes as many bytes under
the same flush and replay; "% 3016" is of the H100's copy ceiling, in GB/s. Rivals that are not
installed are named and left out: pip install liger-kernel quack-kernels megatron-core. A rival
whose compilation takes over 45 s is cut off, and its line says so.

Each row is printed and appended to the CSV as soon as it is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from kernel_bench import cases_loss, cases_rows, goals, rivals, table, vocab_parallel
from kernel_bench.op import Op
from surroundings import surroundings

if TYPE_CHECKING:
    from kernel_bench.rivals import Rival
    from kernel_bench.table import Line
    from kernel_bench.timing import Clock

OPS = (*cases_rows.OPS, *cases_loss.OPS)
HOST = table.HOST
TUNED_IN_TABLE = ("rms_norm", "add_rms_norm", "softmax_causal")
"""Where the goals name max-autotune; the other rows of --table compile in the default mode."""


class UsageError(Exception):
    """What was asked for makes no sense; the text says why and what would."""


class Case(NamedTuple):
    """A row to measure.

    Args:
        op: the name; of host time, of the op whose time it is.
        size: numbers; empty for host time.
        direction: forward, backward, both, a step, or host.
    """

    op: str
    size: tuple[int, ...]
    direction: str


class Recorder:
    """Prints each row, appends it to the CSV, and keeps it for the summary.

    Args:
        csv: where to.
        where: date, commit, card: the first columns.
        versions: of contestants.
    """

    def __init__(self, csv: Path, where: dict[str, str], versions: dict[str, str]):
        self.lines: list[Line] = []
        self._csv = csv
        self._where = where
        self._versions = versions

    def __call__(self, lines: Sequence[Line]) -> None:
        """Take a row's lines, one for each contestant."""
        first = lines[0]
        host = first.direction == HOST
        print(f"\n{first.op} {first.size} {first.direction}")
        print(table.HOST_HEAD if host else table.HEAD)
        for line in lines:
            print(table.show(line))
        sys.stdout.flush()
        rows = []
        for line in lines:
            where = self._where | {"version": self._versions.get(line.contestant, "")}
            rows.append(table.record(line, where))
        table.append(self._csv, rows)
        self.lines += lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 2 for what can't be measured, else 0."""
    options = parser().parse_args(arguments)
    try:
        run(options)
    except UsageError as error:
        print(f"bench_kernels.py: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--table", action="store_true", help="exactly the rows that have goals")
    made.add_argument("--part", metavar="K/N", help="only the K-th of N parts of --table")
    made.add_argument("--op", help="one op (see --list), or 'host'")
    made.add_argument("--sizes", nargs="+", metavar="SIZE", help="of --op; its sweep if left out")
    made.add_argument("--rivals", metavar="NAME,NAME", help="contestants; all if left out")
    made.add_argument("--csv", type=Path, default=Path("bench_kernels.csv"), help="appended to")
    made.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the CSV, at the end")
    made.add_argument("--commit", help="for the CSV, where there is no checkout to ask")
    made.add_argument("--list", action="store_true", help="ops, sizes, contestants; then stop")
    return made


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks.

    Raises:
        UsageError: it can't be done.
    """
    names = rival_names(options.rivals)
    if options.list:
        print(listing(names))
        return
    cases = chosen(options)
    if not cases and options.plot is None:
        raise UsageError("say what to measure: --table, or --op NAME; --list names the ops")
    if cases:
        measure_cases(cases, names, options)
    if options.plot is not None:
        draw(options.csv, options.plot)


def rival_names(text: str | None) -> tuple[str, ...]:
    """Contestants asked for."""
    if text is None:
        return rivals.NAMES
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in rivals.NAMES]
    if unknown or not names:
        raise UsageError(
            f"--rivals: {', '.join(unknown) or 'no name'}; choose of {', '.join(rivals.NAMES)}"
        )
    return names


def chosen(options: argparse.Namespace) -> list[Case]:
    """The rows asked for, in order."""
    if options.table and options.op:
        raise UsageError("--table measures its own rows; leave out --op, or --table")
    if options.part and not options.table:
        raise UsageError("--part goes with --table")
    if options.sizes and (not options.op or options.op == HOST):
        raise UsageError("--sizes goes with --op NAME")
    if options.table:
        return part(table_cases(), options.part)
    if options.op is None:
        return []
    if options.op == HOST:
        return host_cases()
    if options.op == vocab_parallel.NAME:
        sizes = options.sizes or vocab_parallel.TABLE
        return [Case(options.op, vocab_parallel_size(size), vocab_parallel.BOTH) for size in sizes]
    op = op_named(options.op)
    try:
        sizes = [op.parse(text) for text in options.sizes or op.sweep]
    except ValueError as error:
        raise UsageError(str(error)) from None
    return [Case(op.name, size, direction) for size in sizes for direction in op.directions]


def op_named(name: str) -> Op:
    """The op of that name."""
    for op in OPS:
        if op.name == name:
            return op
    names = (*(op.name for op in OPS), vocab_parallel.NAME, HOST)
    raise UsageError(f"--op: no {name!r}; choose of {', '.join(names)}")


def vocab_parallel_size(text: str) -> tuple[int, ...]:
    """The numbers of a size such as "8192x32000", which ranks can share out."""
    words = text.lower().split("x")
    if len(words) == 2 and all(word.isdigit() and int(word) for word in words):
        size = tuple(map(int, words))
        if size[0] % vocab_parallel.BATCH == 0 and size[1] % vocab_parallel.GPUS == 0:
            return size
    raise UsageError(
        f"{vocab_parallel.NAME}: {text!r} is not a size; it is {vocab_parallel.FORM}, both even, "
        f"for instance {vocab_parallel.TABLE[0]}"
    )


def table_cases() -> list[Case]:
    """Every row that has a goal."""
    cases = [
        Case(op.name, op.parse(size), direction)
        for op in OPS
        for size, directions in op.table
        for direction in directions
    ]
    parallel = [
        Case(vocab_parallel.NAME, vocab_parallel_size(size), vocab_parallel.BOTH)
        for size in vocab_parallel.TABLE
    ]
    return cases + host_cases() + parallel


def host_cases() -> list[Case]:
    """Host time of the ops that have a goal for it."""
    return [Case(name, (), HOST) for name in goals.HOST_OPS]


def part(cases: list[Case], text: str | None) -> list[Case]:
    """The K-th of N parts, each with rows of every kind; all without a text."""
    if text is None:
        return cases
    words = text.split("/")
    if len(words) == 2 and all(word.isdigit() for word in words):
        which, of = map(int, words)
        if 1 <= which <= of:
            return [case for i, case in enumerate(cases) if i // 2 % of == which - 1]
    raise UsageError(f"--part: {text!r} is not K/N with 1 <= K <= N, for instance 1/2")


def listing(names: Sequence[str]) -> str:
    """Ops with the form of their sizes, and contestants."""
    lines = ["op: sizes; those of --table; directions"]
    for op in OPS:
        sizes = " ".join(size for size, _ in op.table)
        lines.append(f"  {op.name}: {op.form}; {sizes}; {' '.join(op.directions)}")
    sizes = " ".join(vocab_parallel.TABLE)
    lines.append(f"  {vocab_parallel.NAME}: {vocab_parallel.FORM}; {sizes}; 2 GPUs")
    lines.append(f"  {HOST}: host time of {' '.join(goals.HOST_OPS)}")
    here, absent = rivals.found(names)
    lines.append("contestants")
    lines += [f"  {rival.name} {rival.version}".rstrip() for rival in here]
    lines += [f"  {name}: absent: {why}" for name, why in absent.items()]
    return "\n".join(lines)


def measure_cases(cases: Sequence[Case], names: Sequence[str], options: argparse.Namespace) -> None:
    """Measure the rows one after the other; then the goals met and missed."""
    if not torch.cuda.is_available():
        raise UsageError("needs a CUDA device, and torch sees none")
    from kernel_bench.timing import Clock

    here, absent = rivals.found(names)
    for name, why in absent.items():
        print(f"absent: {name}: {why}")
    versions = {rival.name: rival.version for rival in here}
    where = first_columns(options.commit)
    recorder = Recorder(options.csv, where, versions)
    check_csv(options.csv, where)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(", ".join(f"{name} {version}".rstrip() for name, version in versions.items()), flush=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    clock = Clock(torch.device("cuda", torch.cuda.current_device()))
    with torch.cuda.stream(clock.stream):
        for case in cases:
            if case.op != vocab_parallel.NAME:
                one_case(case, taking_part(here, case.op, options.table), clock, recorder)
    sizes = [case.size for case in cases if case.op == vocab_parallel.NAME]
    if sizes:
        try:
            vocab_parallel.measure_all(sizes, names, recorder)
        except RuntimeError as error:
            if len(sizes) == len(cases):
                raise UsageError(str(error)) from None
            print(f"\n{error}")
    print()
    print("\n".join(goals.summary(goals.judge(recorder.lines))), flush=True)


def one_case(case: Case, here: Sequence[Rival], clock: Clock, recorder: Recorder) -> None:
    """Measure a row on one GPU and record it."""
    from kernel_bench.measure import measure, measure_host

    op = op_named(case.op)
    if case.direction == HOST:
        recorder(measure_host(op, here, clock))
    else:
        recorder(measure(op, case.size, case.direction, here, clock))


def taking_part(here: Sequence[Rival], op: str, in_table: bool) -> list[Rival]:
    """The contestants of a row; --table compiles in one mode only."""
    if not in_table:
        return list(here)
    left_out = "compile" if op in TUNED_IN_TABLE else "compile-max"
    return [rival for rival in here if rival.name != left_out]


def check_csv(path: Path, where: dict[str, str]) -> None:
    """Raise UsageError now rather than after the first row."""
    try:
        if path.exists() and path.stat().st_size:
            blank = table.Line("", "", "", "")
            table.check_columns(path, list(table.record(blank, where | {"version": ""})))
        with path.open("a", encoding="utf-8"):
            pass
    except (OSError, ValueError) as error:
        raise UsageError(f"--csv: {error}") from None


def first_columns(of_commit: str | None) -> dict[str, str]:
    """Of the CSV: date, commit, card and versions."""
    import triton

    where = surroundings(of_commit, torch.cuda.get_device_name())
    versions = {"torch": where["torch"], "triton": triton.__version__}
    return {"date": where["date"], "commit": where["commit"], "card": where["device"], **versions}


def draw(csv: Path, picture: Path) -> None:
    """The CSV's figures as a picture."""
    from kernel_bench.plot import plot

    try:
        plot(table.read(csv), picture)
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'megalite[bench]'") from None
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--plot: {error}") from None
    print(f"wrote {picture}")


if __name__ == "__main__":
    sys.exit(main())
