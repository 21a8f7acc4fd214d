"""Counts of parameters equal those of the modules that are built; memory and arithmetic equal sums
by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from commands import run

from megalite import plan, report
from megalite.config import Config, resolve
from megalite.errors import ConfigError
from megalite.estimate import (
    _bucket_sizes,
    flops_per_token,
    rank_estimates,
    stage_parameters,
    whole_parameters,
)
from megalite.layers.shard import named_shards
from megalite.models.llama import LlamaStage
from megalite.models.stage import StageSpec, stage_specs
from megalite.optim.buckets import make_buckets
from megalite.parallel.tensor import TensorGroup

SHAPE: dict[str, Any] = dict(
    num_layers=5,
    hidden_size=48,
    num_attention_heads=8,
    ffn_hidden_size=80,
    vocab_size=101,
    make_vocab_size_divisible_by=8,
    seq_length=16,
    steps=1,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "four kv heads": dict(num_kv_heads=4),
    "two kv heads": dict(num_kv_heads=2),
    "one kv head": dict(num_kv_heads=1),
    "tied": dict(tie_embeddings=True, num_kv_heads=2),
    "wide heads": dict(head_dim=10, num_kv_heads=2),
    "no padding": dict(vocab_size=64),
    "padding beyond a rank": dict(vocab_size=101, make_vocab_size_divisible_by=128),
}


def tensor_rank(rank: int, size: int) -> TensorGroup:
    """One rank's view of a group that does not exist: modules are built, never run."""
    group = TensorGroup.solo()
    group.rank, group.size, group.sequence_parallel = rank, size, size > 1
    return group


def build(config: Config, spec: StageSpec, rank: int) -> LlamaStage:
    return LlamaStage(
        config,
        spec,
        tp=tensor_rank(rank, config.parallel.tp),
        dtype=torch.float32,
        device=torch.device("meta"),
    )


def settings(variant: str, **values: Any) -> Config:
    return resolve(Config().replace(**{**SHAPE, **VARIANTS[variant], **values}))


@pytest.mark.parametrize("pp", [1, 2, 5])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_equal_those_of_built_modules(variant: str, tp: int, pp: int) -> None:
    """Of each rank; and without padding and copies they add up to the whole model."""
    config = settings(variant, tp=tp, pp=pp)
    whole: dict[str, int] = {}
    for spec in stage_specs(config):
        for rank in range(tp):
            stage = build(config, spec, rank)
            held = sum(parameter.numel() for parameter in stage.parameters())
            assert held == stage_parameters(config, spec)
            for _, shard in named_shards(stage):
                for piece in shard.pieces:
                    if piece.replica == 0 and not shard.tied_copy:
                        rest = torch.Size(piece.shape).numel() // piece.shape[piece.dim]
                        whole[piece.name] = whole.get(piece.name, 0) + rest * piece.length
    assert sum(whole.values()) == whole_parameters(config)
    assert len(whole) == 5 * 9 + (2 if config.model.tie_embeddings else 3)


@pytest.mark.parametrize(
    ("variant", "want"),
    [
        # Per layer: q and o, k and v, gate up down, two norms.
        (
            "multi-head",
            5 * (2 * 48 * 48 + 2 * 48 * 48 + 3 * 48 * 80 + 2 * 48) + 2 * 101 * 48 + 48,
        ),
        (
            "one kv head",
            5 * (2 * 48 * 48 + 2 * 6 * 48 + 3 * 48 * 80 + 2 * 48) + 2 * 101 * 48 + 48,
        ),
        (
            "wide heads",
            5 * (2 * 80 * 48 + 2 * 20 * 48 + 3 * 48 * 80 + 2 * 48) + 2 * 101 * 48 + 48,
        ),
        ("tied", 5 * (2 * 48 * 48 + 2 * 12 * 48 + 3 * 48 * 80 + 2 * 48) + 101 * 48 + 48),
    ],
)
def test_whole_models_by_hand(variant: str, want: int) -> None:
    for tp in (1, 2, 8):
        assert whole_parameters(settings(variant, tp=tp)) == want


