"""The memory that each pipeline schedule keeps against the time it wastes: a table and a picture.

python examples/plot_schedules.py > schedules.md
python examples/plot_schedules.py --costs input=1.1,weight=0.7,message=0.02 --svg unequal.svg

Simulated, so no GPU is needed; five sizes up to 64 ranks take a minute or two. The table of
docs/schedules.md and its picture come from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megalite.pipeline.schedules import SCHEDULES
from megalite.pipeline.times import read_times
from megalite.plan import Figures, figures, planned
from megalite.preprocessing.flags import Flag, end, read_flags, together

RANKS = (4, 8, 16, 32, 64)
COLOURS = ("#7f7f7f", "#1f77b4", "#17becf", "#ff7f0e", "#d62728", "#2ca02c", "#98df8a", "#bcbd22",
           "#9467bd")  # fmt: skip
WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 60, 600, 30, 400

FLAGS = (
    Flag("--per-rank", "Micro-batches of a step for each pipeline rank.", 4, metavar="COUNT"),
    Flag("--costs", "Times of one micro-batch on a rank, as of megalite.plan.",
         "forward=1,input=1,weight=1,message=0", metavar="NAME=TIME,..."),
    Flag("--svg", "Write the picture to this file.", metavar="FILE"),
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Print the table, write the picture; returns the exit code."""
    values, problems = read_flags(
        argv, FLAGS, prog="plot_schedules.py", description=__doc__ or ""
    )  # fmt: skip
    if values["per_rank"] < 1:
        problems.append(f"--per-rank {values['per_rank']} must be above 0")
    if values["svg"] and not Path(values["svg"]).parent.is_dir():
        problems.append(f"--svg {values['svg']}: there is no folder {Path(values['svg']).parent}")
    times = together(problems, lambda: read_times(values["costs"]))
    found = {
        (name, ranks): figures(planned(name, ranks, values["per_rank"] * ranks, times), times)
        for name in SCHEDULES
        for ranks in RANKS
    }
    print(markdown(found))
    if values["svg"]:
        heading = f"{values['per_rank']} micro-batches for each of 4 to 64 ranks"
        Path(values["svg"]).write_text(picture(found, heading), encoding="utf-8")
    return 0


def markdown(found: Mapping[tuple[str, int], Figures]) -> str:
    """Bubble and peak activations of every schedule and number of ranks."""
    lines = [
        "| schedule | " + " | ".join(f"pp {ranks}" for ranks in RANKS) + " |",
        "|---" * (len(RANKS) + 1) + "|",
    ]
    for name in SCHEDULES:
        cells = [found[name, ranks] for ranks in RANKS]
        shown = (f"{cell.bubble:.1%}, {cell.peak:.4g}" for cell in cells)
        lines.append(f"| `{name}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def picture(found: Mapping[tuple[str, int], Figures], heading: str) -> str:
    """An SVG: across, what a rank keeps as a share of 1F1B's; up, the bubble."""
    most_kept = max(cell.peak / ranks for (_, ranks), cell in found.items())
    most_idle = max(cell.bubble for cell in found.values())

    def place(cell: Figures, ranks: int) -> tuple[float, float]:
        across = LEFT + (RIGHT - LEFT) * cell.peak / ranks / (1.05 * most_kept)
        return across, BOTTOM - (BOTTOM - TOP) * cell.bubble / (1.1 * most_idle)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text((LEFT + RIGHT) / 2, 18, f"{heading}: a larger dot has more ranks"),
        _text((LEFT + RIGHT) / 2, BOTTOM + 40, "peak activations of a rank, as a share of 1F1B's"),
        f'<g transform="rotate(-90)">{_text(-(TOP + BOTTOM) / 2, 16, "bubble")}</g>',
        f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="black"/>',
    ]
    for tick in range(1, int(1.05 * most_kept * 2) + 1):
        x = LEFT + (RIGHT - LEFT) * tick / 2 / (1.05 * most_kept)
        parts += [_line(x, BOTTOM, x, BOTTOM + 5), _text(x, BOTTOM + 20, f"{tick / 2:g}")]
    for percent in range(0, int(110 * most_idle) + 1, 5):
        y = BOTTOM - (BOTTOM - TOP) * percent / 100 / (1.1 * most_idle)
        parts += [_line(LEFT - 5, y, LEFT, y), _text(LEFT - 22, y + 4, f"{percent}%")]
    for number, name in enumerate(SCHEDULES):
        points = [place(found[name, ranks], ranks) for ranks in RANKS]
        colour = COLOURS[number % len(COLOURS)]
        track = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{track}" fill="none" stroke="{colour}"/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2.5 + size}" fill="{colour}" opacity="0.75"/>'
            for size, (x, y) in enumerate(points)
        ]
        legend = TOP + 20 + 22 * number
        parts.append(f'<circle cx="{RIGHT + 25}" cy="{legend}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{RIGHT + 38}" y="{legend + 4}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{words}</text>'


def _line(x: float, y: float, other_x: float, other_y: float) -> str:
    return f'<path d="M{x:.1f} {y:.1f}L{other_x:.1f} {other_y:.1f}" stroke="black"/>'


if __name__ == "__main__":
    end(main)
