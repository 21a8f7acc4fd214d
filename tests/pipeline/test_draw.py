"""Pictures in text: every action at its place, its operation, micro-batch and stage readable."""

from __future__ import annotations

import re

from commands import run

from megalite import report
from megalite.pipeline.actions import Action, Plan
from megalite.pipeline.costs import Costs
from megalite.pipeline.draw import draw, draw_folded, legend
from megalite.pipeline.picture import Picture, planned
from megalite.pipeline.simulate import Span, Timeline
from megalite.pipeline.text import parse_plan


def picture(text: str, **costs: float) -> Picture:
    plan = parse_plan(text, "mine")
    return planned(plan, Costs.uniform(plan.num_stages, **costs))


WHOLE = "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"
SPLIT = "0F0 0F1 0I0 0W0 0I1 0W1\n1F0 1I0 1F1 1I1 1W0 1W1"
CHUNKS = "0F0 2F0 2B0 0B0\n1F0 3F0 3B0 1B0"


def test_whole_backwards() -> None:
    drawn = picture(WHOLE)
    assert draw(drawn).splitlines() == [
        "rank 0   F0 F1 ······B0--- ···B1--- ",
        "rank 1   ···F0 B0--- F1 B1--- ······",
    ]
    assert legend(drawn) == "F forward, B backward, · idle"


def test_split_backwards_and_unequal_times() -> None:
    drawn = picture(SPLIT, forward=2.0)
    assert draw(drawn).splitlines() == [
        "rank 0   F0--- F1--- ···I0 W0 ···I1 W1 ",
        "rank 1   ······F0--- I0 F1--- I1 W0 W1 ",
    ]
    assert legend(drawn) == "F forward, I input gradient, W weight gradient, · idle"


def test_stages_of_one_rank_have_letters() -> None:
    drawn = picture(CHUNKS)
    assert draw(drawn).splitlines() == [
        "rank 0   F0a ····F0b ············B0b---- ········B0a---- ",
        "rank 1   ····F0a ····F0b B0b---- ········B0a---- ········",
    ]
    assert legend(drawn) == "F forward, B backward, a b a rank's stages in turn, · idle"


def test_a_wide_picture_is_cut_and_says_so() -> None:
    lines = draw(picture(WHOLE), width=20).splitlines()
    assert lines == ["rank 0   F0 F1 ····…", "rank 1   ···F0 B0--…"]


def test_a_folded_picture_holds_all_of_it() -> None:
    drawn = picture(CHUNKS)
    blocks = draw_folded(drawn, width=30).split("\n\n")
    assert [block.splitlines()[0].strip() for block in blocks] == ["from 0", "from 5", "from 10"]
    for rank, line in enumerate(draw(drawn).splitlines()):
        pieces = [block.splitlines()[1 + rank] for block in blocks]
        assert all(len(piece) <= 30 for piece in pieces)
        assert "".join(piece[9:] for piece in pieces) == line[9:]
    assert draw_folded(drawn) == draw(drawn), "what fits has no headings"


def test_colour_changes_no_character() -> None:
    drawn = picture(SPLIT)
    painted = draw_folded(drawn, coloured=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == draw(drawn)
    backgrounds = dict(re.findall(r"\x1b\[30;(\d+)m([FIW])", painted))
    assert sorted(backgrounds.values()) == ["F", "I", "W"], "one colour for each"


def test_what_is_too_short_for_its_label_keeps_its_letter_and_moves_nothing() -> None:
    actions = [Action.parse(word) for word in ("0F10", "0B10", "0F11", "0B11")]
    times = [(0.0, 2.0), (2.0, 8.0), (8.0, 8.5), (8.5, 14.5)]
    spans = tuple(Span(0, a, *time) for a, time in zip(actions, times, strict=True))
    plan = Plan("mine", 12, (0,), (tuple(actions),))
    drawn = Picture("mine", plan, Timeline(spans, 14.5, 1), Costs.uniform(1))
    assert draw(drawn, unit=2.0) == "rank 0   F10 B10-------- FB11-------- "


def test_figures() -> None:
    four = "\n".join(
        [
            "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
            "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
            "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
        ]
    )
    assert picture(four).figures() == [
        "makespan     18",
        "bubble       33.3% of all ranks' time; 33.3% of the idlest rank's, first action to last",
        "peak memory  3 2 1 by rank, in one micro-batch's activations on one stage",
    ]
    # A rank that begins late and then never waits is not idle by the papers' measure.
    late = picture("0F0 0F1 0F2 0I0 0W0 0I1 0W1 0I2 0W2\n1F0 1I0 1F1 1I1 1F2 1I2 1W0 1W1 1W2")
    assert late.figures() == [
        "makespan     10",
        "bubble       10.0% of all ranks' time; 0.0% of the idlest rank's, first action to last",
        "peak memory  3 3 by rank, in one micro-batch's activations on one stage",
    ]


def test_a_dry_run_shows_the_pipeline() -> None:
    config = run(*"--pp 2 --micro-batch-size 1 --global-batch-size 3 --steps 5".split())
    assert report.timeline(config).splitlines() == [
        "pipeline: 1f1b, 3 micro-batches, 25.0% idle (F forward, B backward, · idle)",
        "rank 0   F0 F1 ······B0--- F2 B1--- ···B2--- ",
        "rank 1   ···F0 B0--- F1 B1--- F2 B2--- ······",
    ]


def test_a_dry_run_of_many_micro_batches_shows_some_and_counts_all() -> None:
    config = run(*"--pp 2 --micro-batch-size 1 --global-batch-size 1000 --steps 5".split())
    heading, *rows = report.timeline(config).splitlines()
    # p - 1 of n + p - 1 units.
    assert heading.startswith("pipeline: 1f1b, 1,000 micro-batches, 0.1% idle (")
    assert heading.endswith("; drawn: 72 micro-batches)")
    assert [len(row) for row in rows] == [100, 100]
