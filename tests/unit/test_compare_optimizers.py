"""The comparison of optimizers: a run of each, its table by hand, its picture's lines."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megalite.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import compare_optimizers

CURVES = {
    ("adamw", "1e-3"): [(1, 4.0), (2, 3.0), (3, 2.5), (4, 2.0)],
    ("muon", "1e-3"): [(1, 3.5), (2, 2.9), (3, 2.5), (4, 2.25)],
    ("muon", "4e-3"): [(1, 9.0), (2, 9.5), (3, 9.9), (4, 9.99)],
}


def test_runs_begin_alike_and_differ_by_the_optimizer() -> None:
    flags = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 24"
    flags += " --steps 3 --eval-interval 1 --eval-steps 1 --lr 1e-2 --lr-warmup-steps 0"
    adamw, again, muon = (
        compare_optimizers.train(*flags.split(), "--optimizer", name)
        for name in ("adamw", "adamw", "muon")
    )
    assert [step for step, _ in adamw] == [1, 2, 3]
    assert adamw == again
    assert all(0 < abs(a - b) < 1 for (_, a), (_, b) in zip(adamw, muon, strict=True))


def test_a_run_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="--optimizer sgd: expected one of adamw, muon"):
        compare_optimizers.train("--optimizer", "sgd")


def test_table() -> None:
    assert compare_optimizers.markdown(CURVES).splitlines() == [
        "| optimizer | lr | step 1 | step 2 | step 4 |",
        "|---|---|---|---|---|",
        "| `adamw` | 1e-3 | 4.000 | 3.000 | 2.000 |",
        "| `muon` | 1e-3 | 3.500 | 2.900 | 2.250 |",
        "| `muon` | 4e-3 | 9.000 | 9.500 | 9.990 |",
    ]


def test_picture() -> None:
    """A line for each run, lower where the loss is; what went wrong stays at the upper edge."""
    svg = "{http://www.w3.org/2000/svg}"
    lines = ElementTree.fromstring(compare_optimizers.picture(CURVES)).findall(f"{svg}polyline")
    heights = [[float(p.split(",")[1]) for p in line.attrib["points"].split()] for line in lines]
    assert len(heights) == len(CURVES)
    adamw, muon, wrong = heights
    assert adamw == sorted(adamw) and adamw[-1] == max(map(max, heights))
    assert adamw[2] == muon[2] and adamw[3] > muon[3]
    assert set(wrong) == {compare_optimizers.TOP}
    looks = [(line.attrib["stroke"], line.attrib["stroke-dasharray"]) for line in lines]
    assert looks[0][1] == looks[1][1] != looks[2][1]
    assert looks[0][0] != looks[1][0] == looks[2][0]


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        compare_optimizers.main(["--steps", "3", "--svg", "/nowhere/at/all.svg"])
    assert caught.value.violations == [
        "--steps 3 must be 15 or more",
        "--svg /nowhere/at/all.svg: there is no folder /nowhere/at",
    ]
