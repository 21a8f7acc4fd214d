"""The drawing is XML; its boxes lie where the actions lie in time."""

from __future__ import annotations

from collections import defaultdict
from xml.etree import ElementTree

import pytest

from megalite.pipeline.actions import Action
from megalite.pipeline.costs import Costs
from megalite.pipeline.draw_svg import draw_svg
from megalite.pipeline.picture import Picture, planned
from megalite.pipeline.text import parse_plan
from megalite.pipeline.trace import Part

NAMESPACE = "{http://www.w3.org/2000/svg}"

CHUNKS = (
    "0F0 0F1 3F0 3I0 0I0 3F1 3I1 3W0 0I1 0W0 3W1 0W1\n"
    "1F0 2F0 1F1 2F1 2I0 1I0 2I1 1I1 2W0 1W0 2W1 1W1"
)


def picture(text: str, title: str = "mine", **costs: float) -> Picture:
    plan = parse_plan(text, "mine")
    return planned(plan, Costs.uniform(plan.num_stages, **costs), title)


def panels(svg: str) -> list[ElementTree.Element]:
    """The groups of the drawing: its pictures, then the legend."""
    return ElementTree.fromstring(svg).findall(f"{NAMESPACE}g")


def boxes(panel: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [box for box in panel.iter(f"{NAMESPACE}rect") if box.get("class") == kind]


def number(box: ElementTree.Element, name: str) -> float:
    return float(box.attrib[name])


def test_boxes_lie_where_the_actions_lie() -> None:
    drawn = picture(CHUNKS, forward=1.5, message=0.25)
    panel, _ = panels(draw_svg([drawn]))
    rows = boxes(panel, "idle")
    assert len(rows) == 2
    left, width = number(rows[0], "x"), number(rows[0], "width")
    scale = width / drawn.timeline.makespan
    found = {Action.parse(box.attrib["data-action"]): box for box in boxes(panel, "action")}
    assert len(found) == len(drawn.timeline.spans) == 24
    for span in drawn.timeline.spans:
        box = found[span.action]
        assert number(box, "x") == pytest.approx(left + span.start * scale, abs=2e-3)
        assert number(box, "width") == pytest.approx((span.end - span.start) * scale, abs=2e-3)
        assert number(box, "y") == number(rows[span.rank], "y")
        assert box.attrib["data-rank"] == str(span.rank)


def test_colour_tells_operation_and_stage_and_the_box_the_micro_batch() -> None:
    drawn = picture(CHUNKS)
    panel, legend = panels(draw_svg([drawn]))
    colours = defaultdict(set)
    texts = {
        (round(number(text, "x")), round(number(text, "y"))): text.text
        for text in panel.iter(f"{NAMESPACE}text")
    }
    for box in boxes(panel, "action"):
        action = Action.parse(box.attrib["data-action"])
        colours[action.op, drawn.chunks[action.stage]].add(box.attrib["fill"])
        centre = number(box, "x") + number(box, "width") / 2
        assert texts[round(centre), round(number(box, "y") + 17)] == str(action.micro_batch)
    assert all(len(each) == 1 for each in colours.values())
    assert len(colours) == len(set.union(*colours.values())) == 6
    explained = {box.attrib["fill"] for box in boxes(legend, "legend")}
    assert explained == set.union(*colours.values())
    words = [text.text for text in legend.iter(f"{NAMESPACE}text")]
    assert words[:3] == ["forward", "input gradient", "weight gradient"]


def test_two_pictures_share_one_scale_and_any_title_is_text() -> None:
    short, long = picture(CHUNKS, "a < b & c"), picture(CHUNKS, forward=4.0)
    first, second, _ = panels(draw_svg([short, long]))
    assert first.find(f"{NAMESPACE}text").text == "a < b & c"
    widths = [number(boxes(panel, "idle")[0], "width") for panel in (first, second)]
    ratio = long.timeline.makespan / short.timeline.makespan
    assert widths[1] / widths[0] == pytest.approx(ratio, rel=1e-5)


def test_what_came_after_the_actions_is_drawn_and_what_came_before_is_not() -> None:
    drawn = picture("0F0 0B0")
    parts = ((0, Part("samples", -1.0, 0.0)), (0, Part("optimizer", 3.0, 4.0)))
    with_parts = Picture("run", drawn.plan, drawn.timeline, drawn.costs, True, parts)
    panel, _ = panels(draw_svg([with_parts]))
    (box,) = boxes(panel, "part")
    assert box.attrib["data-part"] == "optimizer"
    row = boxes(panel, "idle")[0]
    assert number(box, "x") == pytest.approx(number(row, "x") + number(row, "width"))
    assert box.find(f"{NAMESPACE}title").text == "rank 0, optimizer: 3 s to 4 s"


def test_a_number_wider_than_its_box_is_left_out() -> None:
    drawn = picture("0F0 0B0", forward=100.0, input_gradient=0.01, weight_gradient=0.01)
    panel, _ = panels(draw_svg([drawn]))
    middles = [t for t in panel.iter(f"{NAMESPACE}text") if t.get("y") == "43"]
    assert [text.text for text in middles] == ["rank 0", "0"]


def test_figures_stand_below() -> None:
    drawn = picture(CHUNKS)
    panel, _ = panels(draw_svg([drawn]))
    texts = [text.text for text in panel.iter(f"{NAMESPACE}text")]
    assert texts[-3:] == drawn.figures()


def test_the_longest_drawing_is_still_drawn() -> None:
    n = 3000
    text = " ".join(f"0F{i} 0B{i}" for i in range(n))
    svg = ElementTree.fromstring(draw_svg([picture(text)]))
    assert float(svg.attrib["width"]) < 31_000
