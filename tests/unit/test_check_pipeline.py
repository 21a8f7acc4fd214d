"""A schedule, its chunks and its stages that cannot be are refused in one sentence before a run
starts, and so is a plan in a file that would hang or compute the wrong thing."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import run, violations

from megalite.models.stage import stage_specs
from megalite.pipeline.schedules import SCHEDULES, make_plan
from megalite.pipeline.text import plan_text
from megalite.run_plan import run_plan, stage_rank

BATCH = ["--micro-batch-size", "4", "--global-batch-size", "8"]
"""Two micro-batches."""

RIGHT = "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1\n"


def of_file(path: Path, text: str, *argv: str) -> list[str]:
    """What is wrong with a plan of two ranks and two micro-batches; the file's path is FILE."""
    path.write_text(text)
    found = violations("--pp", "2", *BATCH, "--schedule", str(path), *argv)
    return [sentence.replace(str(path), "FILE") for sentence in found]


# Names and chunks

WRONG = {
    "no such schedule": (
        "--schedule zbv",
        "--schedule zbv: there is no such schedule or file; did you mean zb-v?",
    ),
    "capitals": (
        "--schedule 1F1B",
        "--schedule 1F1B: there is no such schedule or file; did you mean 1f1b?",
    ),
    "a folder": (
        "--schedule /",
        "--schedule / is a folder; give a file of actions, or one of auto, " + ", ".join(SCHEDULES),
    ),
    "a V of three": (
        "--pp 2 --schedule zb-v --chunks 3",
        "--chunks 3: --schedule zb-v has always 2 stages on each rank; leave it out, or try "
        "--schedule gpipe or 1f1b or interleaved",
    ),
    "interleaved with one stage": (
        "--pp 2 --schedule interleaved --chunks 1",
        "--chunks 1: --schedule interleaved has at least 2 stages on each rank; leave it out, or "
        "try --schedule gpipe or 1f1b or zb-h1 or zb-h2",
    ),
    "zb-h1 with two": (
        "--pp 2 --schedule zb-h1 --chunks 2",
        "--chunks 2: --schedule zb-h1 has always 1 stage on each rank; leave it out, or try "
        "--schedule gpipe or 1f1b or interleaved or zb-v or v-half or v-min or dualpipe-v",
    ),
    "more ranks than blocks": (
        "--pp 9",
        "--pp 9 makes 9 stages, more than the 8 blocks of --num-layers 4: every stage owns at "
        "least an attention or an MLP; try --pp 8 or fewer",
    ),
    "more ranks than there is memory for": (
        "--pp 1000000000000",
        "--pp 1000000000000 makes 1,000,000,000,000 stages, more than the 8 blocks of "
        "--num-layers 4: every stage owns at least an attention or an MLP; try --pp 8 or fewer",
    ),
    "more stages than blocks": (
        "--pp 3 --chunks 4",
        "--pp 3 x 4 chunks makes 12 stages, more than the 8 blocks of --num-layers 4: every stage "
        "owns at least an attention or an MLP; try --chunks 2 or fewer",
    ),
    "more ranks than a V has blocks for": (
        "--pp 5 --schedule v-min",
        "--pp 5 x 2 chunks makes 10 stages, more than the 8 blocks of --num-layers 4: every stage "
        "owns at least an attention or an MLP; try --pp 4 or fewer",
    ),
    "more ranks than one chunk has blocks for": (
        "--pp 9 --chunks 3",
        "--pp 9 x 3 chunks makes 27 stages, more than the 8 blocks of --num-layers 4: every stage "
        "owns at least an attention or an MLP; try --pp 8 or fewer with --chunks 1",
    ),
    "pp-layers for each stage": (
        "--pp 2 --pp-layers 2,1,1",
        "--pp-layers 2,1,1 names 3 stages, but --pp 2 makes 2 stages",
    ),
    "pp-layers for one stage": (
        "--pp-layers 2,2",
        "--pp-layers 2,2 names 2 stages, but --pp 1 makes 1 stage",
    ),
    "pp-layers for each chunk": (
        "--pp 2 --schedule zb-v --pp-layers 2,2",
        "--pp-layers 2,2 names 2 stages, but --pp 2 x 2 chunks makes 4 stages",
    ),
    "pp-layers for a schedule that is to be chosen": (
        "--pp 2 --schedule auto --pp-layers 2,1,1",
        "--pp-layers 2,1,1 names 3 stages, no multiple of --pp 2",
    ),
    "pp-layers add up": (
        "--pp 2 --pp-layers 2.5,2",
        "--pp-layers 2.5,2 adds up to 4.5, but --num-layers is 4",
    ),
    "pp-layers are halves": (
        "--pp 2 --pp-layers 2.3,1.7",
        "--pp-layers 2.3,1.7: a stage ends after a layer, or between its attention and its MLP; "
        "try 2.5,1.5",
    ),
    "pp-layers are not empty": (
        "--pp 2 --pp-layers 4,0",
        "--pp-layers 4,0: every stage owns at least half a layer, 0.5",
    ),
    "pp-layers are not negative": (
        "--pp 2 --pp-layers 5.5,-1.5",
        "--pp-layers 5.5,-1.5: every stage owns at least half a layer, 0.5",
    ),
}


