"""What the figures should be, and which of them are. No torch import."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from row_table import measured

from schedule_bench.case import ALONE
from schedule_bench.rows import Row

BUBBLE, PRESET, EXECUTOR = "bubble", "1b", "executor"
ZERO_BUBBLE = ("zb-h1", "zb-h2", "zb-v", "v-half", "v-min", "dualpipe-v")


@dataclass(frozen=True)
class Verdict:
    """One goal.

    Attributes:
        goal: in words.
        found: the figure.
        met: whether it is reached.
    """

    goal: str
    found: str
    met: bool

    def __str__(self) -> str:
        return f"{'met   ' if self.met else 'missed'}  {self.goal}: {self.found}"


def judge(rows: Iterable[Row]) -> list[Verdict]:
    """The goals for which there are figures."""
    rows = list(rows)
    return [
        *_bubble(measured(rows, BUBBLE)),
        *_preset(measured(rows, PRESET)),
        *_executor(measured(rows, EXECUTOR)),
    ]


def _bubble(rows: Mapping[str, Row]) -> Iterator[Verdict]:
    """Of a model whose stages take so long that the host does not matter."""
    for case, row in rows.items():
        assert row.ratio is not None and row.stage_ms is not None
        yield Verdict(f"{case}: stage >= 5 ms", f"{row.stage_ms:.2f} ms", row.stage_ms >= 5)
        off = abs(row.ratio - 1)
        yield Verdict(f"{case}: within 5% of the prediction", f"{row.ratio:.3f}", off <= 0.05)
    plain = rows.get("1f1b")
    if plain is not None:
        assert plain.bubble is not None and plain.bubble_of_1f1b is not None
        off = abs(plain.bubble - plain.bubble_of_1f1b)
        closed = f"{plain.bubble:.2%} for {plain.bubble_of_1f1b:.2%}"
        yield Verdict("1f1b: bubble within 2 points of (p-1)/(n+p-1)", closed, off <= 0.02)
    h1, v = rows.get("zb-h1"), rows.get("zb-v")
    if h1 is not None and plain is not None and plain.bubble:
        assert h1.bubble is not None
        left = h1.bubble / plain.bubble
        yield Verdict("zb-h1: at most half of 1f1b's bubble", f"{left:.2f} of it", left <= 0.5)
    if v is not None:
        assert v.bubble is not None
        yield Verdict("zb-v: bubble <= 2.5%", f"{v.bubble:.2%}", v.bubble <= 0.025)


def _preset(rows: Mapping[str, Row]) -> Iterator[Verdict]:
    """Tokens/s of each rank, as shares of what one rank does alone."""
    alone = rows.get(ALONE)
    if alone is None or not alone.tokens_per_s:
        return
    shares = {
        case: row.tokens_per_s / alone.tokens_per_s
        for case, row in rows.items()
        if case != ALONE and row.tokens_per_s
    }
    whole = {case: share for case, share in shares.items() if not has_halves(case)}
    halves = {case: share for case, share in shares.items() if has_halves(case)}
    for kind, found, floors in (
        ("whole layers", whole, None),
        ("half layers", halves, (0.92, 0.97)),
    ):
        plain = next((case for case in found if _name(case) == "1f1b"), None)
        bubble_free = [case for case in found if _name(case) in ZERO_BUBBLE]
        if plain is not None:
            yield _share_of_one(f"1f1b, {kind}", rows[plain], shares[plain], floors and floors[0])
        if bubble_free:
            best = max(bubble_free, key=shares.__getitem__)
            name = f"best zero-bubble ({best}), {kind}"
            yield _share_of_one(name, rows[best], shares[best], floors and floors[1])


def _share_of_one(name: str, row: Row, share: float, floor: float | None) -> Verdict:
    """Against a share of one rank alone; without one, against what balance and bubble allow."""
    if floor is not None:
        return Verdict(f"{name}: >= {floor:.0%} of one rank", f"{share:.1%}", share >= floor)
    assert row.cap is not None and row.bubble_of_1f1b is not None
    bound, what = row.cap, "cap"
    if _name(row.case) == "1f1b":
        bound, what = row.cap * (1 - row.bubble_of_1f1b), "cap x n/(n+p-1)"
    found = f"{share:.1%} of one rank, {share / bound:.1%} of {what}"
    return Verdict(f"{name}: >= 98% of {what}", found, share >= 0.98 * bound)


def _executor(rows: Mapping[str, Row]) -> Iterator[Verdict]:
    for case, row in rows.items():
        if row.action_us is not None:
            found = f"{row.action_us:.1f} us"
            yield Verdict(f"executor, {case}: < 20 us an action", found, row.action_us < 20)


def has_halves(case: str) -> bool:
    """Whether a case's stages begin or end inside a layer."""
    return ".5" in case.partition("@")[2]


def _name(case: str) -> str:
    return case.partition("@")[0].partition("/")[0]
