"""ZeRO: what data ranks shard changes no number, and nothing whole is kept of it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from commands import run
from pool import RankPool
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import make_trainer, world_groups

from megalite.config import Config, resolve
from megalite.layers.shard import Piece, initialize
from megalite.models.llama import LlamaStage
from megalite.models.stage import stage_specs
from megalite.optim import flat as flat_module
from megalite.optim.flat import FlatParameters
from megalite.optim.offload import Offloaded
from megalite.parallel.group import AxisGroup
from megalite.pipeline.channels import is_message
from megalite.pipeline.schedules import SCHEDULES
from megalite.report import layout_words
from megalite.trainer import Trainer
from megalite.verification.run import Verdict, verify
from megalite.verification.shrink import shrink

STEPS = 4
NOT_FINITE = 2
SMALL_BUCKETS = 3000
"""Elements: several buckets for each stage of the small model."""

Named = dict[tuple[str, str, int], Tensor]
"""(what, name of the whole tensor, where the slice begins) -> its values."""


@contextmanager
def small_buckets() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        right = flat_module.make_buckets
        patch.setattr(
            flat_module,
            "make_buckets",
            lambda stages, size, _, **how: right(stages, size, SMALL_BUCKETS, **how),
        )
        yield


def named(flat: FlatParameters, what: str, buffer: Tensor) -> Named:
    def key(piece: Piece) -> tuple[str, str, int]:
        return what, piece.name, piece.start

    return {
        key(piece): piece.of(slot.of(buffer)).detach().clone()
        for slot in flat.slots
        for piece in slot.shard.pieces
        if piece.length
    }


def trained_job(values: dict[str, Any]) -> tuple[list[Tensor], Named, int]:
    """Steps of which one is skipped; returns statistics, weights with states, number of buckets."""
    with small_buckets():
        trainer = make_trainer(
            **{"steps": STEPS, "lr": 1e-2, "lr_warmup_steps": 0, "clip_grad": 1.5, **values}
        )
    statistics = [take_step(trainer, step) for step in range(STEPS)]
    optimizer, flat = trainer.optimizer, trainer.flat
    optimizer.validate()
    found = named(flat, "weight", flat.whole(flat.own_parameters))
    for what in ("master", "exp_avg", "exp_avg_sq"):
        parts = getattr(optimizer, what)
        if all(map(len, parts)):  # Muon keeps one moment
            found |= named(flat, what, flat.whole(parts))
    assert optimizer.steps.item() == STEPS - 1
    return statistics, found, len(flat._buckets)


def take_step(trainer: Trainer, step: int) -> Tensor:
    groups = trainer.groups
    if step != NOT_FINITE or groups.world_rank != groups.topology.world_size - 1:
        return trainer.train_step(step)
    parameter = trainer.flat.slots[-1].parameter
    handle = parameter.register_hook(lambda gradient: gradient * torch.inf)
    statistics = trainer.train_step(step)
    handle.remove()
    return statistics


def trained(pool: RankPool, values: dict[str, Any]) -> list[tuple[list[Tensor], Named, int]]:
    size = math.prod(values.get(axis, 1) for axis in ("tp", "pp", "dp"))
    return [outcome.value for outcome in pool.run(size, trained_job, values)]


def difference(one: Any, other: Any) -> float:
    """Largest difference of anything, relative to each tensor's largest value."""
    worst = 0.0
    for (a_statistics, a, _), (b_statistics, b, _) in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        pairs = [*zip(a_statistics, b_statistics, strict=True), *((a[k], b[k]) for k in a)]
        for x, y in pairs:
            x, y = x.double().nan_to_num(-1.0), y.double().nan_to_num(-1.0)
            worst = max(worst, ((x - y).abs().max() / x.abs().max().clamp(min=1e-30)).item())
    return worst


def without_norms(outcomes: Any) -> Any:
    """With the losses alone of the statistics."""
    return [([x[1] for x in statistics], found, n) for statistics, found, n in outcomes]


