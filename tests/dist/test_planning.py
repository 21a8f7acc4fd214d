"""Costs measured on the ranks, plans made by them, and that they never change a number."""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import Any

import torch
from pool import RankPool
from torch import Tensor
from worlds import make_trainer

from megalite.pipeline.actions import Op
from megalite.pipeline.costs import Costs
from megalite.planning.block_costs import ModelCosts
from megalite.planning.measure import measure_costs
from megalite.trainer import MEASURED_STEPS

LAYOUT: dict[str, Any] = dict(pp=2, schedule="zb-v", num_layers=4, global_batch_size=16)


def measured_job() -> ModelCosts:
    trainer = make_trainer(tp=2, pp=2)
    micro_batch = trainer.loader.train_batch(0).micro_batches[0]
    cpu = torch.device("cpu")
    return measure_costs(trainer.config, trainer.groups, cpu, torch.float32, micro_batch)


def test_all_ranks_measure_the_same(pool: RankPool) -> None:
    values = [outcome.value for outcome in pool.run(4, measured_job)]
    assert all(value == values[0] for value in values), "means over all ranks"
    costs = values[0]
    assert costs.message > 0
    for part in (costs.attention, costs.mlp):
        assert all(number > 0 for number in astuple(part))
    for part in (costs.embedding, costs.head):
        assert part.forward > 0 and part.backward > 0
        # Nothing of theirs is left for later: taking nothing up again costs next to nothing.
        assert part.weight_gradient < 0.2 * part.backward


def odd_costs(stages: int) -> Costs:
    """As unlike the default as may be: the last stages are slow, messages cost, weights cost."""
    numbers = tuple(1.0 + stage for stage in range(stages))
    return replace(
        Costs.uniform(stages, message=0.7),
        forward=numbers,
        input_gradient=tuple(2.0 * number for number in reversed(numbers)),
        weight_gradient=tuple(0.3 * number for number in numbers),
        kept=(1e6,) * stages,
        kept_for_weights=(5e5,) * stages,
    )


def trained_job(by_costs: bool) -> tuple[Tensor, list[list[float]], str]:
    """Two steps; weights, statistics, and the actions of this rank."""
    trainer = make_trainer(**LAYOUT)
    if by_costs:
        trainer._costs = odd_costs(4)
        trainer._programs.clear()
    statistics = [trainer.train_step(step).tolist() for step in range(2)]
    program = trainer._program(trainer.config.num_micro_batches)
    order = program.plan.ranks[trainer.groups.pp.rank]
    return trainer.flat.parameters.clone(), statistics, " ".join(map(str, order))


def test_where_weight_gradients_are_placed_changes_no_bit(pool: RankPool) -> None:
    for alike, by_costs in zip(
        pool.run(2, trained_job, False), pool.run(2, trained_job, True), strict=True
    ):
        (weights, statistics, order), (others, other_statistics, other_order) = (
            alike.value,
            by_costs.value,
        )
        assert order != other_order, "the costs have an effect"
        assert statistics == other_statistics
        assert torch.equal(weights, others)


def replanned_job() -> tuple[Costs | None, str]:
    """A whole run; the costs that its plan follows in the end."""
    trainer = make_trainer(**LAYOUT, steps=MEASURED_STEPS[-1] + 1, eval_steps=0)
    trainer.fit(None)
    program = trainer._program(trainer.config.num_micro_batches)
    return trainer._costs, " ".join(str(action) for order in program.plan.ranks for action in order)


def test_a_run_plans_by_what_its_steps_took(pool: RankPool) -> None:
    (costs, plan), (other_costs, other_plan) = (o.value for o in pool.run(2, replanned_job))
    assert costs == other_costs, "all ranks agree"
    assert plan == other_plan
    assert costs is not None
    assert all(number > 0 for number in (*costs.forward, *costs.input_gradient))
    assert all(number > 0 for number in costs.weight_gradient)
    assert costs.kept[0] > 0 and str(Op.WEIGHT_GRADIENT) in plan


def untouched_job() -> Costs | None:
    trainer = make_trainer(pp=2, steps=MEASURED_STEPS[-1] + 1, eval_steps=0)
    trainer.fit(None)
    return trainer._costs


def test_whole_backwards_are_not_measured(pool: RankPool) -> None:
    assert [outcome.value for outcome in pool.run(2, untouched_job)] == [None, None]