@pytest.mark.parametrize("rule", WRONG)
def test_one_broken_rule_is_one_sentence(rule: str) -> None:
    argv, sentence = WRONG[rule]
    assert violations(*argv.split()) == [sentence]


@pytest.mark.parametrize(
    ("argv", "layers"),
    [
        ("--pp 8", (0.5,) * 8),
        ("--pp 4 --chunks 2", (0.5,) * 8),
        ("--pp 2 --pp-layers 2.5,1.5", (2.5, 1.5)),
        ("--pp 2 --pp-layers 0.5,3.5", (0.5, 3.5)),
        ("--pp 2 --schedule zb-v --pp-layers 1,0.5,1.5,1", (1, 0.5, 1.5, 1)),
        ("--pp 1 --chunks 3 --pp-layers 2,1,1", (2, 1, 1)),
        ("--pp 1 --schedule dualpipe-v --pp-layers 1,3", (1, 3)),
        ("--pp 2 --schedule interleaved --chunks 2 --pp-layers 1,1,1,1", (1, 1, 1, 1)),
    ],
)
def test_what_is_just_valid(argv: str, layers: tuple[float, ...]) -> None:
    assert tuple(spec.num_layers for spec in stage_specs(run(*argv.split()))) == layers


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_can_have_its_chunks(name: str) -> None:
    default, most = SCHEDULES[name].chunks
    for chunks in {0, default, most or default + 1}:
        run("--pp", "2", "--schedule", name, "--chunks", str(chunks))
    run("--pp", "2", "--schedule", "auto")


def test_1f1b_with_chunks_is_interleaved() -> None:
    argv = ["--pp", "2", "--chunks", "2", *BATCH]
    plain, named = run(*argv), run(*argv, "--schedule", "interleaved")
    assert run_plan(plain).ranks == run_plan(named).ranks
    assert run_plan(plain).stage_rank == (0, 1, 0, 1)


def test_a_schedule_that_is_not_chosen_yet_has_no_plan() -> None:
    config = run("--pp", "2", "--schedule", "auto")
    for follow in (run_plan, stage_rank):
        with pytest.raises(AssertionError, match="has to be chosen first"):
            follow(config)


