"""Gradients that travel in 16 bits are rounded once on the way and added up in fp32; what is
rounded by chance is rounded alike on all ranks that have a copy, and in every run."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from pool import RankPool
from runs import run_in_pool
from torch import Tensor, nn
from worlds import make_trainer, world_groups

from megalite import verify as verify_program
from megalite.config import Config, TrainConfig
from megalite.data.mixture import prepare_mixture
from megalite.data.splits import open_samples
from megalite.optim import flat as flat_module
from megalite.optim import segments
from megalite.optim.buckets import make_buckets
from megalite.optim.flat import FlatParameters
from megalite.optim.optimizer import Optimizer
from megalite.parallel.group import AxisGroup
from megalite.trainer import Trainer
from megalite.treatment import treatments
from megalite.verification.run import Verdict, verify
from megalite.verification.shrink import shrink
from megalite_kernels import reference

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Reduced:
    """What one rank sent to other data ranks in a step, in order, and what it got of the sums."""

    sent: list[Tensor]
    got: list[Tensor]


def added_up_in_half(patch: pytest.MonkeyPatch) -> None:
    """Each micro-batch's gradient is rounded before it is added."""

    def broken(self: Any, parameter: nn.Parameter, a: Tensor, b: Tensor) -> None:
        self.add(parameter, (a.float() @ b.float()).bfloat16().float())

    patch.setattr(FlatParameters, "add_product", broken)


FAULTS = {"": lambda _: None, "added up in bf16": added_up_in_half}


def reduced_job(values: dict[str, Any], fault: str = "") -> Reduced:
    trainer = make_trainer(global_batch_size=16, **values)
    dp, sent = trainer.groups.dp, []

    def spied(name: str) -> Any:
        right = getattr(AxisGroup, name)

        def call(self: AxisGroup, x: Tensor, **options: Any) -> Any:
            # Losses and counts of tokens travel in fp64 and int64.
            if self in (dp.shards, dp.replicas) and x.dtype in (torch.float32, *HALF.values()):
                sent.append(x.clone())
            return right(self, x, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault](patch)
        for name in ("start_all_reduce", "start_reduce_scatter"):
            patch.setattr(AxisGroup, name, spied(name))
        trainer.accumulate(0)
    return Reduced(sent, [part.clone() for part in trainer.flat.own_gradients])


def reduced(pool: RankPool, values: dict[str, Any], *fault: str) -> list[Reduced]:
    size = math.prod(values.get(axis, 1) for axis in ("tp", "pp", "dp"))
    return [outcome.value for outcome in pool.run(size, reduced_job, values, *fault)]


def is_rounded_once(wide: list[Reduced], narrow: list[Reduced], dtype: torch.dtype) -> bool:
    """Whether what travels is what would travel in fp32, rounded."""
    return all(
        x.dtype == dtype and torch.equal(y.to(dtype), x)
        for one, other in zip(wide, narrow, strict=True)
        for y, x in zip(one.sent, other.sent, strict=True)
    )


def error(wide: list[Reduced], narrow: list[Reduced]) -> float:
    """Largest of any part's relative errors, in root mean squares."""
    pairs = [
        (x, y)
        for one, other in zip(wide, narrow, strict=True)
        for x, y in zip(one.got, other.got, strict=True)
    ]
    assert all(y.dtype == torch.float32 for _, y in pairs)
    return max(((x - y).norm() / x.norm()).item() for x, y in pairs)


LAYOUTS: list[dict[str, Any]] = [
    dict(dp=2, zero=0),
    dict(dp=2, zero=1, pp=2, schedule="zb-h1", tie_embeddings=True),
    dict(dp=2, zero=3, tp=2, num_kv_heads=1),
]
MORE: list[dict[str, Any]] = [
    dict(dp=2, zero=zero, **layout)
    for zero, layout in itertools.product(
        (0, 1, 2, 3), (dict(), dict(tp=2), dict(pp=2, schedule="zb-v"), dict(pp=2, tp=2))
    )
]


