"""What verification runs has the structure of what was asked for, and is small."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import run

from megalite.check import check
from megalite.config import Config
from megalite.models.stage import stage_specs
from megalite.pipeline.schedules import make_plan
from megalite.pipeline.text import plan_text
from megalite.presets import PRESETS
from megalite.verification.run import one_rank
from megalite.verification.shrink import LOSS_SCALE, MOST_RANKS, shrink

LAYOUTS = [
    "",
    "--tp 4 --pp 2",
    "--tp 8 --pp 4 --dp 16",
    "--tp 2 --pp 3",
    "--dp 4",
    "--tp 8",
]


def asked(preset: str, layout: str) -> Config:
    config = Config().replace(**{**PRESETS[preset], "model": preset})
    return run(
        "--model",
        preset,
        *layout.split(),
        "--global-batch-size",
        str(16 * 12 * config.train.micro_batch_size),
    )


def fits(preset: str, layout: str) -> bool:
    heads = PRESETS[preset].get("num_attention_heads", 4)
    words = dict(zip(layout.split()[::2], layout.split()[1::2], strict=True))
    tp = int(words.get("--tp", 1))
    return heads % tp == 0 and not (preset == "125m" and tp == 8)


CASES = [(preset, layout) for preset in PRESETS for layout in LAYOUTS if fits(preset, layout)]


@pytest.mark.parametrize(("preset", "layout"), CASES)
def test_structure_is_kept(preset: str, layout: str) -> None:
    config = asked(preset, layout)
    small = shrink(config).config
    check(small)
    assert (small.parallel.tp, small.parallel.pp) == (config.parallel.tp, config.parallel.pp)
    assert small.model.tie_embeddings == config.model.tie_embeddings
    assert small.model.rope_scaling == config.model.rope_scaling
    assert small.train.clip_grad == config.train.clip_grad
    model, tp = config.model, config.parallel.tp
    for ours, theirs in ((small.model, model),):
        assert (ours.num_kv_heads < ours.num_attention_heads) == (
            theirs.num_kv_heads < theirs.num_attention_heads
        )
        # Copies of key/value heads stay as many.
        assert max(1, tp // ours.num_kv_heads) == max(1, tp // theirs.num_kv_heads)
        padding = [m.padded_vocab_size(tp) > m.vocab_size for m in (ours, theirs)]
        assert padding[0] == padding[1]
    longer = [
        [spec.num_layers - min(s.num_layers for s in specs) > 0 for spec in specs]
        for specs in (stage_specs(small), stage_specs(config))
    ]
    assert longer[0] == longer[1]


@pytest.mark.parametrize(("preset", "layout"), CASES)
def test_it_is_small(preset: str, layout: str) -> None:
    small = shrink(asked(preset, layout)).config
    assert small.world_size <= max(MOST_RANKS, 2 * small.parallel.tp * small.parallel.pp)
    assert small.model.hidden_size <= 64 and small.model.num_layers <= 2 * small.parallel.pp + 4
    assert small.model.vocab_size < 600 and small.tokens_per_step < 20_000


@pytest.mark.parametrize(
    "flags",
    [
        "--pp-layers 3,1 --pp 2",
        "--schedule gpipe --pp 2",
        "--recompute full",
        "--hidden-dropout 0.1 --attention-dropout 0.2",
        "--no-sequence-parallel --tp 2",
        "--lr-decay-style WSD --lr-wsd-decay-style linear",
        "--clip-grad 0",
        "--precision fp16",
    ],
)
def test_options_are_kept(flags: str) -> None:
    config, small = run(*flags.split()), shrink(run(*flags.split())).config
    for flag in [word for word in flags.split() if word.startswith("--")]:
        name = flag[2:].replace("-", "_").removeprefix("no_")
        if name == "pp_layers":
            continue
        group = next(g for g in ("model", "parallel", "train") if hasattr(getattr(config, g), name))
        assert getattr(getattr(small, group), name) == getattr(getattr(config, group), name)


@pytest.mark.parametrize("flags", ["--loss-scale 1e9", "--initial-loss-scale 1e9", ""])
def test_a_constant_loss_scale_stays_constant_and_another_one_moves(flags: str) -> None:
    config = run("--fp16", *flags.split())
    small = shrink(config).config
    check(small)
    assert bool(small.scaling.loss_scale) == bool(config.scaling.loss_scale)
    assert max(small.scaling.loss_scale, small.scaling.initial_loss_scale) == LOSS_SCALE
    assert (small.scaling.loss_scale_window, small.scaling.hysteresis) == (1, 1)


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ("--pp 2 --num-layers 16 --pp-layers 8.5,7.5", (3.5, 2.5)),
        ("--pp 2 --num-layers 16 --pp-layers 0.5,15.5", (0.5, 1.5)),
        ("--pp 4 --num-layers 16 --pp-layers 5,4.5,4,2.5", (2, 2.5, 2, 1.5)),
        ("--pp 2 --schedule zb-v --num-layers 16 --pp-layers 5.5,1,8.5,1", (2.5, 1, 2.5, 1)),
        ("--pp 1 --chunks 2 --num-layers 16", (2, 2)),
        ("--pp 8 --num-layers 4", (0.5,) * 8),
    ],
)
def test_boundaries_inside_layers_are_kept(flags: str, want: tuple[float, ...]) -> None:
    config = run(*flags.split())
    small = shrink(config).config
    check(small)
    assert tuple(spec.num_layers for spec in stage_specs(small)) == want
    assert [spec.num_blocks % 2 for spec in stage_specs(small)] == [
        spec.num_blocks % 2 for spec in stage_specs(config)
    ]


def test_a_plan_in_a_file_still_fits(tmp_path: Path) -> None:
    """It is for so many micro-batches, more than a schedule by name would be shrunk to."""
    (tmp_path / "plan.txt").write_text(plan_text(make_plan("zb-v", 2, 9)))
    argv = "--pp 2 --micro-batch-size 4 --global-batch-size 36 --schedule".split()
    small = shrink(run(*argv, f"{tmp_path}/plan.txt")).config
    check(small)
    assert small.num_micro_batches == 9
    assert shrink(run(*argv, "zb-v")).config.num_micro_batches == 5


def test_the_one_rank_run_has_one_stage(tmp_path: Path) -> None:
    (tmp_path / "plan.txt").write_text(plan_text(make_plan("zb-v", 2, 2)))
    for schedule in ("interleaved", f"{tmp_path}/plan.txt"):
        argv = f"--pp 2 --micro-batch-size 4 --global-batch-size 8 --schedule {schedule}"
        config = run(*argv.split())
        one = one_rank(config)
        check(one)
        assert len(stage_specs(one)) == one.world_size == 1
        assert one.model.num_layers == config.model.num_layers


@pytest.mark.parametrize(("asked_for", "gets"), [(1, 1), (2, 2), (3, 3), (8, 8), (9, 9), (64, 8)])
def test_micro_batches_fill_the_pipeline_as_before(asked_for: int, gets: int) -> None:
    flags = f"--pp 4 --micro-batch-size 1 --global-batch-size {asked_for}"
    assert shrink(run(*flags.split())).config.num_micro_batches == gets


def test_replicas_that_change_nothing_are_left_out_and_named() -> None:
    small = shrink(run("--tp", "4", "--dp", "32", "--global-batch-size", "256"))
    assert small.config.parallel.dp == 2 and small.changes == ("dp 32 -> 2",)