# Files


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_plan_of_ours_is_accepted_as_a_file(tmp_path: Path, name: str) -> None:
    plan = make_plan(name, 2, 2)
    (tmp_path / "a plan.txt").write_text(plan_text(plan))
    config = run("--pp", "2", *BATCH, "--schedule", f"{tmp_path}/a plan.txt")
    assert run_plan(config).ranks == plan.ranks
    assert len(stage_specs(config)) == plan.num_stages


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no action stands in it"),
        ("# 1f1b\n\n", "no action stands in it"),
        (
            "0F0 0X1 0B0\n# b\n1F0 hello",
            "line 1: '0X1' is not an action such as 2F0 or 1RECV_B3; line 3: 'hello' is not an "
            "action such as 2F0 or 1RECV_B3",
        ),
        (
            "0F0 0SEND_F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1",
            "line 1: 0SEND_F0 is a message; a plan names computations",
        ),
        (
            "0F0 0F1 0B0 1B1\n1F0 1B0 1F1 1B1",
            "; ".join(
                f"line 2: {action} stands on rank 1, but its stage on rank 0"
                for action in ("1F0", "1B0", "1F1", "1B1")
            ),
        ),
        ("0F0 0F1 0B0 0B1\n2F0 2F1 2B0 2B1", "stage 1 is missing, but stage 2 is there"),
        ("0F0 0F1 0B0 0B1\n1F0 1B0 1F1", "rank 1 (line 2): 1B1 is missing"),
        ("0F0 0F1 0B0 0B1\n\n1F0 1B0 1F1 1I1", "rank 1 (line 3): 1W1 is missing"),
        ("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1 1F0", "rank 1 (line 2): 1F0 stands 2 times"),
        (
            "# mine\n0F0 0F1 0B0 0B1\n# the last\n1F0 1B0 1B1 1F1",
            "rank 1 (line 4): 1B1 stands before 1F1",
        ),
        (
            "0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1",
            "would hang: rank 0 (line 1) in 0B0, rank 1 (line 2) in 1F1",
        ),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    assert of_file(tmp_path / "plan.txt", text) == [f"--schedule FILE: {sentence}"]


@pytest.mark.parametrize("number", ["9999999999", "9" * 5000])
def test_numbers_beyond_all_others(tmp_path: Path, number: str) -> None:
    """Told at once: what lies between is not counted up."""
    for word in ("1B1", "1F0"):
        for wrong in (f"1B{number}", f"{number}F0"):
            (found,) = of_file(tmp_path / "plan.txt", RIGHT.replace(word, wrong))
            assert found.startswith("--schedule FILE: ")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "plan.txt").write_bytes(b"0F0 \xff\xfe\x00")
    (found,) = violations("--schedule", f"{tmp_path}/plan.txt")
    assert found.startswith(f"--schedule {tmp_path}/plan.txt: cannot be read: 'utf-8' codec")