def check_reduction(pool: RankPool, layout: dict[str, Any], name: str) -> None:
    own = dict(precision="fp16", loss_scale=64.0) if name == "fp16" else dict()
    wide = reduced(pool, layout | own)
    narrow = reduced(pool, layout | own | dict(grad_reduce_dtype=name))
    assert len(wide[0].sent) > 1
    assert is_rounded_once(wide, narrow, HALF[name])
    unit = torch.finfo(HALF[name]).eps / 2
    assert unit / 10 < error(wide, narrow) < 2 * unit


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_are_rounded_once_on_their_way(pool: RankPool, layout: dict[str, Any]) -> None:
    check_reduction(pool, layout, "bf16")


@pytest.mark.parametrize(
    "layout",
    [dict(dp=2, zero=1), *(pytest.param(layout, marks=pytest.mark.full) for layout in MORE)],
    ids=str,
)
def test_likewise_in_fp16(pool: RankPool, layout: dict[str, Any]) -> None:
    check_reduction(pool, layout, "fp16")


@pytest.mark.full
@pytest.mark.parametrize("layout", MORE, ids=str)
def test_likewise_in_more_layouts(pool: RankPool, layout: dict[str, Any]) -> None:
    check_reduction(pool, layout, "bf16")


@pytest.mark.parametrize("zero", [1, 2])
def test_replicas_of_a_shard_sum_in_it_too(pool: RankPool, zero: int) -> None:
    layout = dict(dp=4, zero=zero, zero_shard_size=2)
    wide = reduced(pool, layout)
    narrow = reduced(pool, layout | dict(grad_reduce_dtype="bf16"))
    assert {x.dtype for one in narrow for x in one.sent} == {torch.bfloat16}
    for own, other in ((0, 2), (1, 3)):
        assert all(map(torch.equal, narrow[own].got, narrow[other].got))
    assert 2**-12 < error(wide, narrow) < 2**-7


def test_a_sum_over_micro_batches_in_bf16_is_found(pool: RankPool) -> None:
    layout = dict(dp=2, zero=1)
    wide = reduced(pool, layout)
    narrow = reduced(pool, layout | dict(grad_reduce_dtype="bf16"), "added up in bf16")
    assert not is_rounded_once(wide, narrow, torch.bfloat16)


def test_one_data_rank_rounds_nothing(pool: RankPool) -> None:
    plain, asked = (reduced(pool, values) for values in ({}, dict(grad_reduce_dtype="bf16")))
    assert error(plain, asked) == 0.0


# The verification


def reduced_unasked(patch: pytest.MonkeyPatch) -> None:
    """Gradients travel in bf16 though nobody asked for it."""
    right = FlatParameters.__init__

    def broken(self: Any, *args: Any, reduce_dtype: torch.dtype, **options: Any) -> None:
        right(self, *args, reduce_dtype=torch.bfloat16, **options)

    patch.setattr(FlatParameters, "__init__", broken)


VERIFY_FAULTS = {"": lambda _: None, "reduced in bf16": reduced_unasked}


def verify_job(config: Config, precision: str, fault: str = "") -> Verdict:
    groups = world_groups(config)
    with pytest.MonkeyPatch.context() as patch:
        VERIFY_FAULTS[fault](patch)
        return verify(config, groups, torch.device("cpu"), precisions=("fp64", precision))


def check_verified(pool: RankPool, flags: str) -> None:
    config = shrink(run(*f"--device cpu --num-layers 4 {flags}".split())).config
    precision = config.train.precision.replace("auto", "fp32")
    verdict = pool.run(config.world_size, verify_job, config, precision)[0].value
    assert verdict.failed is None, verdict.failed
    errors = {result.config.train.precision: result.worst.error for result in verdict.passes}
    assert errors["fp64"] < 1e-11, "the mathematics is verified without rounding"
    assert errors[precision] > 1e-6, "and then what the run does"


@pytest.mark.parametrize(
    "flags",
    [
        "--dp 2 --grad-reduce-dtype bf16",
        "--dp 2 --pp 2 --zero 2 --schedule zb-h1 --precision bf16 --grad-reduce-dtype bf16",
        "--dp 2 --fp16 --grad-reduce-dtype fp16 --loss-scale 8",
    ],
)
def test_verify_raises_no_alarm(pool: RankPool, flags: str) -> None:
    check_verified(pool, flags)