def test_a_rank_by_hand() -> None:
    """tp 4 of two key/value heads: two query heads and a copy of one; 104 of 101 rows, by 26."""
    config = settings("tied", tp=4, pp=2, make_vocab_size_divisible_by=26)
    first, last = stage_specs(config)
    attention, mlp = (2 * 12 + 2 * 6) * 48 + 48, 3 * 48 * 20 + 48
    # Two layers and the attention of the third; its MLP and two layers.
    assert (first.num_blocks, last.num_blocks) == (5, 5)
    assert stage_parameters(config, first) == 3 * attention + 2 * mlp + 26 * 48
    assert stage_parameters(config, last) == 2 * attention + 3 * mlp + 26 * 48 + 48


@pytest.mark.parametrize("name", ["fp32", "fp64", "bf16", "fp16", "bf16-pure"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (4, 2)])
def test_bytes_of_a_parameter(name: str, tp: int, pp: int) -> None:
    """Weights, gradients (fp32 at least), two moments, and master weights for 16 bits."""
    half = (2, 4, 12)
    widths = {"bf16": half, "fp16": half, "fp32": (4, 4, 8), "fp64": (8, 8, 16)}
    widths["bf16-pure"] = (2, 4, 4)
    weights, gradients, optimizer = widths[name]
    config = settings("two kv heads", tp=tp, pp=pp, precision=name)
    for spec in stage_specs(config):
        memory = rank_estimates(config)[spec.stage]
        count = stage_parameters(config, spec)
        assert memory.parameters == count
        assert memory.weights == weights * count
        assert memory.gradients == gradients * count
        assert memory.optimizer == optimizer * count
        states = memory.weights + memory.gradients + memory.optimizer
        sums = {"bf16": 18, "fp16": 18, "fp32": 16, "fp64": 32, "bf16-pure": 10}
        assert states == sums[name] * count
        assert memory.total == states + memory.activations + memory.logits


@pytest.mark.parametrize("name", ["fp32", "fp64", "bf16", "fp16"])
def test_bytes_of_a_parameter_with_post_validation(name: str) -> None:
    """Master weights and moments twice, unless there is one pipeline rank."""
    for pp, states in ((2, 24 if name != "fp64" else 48), (1, None)):
        memory = rank_estimates(settings("tied", pp=pp, precision=name, post_validation=True))[0]
        plain = rank_estimates(settings("tied", pp=pp, precision=name))[0]
        assert memory.optimizer == (states * memory.parameters if states else plain.optimizer)
        assert memory.total - memory.optimizer == plain.total - plain.optimizer


@pytest.mark.parametrize(
    ("values", "states"),
    [
        (dict(precision="bf16"), 4 + 2 + 2),
        (dict(precision="fp16"), 4 + 2 + 2),
        (dict(precision="fp32"), 2 + 2),
        (dict(precision="bf16", pp=2, post_validation=True), 2 * (4 + 2 + 2)),
        (dict(precision="fp32", pp=2, post_validation=True), 2 * (4 + 2 + 2)),
        (dict(precision="bf16-pure", pp=2, post_validation=True), 2 * (2 + 2 + 2)),
    ],
    ids=str,
)
def test_bytes_of_a_parameter_with_moments_in_bf16(values: dict[str, Any], states: int) -> None:
    memory = rank_estimates(settings("tied", moments_dtype="bf16", **values))[0]
    plain = rank_estimates(settings("tied", **values))[0]
    assert memory.optimizer == states * memory.parameters
    assert memory.total - memory.optimizer == plain.total - plain.optimizer


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        (dict(dp=1), 0),
        (dict(dp=4, zero=0), 2),
        (dict(dp=4, zero=1), 2),
        # Half of it is the shard of each, which its replica has too; two buckets are less.
        (dict(dp=4, zero=2, zero_shard_size=2, num_layers=40, hidden_size=2048), 1),
    ],
    ids=str,
)
def test_bytes_of_gradients_on_their_way(layout: dict[str, Any], more: float) -> None:
    """In another precision than their own they are copies."""
    plain, asked, same = (
        rank_estimates(settings("tied", precision="bf16", grad_reduce_dtype=name, **layout))[0]
        for name in ("auto", "bf16", "fp32")
    )
    assert same == plain
    assert asked.gradients == plain.gradients + more * plain.parameters
    assert asked.total - plain.total == asked.gradients - plain.gradients


