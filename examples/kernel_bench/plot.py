"""A picture of a CSV: for each op and direction, % of a same-size copy by size and contestant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kernel_bench.table import MEASURED

COLUMNS = 3
INCHES = (6.0, 4.0)
"""Of one panel."""


def plot(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Write the picture of the newest figure of each contestant on each case.

    Raises:
        ValueError: no row has a figure to draw.
        ImportError: matplotlib is missing (extra `bench`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = collect(rows)
    if not panels:
        raise ValueError("the CSV holds no times to draw")
    across = min(COLUMNS, len(panels))
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(INCHES[0] * across, INCHES[1] * down), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, ((op, direction), contestants) in zip(axes.flat, panels.items(), strict=False):
        sizes = sorted({size for values in contestants.values() for size in values}, key=_numbers)
        for name, values in contestants.items():
            places = [i for i, size in enumerate(sizes) if size in values]
            heights = [values[sizes[i]] for i in places]
            style = {"linewidth": 2.5, "color": "black"} if name == "ours" else {}
            axis.plot(places, heights, marker="o", markersize=4, label=name, **style)
        axis.set_xticks(range(len(sizes)), sizes, rotation=20, fontsize=7)
        axis.set_title(f"{op}, {direction}", fontsize=10)
        axis.set_ylabel("% of a same-size copy")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def collect(rows: Sequence[dict[str, str]]) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """(op, direction) to contestant to size to percent; later rows replace earlier ones."""
    panels: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["status"] != MEASURED or not row["percent_of_copy"]:
            continue
        if row["contestant"] == "copy":
            continue
        panel = panels.setdefault((row["op"], row["direction"]), {})
        panel.setdefault(row["contestant"], {})[row["size"]] = float(row["percent_of_copy"])
    return panels


def _numbers(size: str) -> tuple[int, ...]:
    return tuple(map(int, size.split("x")))