def program_job(argv: list[str]) -> list[tuple[str, str, str]]:
    """What each trainer of the program's rank is asked for."""
    right, seen = Optimizer.__init__, []

    def spied(self: Any, flat: Any, groups: Any, train: TrainConfig, *rest: Any) -> None:
        seen.append((train.precision, train.moments_dtype, train.grad_reduce_dtype))
        right(self, flat, groups, train, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "__init__", spied)
        assert verify_program.main(argv) == 0
    return seen


@pytest.mark.parametrize(
    ("flags", "last", "told"),
    [
        (
            "--grad-reduce-dtype bf16 --moments-dtype bf16",
            ("fp32", "bf16", "bf16"),
            "moments in bf16, gradients summed over dp in bf16; 4 steps in fp64 and fp32",
        ),
        (
            "--precision bf16-pure",
            ("bf16-pure", "auto", "auto"),
            "; 4 steps in fp64 and fp32 and bf16-pure",
        ),
    ],
)
def test_the_program_verifies_what_was_asked_for(
    pool: RankPool, flags: str, last: tuple[str, str, str], told: str
) -> None:
    """The mathematics in fp64 throughout, then the run itself; and it says so."""
    argv = ["--dp", "2", "--device", "cpu", *flags.split()]
    outcome = pool.run(2, program_job, argv)[0]
    assert outcome.value[0] == ("fp64", "auto", "auto") and outcome.value[-1] == last
    assert told in outcome.stdout


@pytest.mark.parametrize("zero", [0, 2])
def test_verify_finds_gradients_that_were_rounded_unasked(pool: RankPool, zero: int) -> None:
    config = shrink(run(*f"--device cpu --dp 2 --zero {zero}".split())).config
    failed = pool.run(2, verify_job, config, "fp32", "reduced in bf16")[0].value.failed
    assert failed is not None and failed.failure.first.kind == "gradient"


# What is rounded stochastically

ROUNDED: dict[str, dict[str, Any]] = {
    "bf16 moments": dict(moments_dtype="bf16"),
    "bf16-pure": dict(precision="bf16-pure"),
}


@dataclass
class Trained:
    """Weights and moments of one rank after some steps: by kind, name and place of the slice."""

    found: dict[tuple[str, str, int], Tensor]
    dtypes: set[torch.dtype]


def own_numbers(patch: pytest.MonkeyPatch) -> None:
    """Each rank draws numbers of its own."""
    right = segments.make_key
    rank = torch.distributed.get_rank()
    patch.setattr(segments, "make_key", lambda *parts: right(rank, *parts))


def rounded_to_nearest(patch: pytest.MonkeyPatch) -> None:
    """As torch rounds."""
    patch.setattr(reference, "round_to_bf16", lambda x, _: x.bfloat16())


def other_steps(patch: pytest.MonkeyPatch) -> None:
    """Numbers are those of the step before."""
    right = reference.random_words
    patch.setattr(reference, "random_words", lambda key, step, at: right(key, step - 1, at))


ROUNDING_FAULTS = {
    "": lambda _: None,
    "own numbers": own_numbers,
    "nearest": rounded_to_nearest,
    "other steps": other_steps,
}


def small_buckets(patch: pytest.MonkeyPatch) -> None:
    """Several for each stage."""

    def make(stages: Any, size: int, _: int, **how: Any) -> Any:
        return make_buckets(stages, size, 3000, **how)

    patch.setattr(flat_module, "make_buckets", make)


def trained_job(values: dict[str, Any], fault: str = "") -> Trained:
    with pytest.MonkeyPatch.context() as patch:
        small_buckets(patch)
        small = dict(steps=5, lr=1e-2, lr_warmup_steps=0, adam_beta2=0.999)
        trainer = make_trainer(**small | values, global_batch_size=8)
        ROUNDING_FAULTS[fault](patch)
        if fault == "own numbers":
            optimizer = trainer.optimizer
            slots, spans = trainer.flat.slots, trainer.flat.spans
            optimizer._segments = segments.segments(slots, spans, treatments(trainer.config), 1234)
        for step in range(5):
            trainer.train_step(step)
        trainer.optimizer.validate()
    flat, optimizer = trainer.flat, trainer.optimizer
    buffers = {"weight": flat.whole(flat.own_parameters)}
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        buffers[kind] = flat.whole(getattr(optimizer, kind))
    found = {
        (kind, piece.name, piece.start): piece.of(slot.of(buffer)).clone()
        for kind, buffer in buffers.items()
        for slot in flat.slots
        for piece in slot.shard.pieces
        if piece.length
    }
    return Trained(found, {x.dtype for x in optimizer.exp_avg + optimizer.exp_avg_sq})


