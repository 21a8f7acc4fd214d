"""A line of the doctor's table. No torch import."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

OK, SLOWER, ABSENT, WARNING, BROKEN = "ok", "slower", "absent", "WARNING", "BROKEN"

WIDTH = 100


@dataclass(frozen=True)
class Row:
    """One component.

    Attributes:
        component: its name.
        state: `ok`; `slower` if something faster exists; `absent` if nothing needs it; `WARNING`
            if it is known to go wrong; `BROKEN` if ranks cannot run with it.
        runs: what will run.
        why: why not the faster one, or what is wrong.
        enable: the command that changes that.
    """

    component: str
    state: str
    runs: str
    why: str = ""
    enable: str = ""


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal; what a component lacks stands below it."""
    names = max(len(row.component) for row in rows)
    states = max(len(row.state) for row in rows)
    lines = []
    for row in rows:
        head = f"  {row.component:<{names}}  {row.state:<{states}}  "
        indent = " " * len(head)
        lines += _wrapped(row.runs, head, indent)
        if row.why:
            lines += _wrapped(row.why, indent, indent)
        if row.enable:
            lines.append(f"{indent}$ {row.enable}")
    return "\n".join(lines)


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