LAYOUTS: list[dict[str, Any]] = [
    dict(dp=2, precision="bf16"),
    dict(dp=2, pp=2, tie_embeddings=True, schedule="zb-h1"),
    dict(dp=2, tp=2, num_kv_heads=1),
    dict(dp=2, lr_scale=("*.q_proj.*=3", "*.down_proj.*=0.3"), weight_decay_for=("*norm*=0.2",)),
]
MORE: list[dict[str, Any]] = [
    dict(dp=2, tp=2, num_kv_heads=1, optimizer="muon", precision="bf16"),
    dict(dp=4, pp=2, tie_embeddings=True, optimizer="muon"),
    dict(dp=4),
    dict(dp=2, freeze=("model.embed_tokens.*", "*.mlp.*", "model.norm.*"), precision="bf16"),
    dict(dp=2, pp=2, freeze=("model.layers.0.*", "model.embed_tokens.*"), schedule="zb-h1"),
    dict(dp=2),
    dict(dp=2, tie_embeddings=True),
    dict(dp=2, tp=2, precision="bf16", tie_embeddings=True),
    dict(dp=2, pp=2, schedule="zb-v", tie_embeddings=True),
    dict(dp=2, pp=2, schedule="interleaved", precision="bf16"),
    dict(dp=2, pp=2, schedule="dualpipe-v"),
    dict(dp=2, pp=2, tp=2, schedule="zb-h2", num_kv_heads=1, tie_embeddings=True),
    dict(dp=2, recompute="full", hidden_dropout=0.1),
    dict(dp=4, tp=2, precision="bf16"),
    dict(dp=2, optimizer="muon"),
    dict(dp=4, tp=2, optimizer="muon", precision="bf16"),
    dict(dp=2, pp=2, tp=2, schedule="zb-v", optimizer="muon", tie_embeddings=True),
]


def check_levels(pool: RankPool, layout: dict[str, Any]) -> None:
    """In fp64 all to its rounding; and levels 1 and 0 in the same bits where the order of sums is
    the same: of two ranks, and without the norm, which is summed in other pieces."""
    if layout["dp"] == 2:
        unclipped = layout | dict(clip_grad=0.0)
        plain = trained(pool, unclipped | dict(zero=0))
        assert min(buckets for _, _, buckets in plain) > 3
        sharded = trained(pool, unclipped | dict(zero=1))
        assert difference(without_norms(plain), without_norms(sharded)) == 0.0
    double = layout | dict(precision="fp64")
    plain = trained(pool, double | dict(zero=0))
    sharded = [dict(zero=level) for level in (1, 2, 3)]
    if layout["dp"] == 4:
        sharded += [dict(zero=level, zero_shard_size=2) for level in (1, 2, 3)]
    for how in sharded:
        assert difference(plain, trained(pool, double | how)) < 1e-11, how


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_levels_train_alike(pool: RankPool, layout: dict[str, Any]) -> None:
    check_levels(pool, layout)


@pytest.mark.full
@pytest.mark.parametrize("layout", MORE, ids=str)
def test_levels_train_alike_in_more_layouts(pool: RankPool, layout: dict[str, Any]) -> None:
    check_levels(pool, layout)


OFFLOADED: list[dict[str, Any]] = [
    dict(precision="bf16"),
    dict(dp=2, precision="bf16", zero=3),
    dict(dp=2, pp=2, optimizer="muon", tie_embeddings=True),
]


@pytest.mark.parametrize("layout", OFFLOADED, ids=str)
def test_states_on_the_host_change_no_bit(pool: RankPool, layout: dict[str, Any]) -> None:
    here, away = (trained(pool, layout | dict(offload_optimizer=on)) for on in (False, True))
    assert difference(here, away) == 0.0


def test_states_that_do_not_come_back_are_missed(pool: RankPool) -> None:
    layout = dict(precision="bf16", offload_optimizer=True)
    lost = [outcome.value for outcome in pool.run(1, lost_job, layout)]
    assert difference(trained(pool, layout), lost) > 1e-3


def lost_job(values: dict[str, Any]) -> tuple[list[Tensor], Named, int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Offloaded, "_send_back", lambda *_: None)
        return trained_job(values)


@dataclass
class Late:
    """A gather that runs only when somebody waits for it."""

    whole: Tensor
    gather: Callable[[], Tensor] | None

    def wait(self) -> Tensor:
        if self.gather is not None:
            self.gather()
            self.gather = None
        return self.whole