def test_bytes_of_two_buckets_on_their_way() -> None:
    """Level 2 sends copies of the buckets that fill, which here are of one stage's layers."""
    plain, asked = (
        rank_estimates(settings("tied", dp=4, zero=2, precision="bf16", grad_reduce_dtype=name))[0]
        for name in ("auto", "bf16")
    )
    buckets = plain.gradients - plain.parameters  # less a quarter of 4 bytes
    assert asked.gradients - plain.gradients == buckets // 2


def test_precision_must_be_known() -> None:
    config = settings("multi-head")
    with pytest.raises(KeyError, match="auto"):
        rank_estimates(config)[0]


@pytest.mark.parametrize(
    ("schedule", "micro_batches", "live"),
    [
        *(("1f1b", 8, [4, 3, 2, 1]), ("1f1b", 2, [2, 2, 2, 1]), ("1f1b", 1, [1, 1, 1, 1])),
        *(("gpipe", 8, [8, 8, 8, 8]), ("gpipe", 1, [1, 1, 1, 1])),
    ],
)
def test_activations_of_the_micro_batches_that_are_alive(
    schedule: str, micro_batches: int, live: list[int]
) -> None:
    """Inner stages of one layer each: 4 H + q k v + (q k) + context + out + 4 F per token."""
    config = settings(
        "two kv heads",
        **dict(num_layers=4, pp=4, schedule=schedule, precision="fp32", micro_batch_size=3),
        global_batch_size=3 * micro_batches,
    )
    tokens = 3 * 16
    # 8 heads of 6 features, 2 key/value heads.
    per_token = 4 * (4 * 48 + (48 + 2 * 12) + 48 + 48 + 3 * 80)
    specs = stage_specs(config)
    got = [rank_estimates(config)[spec.stage].activations for spec in specs]
    assert got[:3] == [n * tokens * per_token for n in live[:3]]
    assert got[3] == live[3] * tokens * (per_token + 4 * 2 * 48)


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "recompute", "per_token"),
    [
        (1, False, "none", 2 * (4 * 48 + 72 + 48 + 48 + 240)),
        (1, False, "selective", 2 * (4 * 48 + 72 + 48 + 240)),
        (1, False, "full", 2 * 48),
        (2, True, "none", 4 * 48 + 72 + 48 + 48 + 240),
        (2, False, "none", 2 * 4 * 48 + 72 + 48 + 48 + 240),
        (2, True, "full", 48),
        (2, False, "full", 2 * 48),
        # One whole key/value head of 6 features on each of 4 ranks.
        (4, True, "none", 2 * (48 + (12 + 12) + 12 + 12 + 60)),
    ],
)
def test_activations_of_a_layer(
    tp: int, sequence_parallel: bool, recompute: str, per_token: int
) -> None:
    config = settings(
        "two kv heads",
        **dict(tp=tp, sequence_parallel=sequence_parallel, recompute=recompute),
        **dict(num_layers=2, pp=2, precision="bf16", micro_batch_size=1, global_batch_size=1),
    )
    first = stage_specs(config)[0]
    assert rank_estimates(config)[first.stage].activations == 16 * per_token


@pytest.mark.parametrize(
    ("changes", "per_score"),
    [
        (dict(attention="fused-softmax"), 2),
        (dict(attention="fused-softmax", attention_dropout=0.1), 5),
        (dict(attention_dropout=0.1), 5),
        (dict(attention="fused-softmax", recompute="selective"), 0),
    ],
)
def test_weights_of_attention_are_kept_in_place_of_its_output(
    changes: dict[str, Any], per_score: int
) -> None:
    """8 heads of 6 features and 16 keys, over tp 2."""
    of = dict(num_layers=2, pp=2, tp=2, precision="bf16", micro_batch_size=1, global_batch_size=1)
    plain = settings("two kv heads", **of, recompute=changes.get("recompute", "none"))
    config = settings("two kv heads", **of, **changes)
    first = stage_specs(config)[0].stage
    more = rank_estimates(config)[first].activations - rank_estimates(plain)[first].activations
    assert more == (16 * 4 * (16 * per_score - 2 * 6) if per_score else 0)


