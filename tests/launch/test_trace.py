"""A real run on two ranks records what its pipeline did, and the tool draws it."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from runs import ROOT, SMALL, launch, pretrain_command

from megalite.pipeline.trace import PARTS, Trace, maker
from megalite.pipeline.trace_file import read_trace

TOOL = [sys.executable, str(ROOT / "tools/draw_schedule.py")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a file of actions that the tool has printed."""
    folder = tmp_path_factory.mktemp("trace")
    plan = folder / "mine.txt"
    words = ["--schedule", "zb-v", "--pp", "2", "--micro-batches", "4", "--format", "actions"]
    subprocess.run([*TOOL, *words, "--output", str(plan)], check=True)
    flags = [*SMALL, "--pp", "2", "--device", "cpu", "--schedule", str(plan)]
    flags += ["--steps", "7", "--trace-steps", "3", "--runs", str(folder), "--name", "mine"]
    result = launch(pretrain_command(*flags))
    assert result.returncode == 0, result.stderr
    assert f"tools/draw_schedule.py --trace {folder}/mine" in result.stdout
    return folder / "mine"


@pytest.fixture(scope="module")
def trace(run: Path) -> Trace:
    return read_trace(run)


def test_the_plan_in_use_stands_beside_the_record(run: Path, trace: Trace) -> None:
    given = (run.parent / "mine.txt").read_text().splitlines()
    assert (run / "trace/plan.txt").read_text().splitlines()[1:] == given[1:]
    assert list(trace.steps) == [4, 5, 6], "the three steps after the warm-up"


def test_the_plan_is_kept_beside_the_configuration(run: Path) -> None:
    given = (run.parent / "mine.txt").read_text().splitlines()
    assert (run / "plan.txt").read_text().splitlines()[1:] == given[1:]


def test_no_action_began_before_its_input_was_made(trace: Trace) -> None:
    for ranks in trace.steps.values():
        spans = {span.action: span for rank in ranks for span in rank.spans}
        remote = 0
        for action, span in spans.items():
            made_by = maker(trace.plan, action, spans)
            if made_by is not None:
                remote += 1
                assert span.start > spans[made_by].end
                assert span.waits_for == spans[made_by].rank != span.rank
            else:
                assert span.waits_for == -1
        assert remote == 4 * 4, "four messages of each of four micro-batches"


def test_a_rank_does_one_thing_at_a_time(trace: Trace) -> None:
    for ranks in trace.steps.values():
        for rank in ranks:
            pipeline = rank.part("pipeline")
            assert pipeline.start <= rank.spans[0].start - rank.spans[0].waited
            assert rank.spans[-1].end <= pipeline.end
            for span, following in pairwise(rank.spans):
                assert span.start < span.end <= following.start - following.waited + 1e-8
            assert [part.name for part in rank.parts] == list(PARTS)
            for part, following in pairwise(rank.parts):
                assert part.start < part.end == following.start


def test_step_times_are_those_of_the_metrics(run: Path, trace: Trace) -> None:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    step_ms = {line["step"]: line["step_ms"] for line in lines if "step_ms" in line}
    shares = [
        1e3 * (first.end - first.start) / step_ms[number]
        for number, (first, _) in trace.steps.items()
    ]
    # The machine may stop a rank between the readings of the two clocks, but not in each step.
    assert min(abs(share - 1) for share in shares) < 0.02
    assert all(share < 1.02 for share in shares)


def test_the_tool_draws_it(run: Path, trace: Trace) -> None:
    drawn = launch([*TOOL, "--trace", str(run), "--step", "4"])
    assert (drawn.returncode, drawn.stderr) == (0, "")
    measured = trace.timeline(4).makespan
    assert f"measured {1e3 * measured:.4g} ms, predicted" in drawn.stdout
    assert drawn.stdout.count("rank 1   ") >= 2, "planned and measured"
