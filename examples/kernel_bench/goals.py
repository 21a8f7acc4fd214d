"""What the figures should be, as data, and which of them are.

The percentages and ratios are of one card's same run. "At least equal" is a ratio of EQUAL: the
medians of one kernel, measured twice, differ by up to 1%.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kernel_bench.problem import BACKWARD, BOTH, FORWARD, STEP
from kernel_bench.table import HOST, Line, good

EQUAL = 0.99
NOTHING = 1 << 20
"""Bytes that count as no extra memory: the losses of 8192 tokens take 32 KiB."""


class Ratio(NamedTuple):
    """The best of these rivals takes `factor` times our time at least."""

    rivals: tuple[str, ...]
    factor: float


class Goal(NamedTuple):
    """What a row should show.

    Args:
        op, direction: the rows.
        last: only sizes that end in one of these numbers; all if empty.
        percent: of a same-size copy, at least.
        ratios: against rivals.
        tflops: useful, at least.
        memory: "none", for no extra, or the rival whose peak ours must not exceed.
        over_torch_us: of host time, at most.
    """

    op: str
    direction: str
    last: tuple[int, ...] = ()
    percent: float | None = None
    ratios: tuple[Ratio, ...] = ()
    tflops: float | None = None
    memory: str = ""
    over_torch_us: float | None = None


class Verdict(NamedTuple):
    """One goal on one row.

    Args:
        row: op, size, direction.
        goal: what was asked, in words.
        found: the figure.
        met: None if it could not be told.
    """

    row: str
    goal: str
    found: str
    met: bool | None


EVERY = ("torch", "compile", "compile-max", "liger", "quack", "megatron", "apex")
NORM_RIVALS = ("liger", "quack", "compile-max")
HOST_OPS = (
    *("rms_norm", "add_rms_norm", "rope_half", "softmax_scaled", "softmax_causal", "swiglu"),
    *("cross_entropy", "linear_cross_entropy", "adamw"),
)


def _norm(op: str, both: float, both_2048: float) -> Iterable[Goal]:
    edges, middle = (2048, 16384), (1024, 4096, 8192)
    ahead, equal = (Ratio(NORM_RIVALS, 1.05),), (Ratio(NORM_RIVALS, EQUAL),)
    yield Goal(op, FORWARD, edges, 98, ahead)
    yield Goal(op, FORWARD, middle, 98, equal)
    yield Goal(op, BOTH, edges[:1], both_2048, ahead)
    yield Goal(op, BOTH, edges[1:], both, ahead)
    yield Goal(op, BOTH, middle, both, equal)


GOALS = (
    *_norm("rms_norm", 93, 85),
    *_norm("add_rms_norm", 95, 88),
    *(
        Goal(f"rope{form}_{layout}", BOTH, percent=96, ratios=(Ratio(EVERY, factor),))
        for form, factor in (("", 0.98), ("_packed", 1.3))
        for layout in ("half", "interleaved")
    ),
    Goal("softmax_scaled", FORWARD, (2048, 4096, 8192, 16384, 32768), 93),
    Goal("softmax_scaled", FORWARD, ratios=(Ratio(EVERY, EQUAL),)),
    Goal("softmax_scaled", BACKWARD, percent=90, ratios=(Ratio(EVERY, EQUAL),)),
    Goal("softmax_masked", BOTH, percent=90, ratios=(Ratio(EVERY, EQUAL),)),
    Goal(
        *("softmax_causal", BOTH, (), 85),
        ratios=(Ratio(("compile-max",), 1.5), Ratio(("megatron",), 8)),
    ),
    Goal("swiglu", BOTH, percent=99, ratios=(Ratio(("liger",), 0.99),), memory="liger"),
    Goal(
        *("cross_entropy", BOTH, (), 80),
        ratios=(Ratio(("quack",), 1.15), Ratio(("liger", "compile"), 1.4)),
        memory="none",
    ),
    Goal(
        *("vocab_parallel_cross_entropy", BOTH, (), 75),
        ratios=(Ratio(("megatron",), 3),),
        memory="none",
    ),
    Goal(
        *("linear_cross_entropy", BOTH),
        tflops=640,
        ratios=(Ratio(("compile",), 1), Ratio(("quack",), 1)),
        memory="liger",
    ),
    Goal("adamw", STEP, percent=92, ratios=(Ratio(("torch",), 1.15),)),
    *(Goal(op, HOST, ratios=(Ratio(EVERY, 1),), over_torch_us=60) for op in HOST_OPS),
)


def judge(lines: Sequence[Line], goals: Sequence[Goal] = GOALS) -> list[Verdict]:
    """Every goal on the rows that were measured."""
    rows: dict[tuple[str, str, str], dict[str, Line]] = {}
    for line in lines:
        rows.setdefault((line.op, line.size, line.direction), {})[line.contestant] = line
    verdicts = []
    for key, row in rows.items():
        op, size, direction = key
        for goal in goals:
            if (goal.op, goal.direction) != (op, direction):
                continue
            if goal.last and int(size.split("x")[-1]) not in goal.last:
                continue
            verdicts += _of_row(" ".join(key), goal, row)
    return verdicts


def _of_row(name: str, goal: Goal, row: dict[str, Line]) -> Iterable[Verdict]:
    ours = row.get("ours")
    if ours is None or not good(ours):
        yield Verdict(name, "ours is measured", ours.note if ours else "not run", None)
        return
    floors = (
        (goal.percent, ours.percent_of_copy, "{:g}% of a copy", "{:.1f}%"),
        (goal.tflops, ours.tflops, "{:g} TFLOP/s", "{:.0f}"),
    )
    for asked, found, words, figure in floors:
        if asked is not None and found is not None:
            yield Verdict(name, words.format(asked), figure.format(found), found >= asked)
    for ratio in goal.ratios:
        yield _against(name, ratio, row, ours)
    if goal.memory:
        yield _memory(name, goal.memory, row, ours)
    if goal.over_torch_us is not None and ours.over_torch_us is not None:
        words = f"at most {goal.over_torch_us:g} us over torch"
        met = ours.over_torch_us <= goal.over_torch_us
        yield Verdict(name, words, f"{ours.over_torch_us:.1f} us", met)


def _against(name: str, ratio: Ratio, row: dict[str, Line], ours: Line) -> Verdict:
    times = {
        rival: line.ms if line.host_us is None else line.host_us
        for rival in ratio.rivals
        if (line := row.get(rival)) is not None and good(line)
    }
    words = f"{ratio.factor:g} x the best of {', '.join(ratio.rivals)}"
    if not times:
        return Verdict(name, words, "none of them measured", None)
    best = min(times, key=lambda rival: times[rival])
    found = times[best] / (ours.ms if ours.host_us is None else ours.host_us)
    return Verdict(name, words, f"{found:.3f} x {best}", found >= ratio.factor)


def _memory(name: str, rival: str, row: dict[str, Line], ours: Line) -> Verdict:
    limit, words = NOTHING, "no extra memory"
    if rival != "none":
        words = f"memory at most {rival}'s"
        line = row.get(rival)
        if line is None or line.memory_bytes is None:
            return Verdict(name, words, "not measured", None)
        limit = line.memory_bytes
    taken = ours.memory_bytes
    if taken is None:
        return Verdict(name, words, "not measured", None)
    return Verdict(name, words, f"{taken / 1e6:.1f} MB, limit {limit / 1e6:.1f}", taken <= limit)


def summary(verdicts: Sequence[Verdict]) -> list[str]:
    """Lines: how many are met, then the ones that aren't and the ones that can't be told."""
    met = [verdict for verdict in verdicts if verdict.met]
    lines = [f"goals met: {len(met)} of {len(verdicts)}"]
    for title, kind in (("missed", False), ("not told", None)):
        lines += [
            f"  {title}: {verdict.row}: {verdict.goal}; found {verdict.found}"
            for verdict in verdicts
            if verdict.met is kind
        ]
    return lines
