"""AdamW and Muon on the embedded corpus: losses side by side, in a table and in a picture.

python examples/compare_optimizers.py --svg docs/optimizers.svg > table.md
python examples/compare_optimizers.py --rates 2e-3 8e-3 --steps 400

The same small model is trained from the same weights on the same samples with each optimizer and
each peak learning rate: which one is best is not known before, nor need it be the same for both.
The losses are those of the held-out text. Some minutes on a CPU core; docs/optimizers.md has the
table, the picture and what they show.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from megalite import pretrain
from megalite.errors import ConfigError
from megalite.preprocessing.flags import Flag, end, read_flags

COLOURS = {"adamw": "#1f77b4", "muon": "#d62728"}
DASHES = ("2 3", "8 4", "none", "12 3 2 3")
EVALUATIONS = 15
WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 60, 590, 30, 400

FLAGS = (
    Flag("--steps", "Optimizer steps of each run.", 120, metavar="STEPS"),
    Flag("--batch", "Samples of a step.", 8, metavar="SAMPLES"),
    Flag("--rates", "Peak learning rates.", ("1e-3", "4e-3", "1.6e-2"), metavar="X"),
    Flag("--seed", "Of weights and data order.", 1234, metavar="N"),
    Flag("--svg", "Write the picture to this file.", metavar="FILE"),
)

Curve = list[tuple[int, float]]
"""(step, loss on the held-out text [nats per token])."""
Curves = Mapping[tuple[str, str], Curve]
"""By optimizer and learning rate."""


def main(argv: Sequence[str]) -> int:
    """Train, print the table, write the picture; returns the exit code."""
    values, problems = read_flags(
        argv, FLAGS, prog="compare_optimizers.py", description=__doc__ or ""
    )  # fmt: skip
    if values["steps"] < EVALUATIONS:
        problems.append(f"--steps {values['steps']} must be {EVALUATIONS} or more")
    if len(values["rates"]) > len(DASHES):
        problems.append(f"{values.given['--rates']}: the picture has room for {len(DASHES)}")
    if values["svg"] and not Path(values["svg"]).parent.is_dir():
        problems.append(f"--svg {values['svg']}: there is no folder {Path(values['svg']).parent}")
    if problems:
        raise ConfigError(problems)
    steps, batch, seed = values["steps"], values["batch"], values["seed"]
    curves = {
        (optimizer, rate): train(
            *("--optimizer", optimizer, "--lr", rate, "--seed", str(seed)),
            *("--steps", str(steps), "--eval-interval", str(steps // EVALUATIONS)),
            *("--global-batch-size", str(batch), "--eval-steps", "4"),
        )
        for optimizer in COLOURS
        for rate in values["rates"]
    }
    print(markdown(curves))
    if values["svg"]:
        Path(values["svg"]).write_text(picture(curves), encoding="utf-8")
    return 0


def train(*flags: str) -> Curve:
    """A run of `megalite.pretrain` in this process.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        always = f"--device cpu --no-save-weights --sample-length 0 --runs {folder} --name run"
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = pretrain.main([*always.split(), *flags])
        if code:
            raise RuntimeError(said.getvalue())
        lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["valid_loss"]) for r in records if "valid_loss" in r]


def markdown(curves: Curves) -> str:
    """The loss of each run after a quarter, a half, and all of its steps."""
    shown = [step for step, _ in next(iter(curves.values()))]
    shown = [shown[len(shown) * part // 4 - 1] for part in (1, 2, 4)]
    lines = ["| optimizer | lr | " + " | ".join(f"step {step}" for step in shown) + " |"]
    lines.append("|---" * (2 + len(shown)) + "|")
    for (optimizer, rate), curve in curves.items():
        losses = dict(curve)
        cells = " | ".join(f"{losses[step]:.3f}" for step in shown)
        lines.append(f"| `{optimizer}` | {rate} | {cells} |")
    return "\n".join(lines)


def picture(curves: Curves) -> str:
    """An SVG: across, steps; up, the loss; a colour for each optimizer, dashes for each rate."""
    last = max(step for curve in curves.values() for step, _ in curve)
    losses = [loss for curve in curves.values() for _, loss in curve]
    least, most = min(losses), min(max(losses), 1.5 * min(losses))

    def place(step: int, loss: float) -> tuple[float, float]:
        share = (min(loss, most) - least) / (most - least)
        return LEFT + (RIGHT - LEFT) * step / last, BOTTOM - 10 - (BOTTOM - TOP - 10) * share

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text((LEFT + RIGHT) / 2, 18, "loss on held-out text, nats per token"),
        _text((LEFT + RIGHT) / 2, BOTTOM + 40, "optimizer steps"),
        f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="black"/>',
    ]
    for quarter in range(1, 5):
        x, _ = place(last * quarter // 4, least)
        parts += [_line(x, BOTTOM, x, BOTTOM + 5), _text(x, BOTTOM + 20, str(last * quarter // 4))]
    for tick in range(int(10 * least) + 1, int(10 * most) + 1, 2):
        _, y = place(0, tick / 10)
        parts += [_line(LEFT - 5, y, LEFT, y), _text(LEFT - 22, y + 4, f"{tick / 10:.1f}")]
    dashes = dict(zip(dict.fromkeys(rate for _, rate in curves), DASHES, strict=False))
    for number, ((optimizer, rate), curve) in enumerate(curves.items()):
        look = f'fill="none" stroke="{COLOURS[optimizer]}" stroke-width="1.7"'
        look += f' stroke-dasharray="{dashes[rate]}"'
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        y = TOP + 20 + 22 * number
        parts += [
            f'<polyline points="{points}" {look}/>',
            f'<path d="M{RIGHT + 15} {y}h40" {look}/>',
            f'<text x="{RIGHT + 62}" y="{y + 4}">{optimizer}, lr {rate}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{words}</text>'


def _line(x: float, y: float, other_x: float, other_y: float) -> str:
    return f'<path d="M{x:.1f} {y:.1f}L{other_x:.1f} {other_y:.1f}" stroke="black"/>'


if __name__ == "__main__":
    end(main)
