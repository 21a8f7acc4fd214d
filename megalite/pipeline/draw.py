"""A simulated step as text. No torch import."""

from __future__ import annotations

from megalite.pipeline.actions import Op
from megalite.pipeline.simulate import Timeline

LEGEND = "3 is the forward of micro-batch 3, [3] its backward, · idle"


def draw_timeline(timeline: Timeline, unit: float = 1.0, width: int = 100) -> str:
    """One line per rank; see `LEGEND`.

    Args:
        timeline: of a simulated step.
        unit: time that is as wide as one micro-batch's number.
        width: characters; a longer picture is cut, with an ellipsis at the cut.
    """
    largest = max(span.action.micro_batch for span in timeline.spans)
    cell = len(str(largest)) + 1

    def column(time: float) -> int:
        return round(time / unit) * cell

    rows = [""] * timeline.num_ranks
    for span in timeline.spans:
        if len(rows[span.rank]) < width:
            row = rows[span.rank].ljust(column(span.start), "·")
            room = column(span.end) - column(span.start)
            rows[span.rank] = row + _label(span.action.op, span.action.micro_batch, room)
    end = min(width, column(timeline.makespan))
    lines = [f"rank {rank:<3d} {row.ljust(end, '·')}" for rank, row in enumerate(rows)]
    return "\n".join(line if len(line) <= width else line[: width - 1] + "…" for line in lines)


def _label(op: Op, micro_batch: int, room: int) -> str:
    if op is Op.FORWARD:
        return str(micro_batch).ljust(room)
    left, right = {Op.BACKWARD: "[]", Op.INPUT_GRADIENT: "()"}.get(op, "{}")
    return f"{left}{str(micro_batch).center(room - 2)}{right}"