@pytest.mark.parametrize("name", ["x" * 5000, "a\\u0000b", "/dev/null/x"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.toml").write_text(f'schedule = "{name}"')
    (found,) = violations("--config", f"{tmp_path}/a.toml")
    assert "there is no such schedule or file" in found


@pytest.mark.parametrize(
    ("argv", "sentences"),
    [
        ("--pp 3", ["--schedule FILE is for 2 ranks, but --pp is 3; give --pp 2"]),
        (
            "--global-batch-size 12",
            [
                "--schedule FILE is for 2 micro-batches, but a step has 3; give "
                "--global-batch-size 8 (--micro-batch-size 4 x dp 1 x 2)"
            ],
        ),
        (
            "--global-batch-size 18 --dp 3 --micro-batch-size 2",
            [
                "--schedule FILE is for 2 micro-batches, but a step has 3; give "
                "--global-batch-size 12 (--micro-batch-size 2 x dp 3 x 2)"
            ],
        ),
        (
            "--rampup-batch-size 4,4,100",
            [
                "--schedule FILE is for 2 micro-batches, but with --rampup-batch-size their number "
                "grows; leave it out"
            ],
        ),
        (
            "--chunks 1",
            [
                "--chunks 1 and --schedule FILE: the file says which stages a rank has; leave "
                "--chunks out"
            ],
        ),
        (
            "--pp-layers 2,1,1",
            ["--pp-layers 2,1,1 names 3 stages, but --schedule FILE makes 2 stages"],
        ),
        (
            "--pp 4 --chunks 2 --global-batch-size 4",
            [
                "--chunks 2 and --schedule FILE: the file says",
                "--schedule FILE is for 2 ranks, but",
                "--schedule FILE is for 2 micro-batches, but",
            ],
        ),
        # What the batch is, its own rule has to settle first.
        ("--global-batch-size 9", ["--global-batch-size 9 is not a multiple of"]),
    ],
)
def test_a_plan_of_another_run(tmp_path: Path, argv: str, sentences: list[str]) -> None:
    found = of_file(tmp_path / "plan.txt", RIGHT, *argv.split())
    assert len(found) == len(sentences), found
    for sentence, start in zip(found, sentences, strict=True):
        assert sentence.startswith(start)


def test_more_stages_in_a_file_than_blocks(tmp_path: Path) -> None:
    path = tmp_path / "plan.txt"
    text = plan_text(make_plan("1f1b", 2, 2, chunks=3))
    assert of_file(path, text, "--num-layers", "2") == [
        "--schedule FILE makes 6 stages, more than the 4 blocks of --num-layers 2: every stage "
        "owns at least an attention or an MLP; try --num-layers 3 or more"
    ]


def placed(*owners: int) -> str:
    """A plan of two micro-batches, all forwards first, of stages on these ranks."""
    lines = []
    for rank in range(max(owners) + 1):
        own = [stage for stage, owner in enumerate(owners) if owner == rank]
        words = [f"{stage}F{i}" for stage in own for i in range(2)]
        lines.append(" ".join(words + [f"{stage}B{i}" for stage in own[::-1] for i in range(2)]))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("owners", "far"),
    [
        ((0, 2, 1, 3), "stage 0 on rank 0 and stage 1 on rank 2, stage 2 on rank 1 and stage 3 on "
         "rank 3"),
        ((3, 1, 0, 0, 1, 2), "stage 0 on rank 3 and stage 1 on rank 1"),
        ((0, 2, 0, 2, 0, 2, 0, 1, 2, 3), "stage 0 on rank 0 and stage 1 on rank 2, stage 1 on rank "
         "2 and stage 2 on rank 0, stage 2 on rank 0 and stage 3 on rank 2, stage 3 on rank 2 and "
         "stage 4 on rank 0, stage 4 on rank 0 and stage 5 on rank 2, and 1 more"),
    ],
)  # fmt: skip
def test_stages_on_ranks_that_are_not_connected(
    tmp_path: Path, owners: tuple[int, ...], far: str
) -> None:
    argv = ["--pp", "4", "--num-layers", "8"]
    assert of_file(tmp_path / "plan.txt", placed(*owners), *argv) == [
        f"--schedule FILE has {far}: consecutive stages lie on the same rank, on neighbouring "
        "ranks, or on the first and the last, 0 and 3"
    ]


@pytest.mark.parametrize("owners", [(1, 0, 2), (0, 0, 1, 2, 2), (2, 1, 0), (0, 1, 2, 0, 2, 1)])
def test_stages_on_ranks_that_are_connected(tmp_path: Path, owners: tuple[int, ...]) -> None:
    (tmp_path / "plan.txt").write_text(placed(*owners))
    config = run("--pp", "3", *BATCH, "--schedule", f"{tmp_path}/plan.txt")
    assert stage_rank(config) == run_plan(config).stage_rank == owners


def test_tied_embeddings_lie_where_their_gradients_are_summed(tmp_path: Path) -> None:
    argv = ["--pp", "3", "--tie-embeddings"]
    for first, last in ((1, 2), (0, 1), (1, 0)):
        text = placed(first, 3 - first - last, last)
        assert of_file(tmp_path / "plan.txt", text, *argv) == [
            f"--tie-embeddings and --schedule FILE: the first stage lies on rank {first}, the last "
            f"on rank {last}, but what they share is summed on ranks 0 and 2; put them there, or "
            "both on one rank"
        ]
    for fine in ((0, 1, 2), (2, 1, 0), (1, 0, 2, 1), (0, 1, 2, 0)):
        (tmp_path / "plan.txt").write_text(placed(*fine))
        run(*argv, *BATCH, "--schedule", f"{tmp_path}/plan.txt")