def trained(pool: RankPool, values: dict[str, Any], *fault: str) -> list[Trained]:
    size = math.prod(values.get(axis, 1) for axis in ("tp", "pp", "dp"))
    return [outcome.value for outcome in pool.run(size, trained_job, values, *fault)]


def copies_are_equal(ranks: list[Trained]) -> bool:
    """Whether what several ranks hold of one slice has the same bits on all."""
    held: dict[tuple[str, str, int], Tensor] = {}
    return all(
        torch.equal(held.setdefault(key, tensor), tensor)
        for rank in ranks
        for key, tensor in rank.found.items()
    )


def bits_are_equal(ranks: list[Trained], others: list[Trained]) -> bool:
    """Whether slices that both have are the same."""
    one, other = (
        {k: v for rank in side for k, v in rank.found.items()} for side in (ranks, others)
    )
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


COPIES: list[dict[str, Any]] = [
    dict(dp=2, zero=0),
    dict(tp=2, num_kv_heads=1, pp=2, tie_embeddings=True, schedule="zb-v"),
]
MORE_COPIES: list[dict[str, Any]] = [
    dict(tp=4, num_kv_heads=2),
    dict(pp=2, tie_embeddings=True),
    dict(dp=2, zero=1, tp=2, num_kv_heads=1, tie_embeddings=True),
    dict(dp=2, zero=2, tp=2, pp=2, num_kv_heads=1, tie_embeddings=True),
    dict(dp=4, zero=1, zero_shard_size=2),
    dict(dp=2, zero=3, pp=2, tie_embeddings=True),
]


def check_copies(pool: RankPool, layout: dict[str, Any], which: str) -> None:
    """Copies stay copies, and a run again is the same run."""
    values = layout | dict(precision="bf16") | ROUNDED[which]
    ranks = trained(pool, values)
    assert all(rank.dtypes == {torch.bfloat16} for rank in ranks)
    assert copies_are_equal(ranks)
    assert all(bits_are_equal([a], [b]) for a, b in zip(ranks, trained(pool, values), strict=True))


@pytest.mark.parametrize("which", ROUNDED)
@pytest.mark.parametrize("layout", COPIES, ids=str)
def test_copies_stay_copies(pool: RankPool, layout: dict[str, Any], which: str) -> None:
    check_copies(pool, layout, which)


@pytest.mark.full
@pytest.mark.parametrize("which", ROUNDED)
@pytest.mark.parametrize("layout", MORE_COPIES, ids=str)
def test_more_copies_stay_copies(pool: RankPool, layout: dict[str, Any], which: str) -> None:
    check_copies(pool, layout, which)


@pytest.mark.parametrize("layout", COPIES, ids=str)
def test_ranks_that_draw_numbers_of_their_own_are_found(
    pool: RankPool, layout: dict[str, Any]
) -> None:
    values = layout | dict(precision="bf16") | ROUNDED["bf16 moments"]
    assert not copies_are_equal(trained(pool, values, "own numbers"))


@pytest.mark.parametrize("which", ROUNDED)
def test_what_data_ranks_shard_changes_no_bit(pool: RankPool, which: str) -> None:
    """Of two ranks, whose sums have one order; without clipping, as the norm is summed in other
    pieces."""
    values = dict(dp=2, clip_grad=0.0) | ROUNDED[which]
    plain, sharded = (trained(pool, values | dict(zero=zero)) for zero in (0, 1))
    assert bits_are_equal(plain, sharded)


@pytest.mark.parametrize("fault", ["nearest", "other steps"])
@pytest.mark.parametrize("which", ROUNDED)
def test_other_rounding_is_found(pool: RankPool, which: str, fault: str) -> None:
    """What is compared above depends on how it is rounded."""
    right, wrong = (trained(pool, ROUNDED[which], *how) for how in ((), (fault,)))
    assert not bits_are_equal(right, wrong)