@pytest.mark.parametrize(
    ("name", "per_element"), [("bf16", 16), ("fp16", 16), ("fp32", 20), ("fp64", 40)]
)
def test_logits_are_on_the_last_stage(name: str, per_element: int) -> None:
    """On a CPU two of the weights' width and three of at least fp32, else one; 112 padded columns
    over tp 2."""
    shape = dict(tp=2, pp=2, precision=name, micro_batch_size=3, seq_length=16)
    config = settings("multi-head", **shape, device="cpu")
    assert config.model.padded_vocab_size(2) == 112
    first, last = rank_estimates(config)
    assert first.logits == 0
    assert last.logits == 3 * 16 * 56 * per_element
    width = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}[name]
    for device in ("cuda", "auto"):
        _, last = rank_estimates(settings("multi-head", **shape, device=device))
        assert last.logits == 3 * 16 * 56 * width


# Arithmetic


def test_flops_by_hand() -> None:
    """6 for each parameter but the embedding's, 12 L h s for scores and their sum."""
    config = settings("two kv heads")
    layer = 2 * 48 * 48 + 2 * 12 * 48 + 3 * 48 * 80 + 2 * 48
    matrices = 5 * layer + 101 * 48 + 48
    assert flops_per_token(config) == 6 * matrices + 12 * 5 * 48 * 16


def test_flops_count_a_tied_head_and_not_the_layout() -> None:
    tied, untied = settings("tied"), settings("two kv heads")
    assert flops_per_token(tied) == flops_per_token(untied)
    assert flops_per_token(settings("tied", tp=4, pp=5, recompute="full")) == flops_per_token(tied)


def test_flops_of_wide_heads_follow_the_heads() -> None:
    config = settings("wide heads")
    matrices = whole_parameters(config) - 101 * 48
    assert flops_per_token(config) == 6 * matrices + 12 * 5 * 80 * 16


def test_the_table_of_levels_marks_the_run_s_and_shrinks() -> None:
    config = run(*"--model llama3-8b --dp 4 --zero 2 --precision bf16".split())
    head, columns, *rows = report.levels(config).splitlines()
    assert head.startswith("ZeRO over 4 data ranks") and "optimizer" in columns
    assert [row.split()[0] for row in rows] == ["0", "1", "*", "3"]
    totals = [float(row.split()[-2]) for row in rows]
    assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]
    assert report.levels(run()) == ""
    assert report.levels(run(*"--dp 2 --pp 2 --post-validation".split())) == ""


def test_measured_memory_stands_beside_what_was_predicted() -> None:
    config = run(*"--pp 2 --precision bf16".split())
    predicted = [estimate.total / 2**30 for estimate in rank_estimates(config)]
    told = report.memory(config, [3 * 2**30, 2**30])
    assert told == (
        f"memory at its peak: pp 0: 3.00 GiB (predicted {predicted[0]:.2f}), "
        f"pp 1: 1.00 GiB (predicted {predicted[1]:.2f})"
    )
    assert "pp 0" not in report.memory(run("--precision", "bf16"), [2**30])


def test_the_planner_tells_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main("--memory --model llama3-8b --tp 4 --dp 8".split()) == 0
    told = capsys.readouterr().out
    assert "ZeRO over 8 data ranks" in told and "gradients 7.48 GiB" in told
    with pytest.raises(ConfigError, match="--zero 7: choose from 0, 1, 2, 3"):
        plan.main("--memory --dp 2 --zero 7".split())


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_buckets_are_those_of_the_modules(zero: int, tied: bool) -> None:
    config = run(*f"--model 1b --num-layers 5 --dp 2 --zero {zero}".split())
    config = config.replace(tie_embeddings=tied)
    (spec,) = stage_specs(config)
    stage = LlamaStage(
        config, spec, tp=TensorGroup(), dtype=torch.bfloat16, device=torch.device("meta")
    )
    buckets = make_buckets({0: stage}, 2, by_layer=zero == 3)
    sizes = [sum(s.parameter.numel() for s in b.slots) for b in buckets if b.decays]
    assert _bucket_sizes(config, [spec]) == sizes
    assert (len(sizes) == 5 + 2 - tied) == (zero == 3)