def late_job(values: dict[str, Any]) -> tuple[list[Tensor], Named, int]:
    """As `trained_job`, where what a module does not wait for never comes."""
    right = AxisGroup.start_all_gather_into

    def late(self: Any, whole: Tensor, own: Tensor) -> Any:
        return Late(whole, lambda: right(self, whole, own).wait())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AxisGroup, "start_all_gather_into", late)
        return trained_job(values)


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize(
    "layout", [dict(dp=2), dict(dp=2, pp=2, schedule="zb-v", tie_embeddings=True)], ids=str
)
def test_every_module_waits_for_its_parameters(
    pool: RankPool, layout: dict[str, Any], zero: int
) -> None:
    size = layout["dp"] * layout.get("pp", 1)
    found = [outcome.value for outcome in pool.run(size, late_job, layout | dict(zero=zero))]
    assert difference(trained(pool, layout | dict(zero=zero)), found) == 0.0


@dataclass
class Gathers:
    """What the gathers of two steps at level 3 did on one rank.

    Attributes:
        whole: the most buckets that were whole at a time.
        late: gathers that began when their bucket was needed.
        count: of gathers.
        actions: of the two steps.
        elements: whole between steps: those of norm weights.
        norms: elements of the norm weights' buckets.
    """

    whole: int
    late: int
    count: int
    actions: int
    elements: int
    norms: int


def gathers_job(values: dict[str, Any]) -> Gathers:
    trainer = make_trainer(**{"steps": 3, "num_layers": 4, "zero": 3, **values})
    flat = trainer.flat
    gathered = flat._gathered
    assert gathered is not None
    used: list[int] = []
    started: list[tuple[int, bool]] = []
    most = 0
    right_use, right_gather = gathered.use, gathered._gather

    def whole() -> list[int]:
        return [n for n, w in gathered._wholes.items() if w.untyped_storage().nbytes()]

    def use(number: int) -> None:
        used.append(number)
        right_use(number)

    def gather(number: int) -> Any:
        nonlocal most
        if number not in gathered._there:
            started.append((number, used[-1:] == [number]))
        pending = right_gather(number)
        most = max(most, len(whole()))
        return pending

    gathered.use, gathered._gather = use, gather  # type: ignore[method-assign]
    for step in range(2):
        trainer.train_step(step)
    program = trainer.programs.training(2).ranks[trainer.groups.pp.rank]
    actions = sum(not is_message(action) for action in program)
    late = sum(is_late for _, is_late in started)
    norms = sum(bucket.length for bucket in flat._buckets if not bucket.decays)
    elements = sum(w.untyped_storage().nbytes() for w in flat._wholes) // flat.dtype.itemsize
    return Gathers(most, late, len(started), 2 * actions, elements, norms)


@pytest.mark.parametrize("values", [dict(), dict(pp=2, schedule="zb-h1"), dict(recompute="full")])
def test_level_3_gathers_a_layer_ahead_and_gives_it_back(
    pool: RankPool, values: dict[str, Any]
) -> None:
    layout = dict(dp=2, global_batch_size=8, micro_batch_size=2)
    size = 2 * values.get("pp", 1)
    for outcome in pool.run(size, gathers_job, {**layout, **values}):
        found = outcome.value
        assert found.whole == 2, "one in use and the next"
        assert found.count > found.actions
        assert found.late == 2, "the first of each step alone, when weights have just changed"
        assert found.elements == found.norms


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--dp 4", "ZeRO 1"),
        ("--dp 4 --zero 2 --zero-shard-size 2", "ZeRO 2 over 2"),
        ("--dp 4 --zero 0", "ZeRO 0"),
        ("--tp 2", "sequence parallel"),
    ],
)
def test_the_layout_says_what_is_sharded(flags: str, told: str) -> None:
    assert layout_words(run(*flags.split())).endswith(f"ranks, {told}")