@pytest.mark.parametrize(
    "flags",
    [
        "--tp 2 --pp 2 --moments-dtype bf16 --num-kv-heads 1",
        "--dp 2 --fp16 --moments-dtype bf16 --grad-reduce-dtype bf16",
        "--tp 2 --dp 2 --precision bf16-pure --num-kv-heads 1 --tie-embeddings",
        "--pp 2 --precision bf16-pure --schedule zb-h1 --post-validation",
        "--dp 2 --zero 3 --precision bf16-pure",
    ],
)
def test_verify_raises_no_alarm_over_rounding(pool: RankPool, flags: str) -> None:
    check_verified(pool, flags)


def norm_weights(pool: RankPool, *fault: str, **values: Any) -> Tensor:
    """How far the norm weights, which begin at 1, have moved."""
    small = dict(lr=1e-3, clip_grad=0.0, adam_beta2=0.95)
    (rank,) = trained(pool, small | values, *fault)
    moved = [x for (kind, name, _), x in rank.found.items() if kind == "weight" and "norm" in name]
    return torch.cat(moved).double() - 1.0


def test_weights_without_a_master_take_small_steps(pool: RankPool) -> None:
    """Each is 1/1000, where bf16's are 1/256 and 1/128: to the nearest none is left of them."""
    wanted = norm_weights(pool, precision="fp32")
    assert wanted.abs().median() > 2e-3
    moved = norm_weights(pool, precision="bf16-pure")
    assert abs((moved @ wanted) / (wanted @ wanted) - 1) < 0.3, "right on average"
    assert norm_weights(pool, "nearest", precision="bf16-pure").abs().max() == 0


# At length

LENGTH = (
    "--steps 300 --dp 2 --micro-batch-size 2 --global-batch-size 4 --eval-steps 64 "
    "--sample-length 0"
).split()


@pytest.mark.full
@pytest.mark.parametrize(
    "flags",
    [
        "--precision bf16 --moments-dtype bf16",
        "--precision bf16 --grad-reduce-dtype bf16",
        "--precision bf16-pure",
        "--precision bf16-pure --grad-reduce-dtype bf16",
    ],
)
def test_three_hundred_steps_end_where_fp32_ends(
    pool: RankPool, tmp_path: Path, flags: str
) -> None:
    """The preset `tiny` on the embedded corpus, in small batches, as `docs/precision.md` has it."""
    fp32 = run_in_pool(pool, [*LENGTH, "--precision", "fp32"], 2, tmp_path)
    found = run_in_pool(pool, [*LENGTH, *flags.split()], 2, tmp_path)
    assert fp32.valid_losses[-1] < 2.4, "it has learned more than pairs of neighbours"
    assert found.valid_losses[-1] < 1.02 * fp32.valid_losses[-1]


def distance_job(values: dict[str, Any]) -> tuple[float, float]:
    """Of this rank's gradients in bf16: sum of squared errors, fp32's being right; and of fp32's
    gradients themselves."""
    half = make_trainer(
        precision="bf16", hidden_size=64, seq_length=64, global_batch_size=16, **values
    )
    config = half.config.replace(precision="fp32")
    samples = open_samples(config, prepare_mixture(config.data))
    full = Trainer(config, samples, half.groups, half.device)
    for exact, rounded in zip(full.flat.slots, half.flat.slots, strict=True):
        exact.parameter.data.copy_(rounded.parameter.data)
    for trainer in (half, full):
        trainer.accumulate(0)
    pairs = [
        (x.double(), y.double())
        for x, y in zip(half.flat.own_gradients, full.flat.own_gradients, strict=True)
    ]
    error = sum((x - y).square().sum().item() for x, y in pairs)
    return error, sum(y.square().sum().item() for _, y in pairs)


def distance(pool: RankPool, tp: int) -> float:
    found = [outcome.value for outcome in pool.run(tp, distance_job, dict(tp=tp))]
    error, whole = (sum(each) for each in zip(*found, strict=True))
    return math.sqrt(error / whole)


def test_tensor_parallel_gradients_are_as_near_to_fp32_as_one_rank_s(pool: RankPool) -> None:
    """Ranks round their parts of a product and the sum, one rank rounds the product: other errors,
    and no larger ones."""
    one = distance(pool, 1)
    assert 0.002 < one < 0.05
    for tp in (2, 4):
        assert distance(pool, tp) < 1.25 * one, tp
