"""One case: inputs, checks, rounds, and the lines that come of them."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Sequence

import torch

from kernel_bench.op import Op, size_text
from kernel_bench.problem import BOTH, STEP, Prepared, Problem, UnsupportedError, largest_error
from kernel_bench.rivals import LONGEST_COMPILATION_S, Rival
from kernel_bench.table import ABSENT, HOST, WRONG, Line
from kernel_bench.timing import Clock, Launch, TooLongError, host_us, limit

DTYPE = torch.bfloat16
COPY = "copy"
POISONED_BYTES = 4 << 30


def measure(
    op: Op, size: tuple[int, ...], direction: str, rivals: Sequence[Rival], clock: Clock
) -> list[Line]:
    """Check every contestant, then time those that are right, in rounds; the copy among them."""
    clock.new_row()
    settle(clock)
    floor = op.floor(size, direction).total
    start = Line(op.name, size_text(size), direction, "", floor_bytes=floor)
    check_size = op.check(size)
    problem: Problem | None = None
    timed: Problem | None = None
    lines: dict[str, Line] = {}
    launches: dict[str, Launch] = {}
    # Kept for as long as the launches: a graph reads the tensors that its call was made on.
    kept: list[Prepared] = []
    for rival in rivals:
        line = dataclasses.replace(start, contestant=rival.name)
        try:
            if problem is None or direction == STEP:
                problem = op.make(check_size, direction, clock.device, DTYPE)
            prepared, error, seconds = checked(op, problem, rival, clock)
            line = dataclasses.replace(
                line, error=error, note=prepared.note, compile_s=seconds if rival.compiles else None
            )
            if not error <= op.tolerance:
                lines[rival.name] = dataclasses.replace(line, status=WRONG)
                continue
            if check_size != size:
                timed = timed or op.make(size, direction, clock.device, DTYPE)
                prepared = rival.build(timed)
            with limit(LONGEST_COMPILATION_S if rival.compiles else 0):
                launch = clock.launch(prepared)
            memory = clock.peak_bytes(prepared)
            note = ", ".join(text for text in (prepared.note, launch.trouble) if text)
            lines[rival.name] = dataclasses.replace(line, memory_bytes=memory, note=note)
            launches[rival.name] = launch
            kept.append(prepared)
        except Exception as problem_of_theirs:
            lines[rival.name] = dataclasses.replace(
                line, status=ABSENT, note=reason(problem_of_theirs)
            )
            settle(clock)
    prepared = clock.copy(floor)
    launches[COPY] = clock.launch(prepared)
    times = clock.rounds(launches)
    copy_ms = times[COPY].median
    ours = times["ours"].median if "ours" in times else None
    lines[COPY] = dataclasses.replace(start, contestant=COPY)
    for name in times:
        ms, p20, p80 = times[name]
        lines[name] = dataclasses.replace(
            lines[name],
            ms=ms,
            p20=p20,
            p80=p80,
            copy_ms=copy_ms,
            ours=None if ours is None else ms / ours,
            tflops=op.flops(size) / ms * 1e-9 if op.flops and name != COPY else None,
        )
    return list(lines.values())


def checked(op: Op, problem: Problem, rival: Rival, clock: Clock) -> tuple[Prepared, float, float]:
    """A contestant ready to run, its largest error on this problem, seconds of its first call."""
    # A step works in place: what it should give is computed while its inputs are new.
    expected = list(op.expected(problem)) if problem.direction == STEP else op.expected(problem)
    clock.poison(POISONED_BYTES)
    begun = time.perf_counter()
    with limit(LONGEST_COMPILATION_S if rival.compiles else 0):
        prepared = rival.build(problem)
        if prepared.restore is not None:
            prepared.restore()
        results = prepared.run()
        clock.stream.synchronize()
        seconds = time.perf_counter() - begun
    error = largest_error(results, expected)
    del results
    if prepared.restore is not None:
        prepared.restore()
    return prepared, error, seconds


def measure_host(op: Op, rivals: Sequence[Rival], clock: Clock) -> list[Line]:
    """Host time of an eager forward + backward (or step) on small tensors."""
    size = op.parse(op.small)
    direction = BOTH if BOTH in op.directions else STEP
    start = Line(op.name, op.small, HOST, "")
    lines: dict[str, Line] = {}
    for rival in rivals:
        line = dataclasses.replace(start, contestant=rival.name)
        try:
            problem = op.make(size, direction, clock.device, DTYPE)
            with limit(LONGEST_COMPILATION_S if rival.compiles else 0):
                prepared = rival.build(problem)
                prepared.run()
            taken = host_us(prepared.run, clock.stream.synchronize)
            lines[rival.name] = dataclasses.replace(line, host_us=taken, note=prepared.note)
        except Exception as problem_of_theirs:
            lines[rival.name] = dataclasses.replace(
                line, status=ABSENT, note=reason(problem_of_theirs)
            )
            settle(clock)
    return list(host_ratios(lines).values())


def host_ratios(lines: dict[str, Line]) -> dict[str, Line]:
    """The lines with what each takes over torch, and over ours."""
    torch_us = lines["torch"].host_us if "torch" in lines else None
    ours = lines["ours"].host_us if "ours" in lines else None
    return {
        name: line
        if line.host_us is None
        else dataclasses.replace(
            line,
            over_torch_us=None if torch_us is None else line.host_us - torch_us,
            ours=None if ours is None else line.host_us / ours,
        )
        for name, line in lines.items()
    }


def reason(error: BaseException) -> str:
    """One line on why a contestant has no figure."""
    if isinstance(error, UnsupportedError | TooLongError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = str(error).strip().splitlines()
    cut_off = [line for line in text if TooLongError.TEXT in line]  # a compiler has wrapped it
    if cut_off:
        return cut_off[0][cut_off[0].index(TooLongError.TEXT) :]
    return f"{type(error).__name__}: {text[0][:100] if text else ''}"


def settle(clock: Clock) -> None:
    """After a contestant's failure: give its memory back."""
    gc.collect()
    torch.cuda.synchronize(clock.device)
    torch.cuda.empty_cache()