class Alive(TorchDispatchMode):
    """Bytes of storages of a dtype that are alive, and the most there have been."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.now, self.most = dtype, 0, 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype == self.dtype:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._seen:
            return
        self._seen.add(address)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.now -= size


def memory_job(shards_gradients: bool) -> tuple[int, int, int]:
    """Most bytes in fp32 at any time in the backwards of a bf16 stage; those of all gradients; and
    of this rank's share with two buckets, gloo's own copy of one, and what is no gradient."""
    config = resolve(
        Config().replace(dp=4, hidden_size=64, ffn_hidden_size=128, seq_length=8, vocab_size=257)
    )
    groups = world_groups(config)
    (spec,) = stage_specs(config)
    device = torch.device("cpu")
    stage = LlamaStage(config, spec, tp=groups.tp, dtype=torch.bfloat16, device=device)
    initialize(stage, 5)
    tokens = torch.randint(0, 257, (1, 9), generator=torch.Generator().manual_seed(1))

    def backward() -> None:
        stage.token_losses(stage(tokens[:, :-1]), tokens[:, 1:]).sum().backward()

    with Alive(torch.float32) as others:
        backward()
    stage.zero_grad()
    with Alive(torch.float32) as alive:
        flat = FlatParameters(
            {0: stage}, groups, shards_gradients=shards_gradients, bucket_elements=SMALL_BUCKETS
        )
        flat.zero_gradients()
        for last in (False, True):
            if last:
                flat.begin_last_gradients(0, deferred=False)
            backward()
        flat.end_last_gradients(0)
        flat.finish_reduction()
    matrices, norms = (
        max(bucket.length for bucket in flat._buckets if bucket.decays is decays)
        for decays in (True, False)
    )
    count = flat.length
    own = count // 4 + 2 * (matrices + norms) + matrices
    return alive.most, 4 * count, 4 * own + others.most


def test_level_2_never_holds_a_full_gradient(pool: RankPool) -> None:
    for outcome in pool.run(4, memory_job, True):
        most, whole, own = outcome.value
        assert most <= own < whole
    for outcome in pool.run(4, memory_job, False):
        most, whole, _ = outcome.value
        assert most >= whole, "what is counted sees a full gradient"


def verify_job(config: Config) -> Verdict:
    groups = world_groups(config)
    with small_buckets():
        return verify(config, groups, torch.device("cpu"), precisions=("fp64", "fp32"))


VERIFIED = [
    "--dp 2 --zero 1",
    "--dp 2 --zero 2 --tie-embeddings",
    "--dp 2 --pp 2 --zero 2 --schedule zb-h1",
    "--dp 2 --tp 2 --zero 2",
    "--dp 4 --zero 1 --zero-shard-size 2",
    "--dp 2 --zero 3 --tie-embeddings",
    "--dp 2 --pp 2 --zero 3 --schedule zb-v",
    "--dp 2 --tp 2 --zero 3 --recompute full",
    "--dp 2 --tp 2 --zero 1 --optimizer muon",
    "--dp 4 --zero 2 --tie-embeddings --optimizer muon",
    "--dp 2 --pp 2 --zero 0 --schedule zb-v --optimizer muon",
    "--dp 2 --tp 2 --zero 3 --optimizer muon",
]
MORE_VERIFIED = [
    f"{layout} --zero {zero}{tied} --optimizer {optimizer}"
    for layout in (
        *("--dp 2", "--dp 4", "--dp 2 --tp 2", "--dp 2 --pp 2", "--dp 2 --tp 2 --pp 2"),
        *(f"--dp 2 --pp 2 --schedule {name}" for name in SCHEDULES),
    )
    for zero in (0, 1, 2, 3)
    for tied in ("", " --tie-embeddings")
    for optimizer in ("adamw", "muon")
]


def check_verified(pool: RankPool, flags: str) -> None:
    config = shrink(run(*f"--device cpu --num-layers 4 {flags}".split())).config
    words = flags.split()
    assert config.parallel.zero == int(words[words.index("--zero") + 1])
    verdict = pool.run(config.world_size, verify_job, config)[0].value
    assert verdict.failed is None, verdict.failed


@pytest.mark.parametrize("flags", VERIFIED)
def test_verify(pool: RankPool, flags: str) -> None:
    check_verified(pool, flags)


@pytest.mark.full
@pytest.mark.parametrize("flags", MORE_VERIFIED)
def test_verify_more(pool: RankPool, flags: str) -> None:
    check_verified(pool, flags)
