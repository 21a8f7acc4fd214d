"""Frozen parameters keep every bit and have no gradient, whatever the layout; the others train as
they do on one rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from commands import run
from pool import RankPool
from torch import Tensor
from worlds import make_trainer, world_groups

from megalite.config import Config
from megalite.layers import linear
from megalite.trainer import Trainer
from megalite.treatment import frozen_names
from megalite.verification.run import Verdict, verify
from megalite.verification.shrink import shrink

STEPS = 4
NOT_FINITE = 2

FRONT = ("model.embed_tokens.*", "model.layers.[01].*")
BACK = ("model.layers.[23].*", "model.norm.*", "lm_head.*")
SPOTS = ("*.self_attn.[qkv]_proj.*", "*.1.mlp.down_proj.*", "*.post_attention_layernorm.*")


def held(trainer: Trainer) -> dict[tuple[str, int], Tensor]:
    """Every named slice on this rank."""
    return {
        (piece.name, piece.start): piece.of(parameter).detach().clone()
        for parameter, shard in trainer.flat.whole_parameters()
        for piece in shard.pieces
        if piece.length
    }


def take_step(trainer: Trainer, step: int) -> Tensor:
    """One of them is skipped: gradients are not finite where there are any."""
    loss = trainer.accumulate(step)
    if step == NOT_FINITE:
        for part in trainer.flat.own_gradients:
            part.mul_(torch.inf)
    return trainer.update(step, loss)


def trained_job(values: dict[str, Any]) -> dict[str, Any]:
    trainer = make_trainer(steps=STEPS, lr=1e-2, lr_warmup_steps=0, clip_grad=1.5, **values)
    frozen = frozen_names(trainer.config)
    before = held(trainer)
    statistics = [take_step(trainer, step) for step in range(STEPS)]
    trainer.optimizer.validate()
    after = held(trainer)
    assert trainer.optimizer.steps.item() == STEPS - 1
    for key, value in after.items():
        assert torch.equal(value, before[key]) == (key[0] in frozen), key
    flat = trainer.flat
    names = {piece.name for slot in flat.slots for piece in slot.shard.pieces}
    assert not names & frozen, "no gradient, no state"
    states = (trainer.optimizer.exp_avg, trainer.optimizer.exp_avg_sq, flat.own_gradients)
    sizes = [sum(part.numel() for part in parts) for parts in states]
    assert sizes[0] == sizes[1] <= sizes[2] <= flat.length
    for stage in trainer.stages.values():
        assert all(p.grad is None for p in stage.parameters())
    return dict(statistics=statistics, weights=after, slots=len(flat.slots))


def trained(pool: RankPool, values: dict[str, Any]) -> list[dict[str, Any]]:
    size = math.prod(values.get(axis, 1) for axis in ("tp", "pp", "dp"))
    return [outcome.value for outcome in pool.run(size, trained_job, values)]


def agrees(pool: RankPool, layout: dict[str, Any]) -> list[dict[str, Any]]:
    """In fp64 all to its rounding against one rank; returns the outcomes of all ranks."""
    alone = {k: v for k, v in layout.items() if k in ("freeze", "tie_embeddings", "num_kv_heads")}
    (want,) = trained(pool, alone | dict(precision="fp64"))
    found = trained(pool, layout | dict(precision="fp64"))
    for outcome in found:
        for ours, theirs in zip(outcome["statistics"], want["statistics"], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-10, equal_nan=True)
        for (name, start), value in outcome["weights"].items():
            whole = want["weights"][name, 0]
            dims = [d for d in range(whole.dim()) if whole.shape[d] != value.shape[d]]
            part = whole.narrow(dims[0], start, value.shape[dims[0]]) if dims else whole
            assert (value - part).abs().max() < 1e-10 * whole.abs().max(), name
    return found


HALVES = dict(pp=2, pp_layers=(2, 2))
QUARTERS = dict(pp=2, pp_layers=(1, 1, 1, 1))
LAYOUTS: list[dict[str, Any]] = [
    dict(**HALVES, schedule="zb-h1", freeze=FRONT),
    dict(**HALVES, dp=2, zero=2, freeze=BACK, tp=2),
    dict(pp=2, tie_embeddings=True, freeze=("lm_head.*", "*norm.weight")),
    dict(tp=2, recompute="full", freeze=SPOTS, num_kv_heads=1),
    dict(**HALVES, dp=2, zero=3, freeze=FRONT, schedule="zb-h1"),
]
MORE: list[dict[str, Any]] = [
    *(
        dict(**cut, schedule=name, freeze=freeze)
        for cut, names in (
            (HALVES, ("gpipe", "1f1b", "zb-h1", "zb-h2")),
            (QUARTERS, ("interleaved", "zb-v", "v-half", "v-min", "dualpipe-v")),
        )
        for name in names
        for freeze in (FRONT, BACK)
    ),
    *(dict(dp=2, zero=zero, pp=2, freeze=SPOTS, schedule="zb-h2") for zero in (0, 1, 2, 3)),
    *(dict(dp=2, zero=zero, freeze=("*_proj.*",)) for zero in (0, 1, 2, 3)),
    *(dict(**HALVES, dp=2, zero=zero, freeze=FRONT, schedule="zb-h1") for zero in (0, 1, 2)),
    dict(**QUARTERS, schedule="interleaved", freeze=FRONT, tp=2),
    dict(pp=2, schedule="zb-v", tie_embeddings=True, freeze=("lm_head.*",)),
    dict(**HALVES, recompute="full", freeze=FRONT),
    dict(pp=2, recompute="selective", freeze=SPOTS, dp=2, zero=1),
    dict(dp=2, zero=3, recompute="full", freeze=SPOTS, tie_embeddings=True),
    dict(pp=4, tp=2, freeze=("*.[03].*", "lm_head.*"), schedule="zb-h1"),
    dict(tp=2, sequence_parallel=False, freeze=("*_proj.*", "lm_head.*")),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_frozen_parameters_stay_and_the_others_train_alike(
    pool: RankPool, layout: dict[str, Any]
) -> None:
    agrees(pool, layout)


@pytest.mark.full
@pytest.mark.parametrize("layout", MORE, ids=str)
def test_frozen_parameters_stay_in_more_layouts(pool: RankPool, layout: dict[str, Any]) -> None:
    agrees(pool, layout)


def test_a_stage_may_be_frozen_whole(pool: RankPool) -> None:
    for freeze, owners in ((FRONT, [0, 2]), (BACK, [2, 0])):
        found = trained(pool, dict(**HALVES, schedule="zb-h1", freeze=freeze))
        assert [min(2, outcome["slots"]) for outcome in found] == owners


@pytest.mark.parametrize("freeze", [FRONT, BACK, SPOTS], ids=str)
def test_steps_begun_before_the_norm_is_known_end_alike(
    pool: RankPool, freeze: tuple[str, ...]
) -> None:
    """Also where no gradient of a rank says when a guess is to be amended."""
    layout = dict(**HALVES, schedule="zb-h1", freeze=freeze)
    plain = trained(pool, layout)
    guessed = trained(pool, layout | dict(post_validation=True))
    for ours, theirs in zip(guessed, plain, strict=True):
        for a, b in zip(ours["statistics"], theirs["statistics"], strict=True):
            assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))
        assert all(torch.equal(w, theirs["weights"][key]) for key, w in ours["weights"].items())


def products_job(freeze: tuple[str, ...]) -> tuple[int, int]:
    """Weight gradients left for later in a step: of all matrices, and of frozen ones."""
    trainer = make_trainer(**HALVES, schedule="zb-h1", freeze=freeze)
    deferred: list[bool] = []
    for stage in trainer.stages.values():
        later = stage.weight_gradients
        right = later.defer

        def seen(weight: Any, *rest: Any, right: Any = right) -> bool:
            deferred.append(weight.requires_grad)
            return right(weight, *rest)

        later.defer = seen  # type: ignore[method-assign]
    trainer.train_step(0)
    return len(deferred), deferred.count(False)


def test_no_weight_gradient_of_a_frozen_matrix_is_left_for_later(pool: RankPool) -> None:
    none = [outcome.value for outcome in pool.run(2, products_job, ())]
    assert [frozen for _, frozen in none] == [0, 0]
    some = [outcome.value for outcome in pool.run(2, products_job, ("*.mlp.down_proj.*",))]
    for (all_of_them, _), (left, frozen) in zip(none, some, strict=True):
        assert (left, frozen) == (3 * all_of_them // 4, 0)


def verify_job(config: Config, fault: bool) -> Verdict:
    groups = world_groups(config)
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            patch.setattr(linear._Linear, "backward", _gradient_anyway(linear._Linear.backward))
        return verify(config, groups, torch.device("cpu"), precisions=("fp64",))


def _gradient_anyway(right: Any) -> Any:
    class Context:
        """As it is, but every weight asks for its gradient."""

        def __init__(self, ctx: Any):
            self._ctx, self.needs_input_grad = ctx, (True, True, False)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._ctx, name)

    return staticmethod(lambda ctx, dy: right(Context(ctx), dy))


VERIFIED = [
    "--pp 2 --schedule zb-h1 --freeze model.embed_tokens.*,model.layers.[01].*",
    "--pp 2 --dp 2 --zero 2 --freeze model.layers.[23].*,model.norm.*,lm_head.*",
    "--tp 2 --tie-embeddings --freeze lm_head.*,*norm.weight --lr-scale *.mlp.*=2",
    "--dp 2 --zero 3 --freeze *.0.self_attn.*,lm_head.*",
    "--pp 2 --post-validation --freeze *_proj.*,lm_head.*",
]


@pytest.mark.parametrize("flags", VERIFIED)
def test_verify(pool: RankPool, flags: str) -> None:
    config = shrink(run(*f"--device cpu --num-layers 4 {flags}".split())).config
    assert frozen_names(config)
    verdict = pool.run(config.world_size, verify_job, config, False)[0].value
    assert verdict.failed is None, verdict.failed


def test_a_gradient_of_a_frozen_matrix_is_noticed(pool: RankPool) -> None:
    config = shrink(run(*"--device cpu --num-layers 4 --freeze *.o_proj.*".split())).config
    with pytest.raises(RuntimeError, match="KeyError"):
        pool.run(1, verify_job, config, True)
