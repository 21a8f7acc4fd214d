"""Costs measured on the ranks, plans made by them, and that they never change a number."""

from __future__ import annotations

import gc
from dataclasses import astuple, replace
from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from held import held_for_weights
from pool import RankPool
from torch import Tensor
from worlds import make_trainer, world_groups

from megalite import trainer as trainer_module
from megalite.config import Config, resolve
from megalite.errors import ConfigError
from megalite.estimate import kept_for_weights_bytes
from megalite.models.stage import StageSpec
from megalite.optim.flat import FlatParameters
from megalite.pipeline.actions import Op
from megalite.pipeline.costs import Costs
from megalite.pipeline.lower import lower
from megalite.pipeline.schedules import SCHEDULES
from megalite.planning import shared
from megalite.planning.block_costs import ModelCosts, estimated_costs
from megalite.planning.measure import measure_costs
from megalite.planning.shared import from_first_rank, sum_over_ranks
from megalite.trainer import MEASURED_STEPS

LAYOUT: dict[str, Any] = dict(pp=2, schedule="zb-v", num_layers=4, global_batch_size=16)
CPU = torch.device("cpu")


def small(ranks: int, **values: Any) -> Config:
    """A small run, resolved for a world of so many ranks."""
    sizes = dict(num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48)
    batch = dict(seq_length=16, micro_batch_size=2, global_batch_size=16, steps=4)
    kind = dict(precision="fp32", device="cpu")
    return resolve(Config().replace(**sizes, **batch, **kind, **values), ranks)


def measured_job() -> ModelCosts:
    trainer = make_trainer(tp=2, pp=2)
    micro_batch = trainer.loader.train_batch(0).micro_batches[0]
    cpu = torch.device("cpu")
    return measure_costs(trainer.config, trainer.groups, cpu, torch.float32, micro_batch)


def left_over_job() -> int:
    """How many flat buffers are left beside the trainer's own."""
    trainer = make_trainer(tp=2, pp=2)
    micro_batch = trainer.loader.train_batch(0).micro_batches[0]
    cpu = torch.device("cpu")
    gc.collect()
    gc.disable()
    before = sum(type(each) is FlatParameters for each in gc.get_objects())
    measure_costs(trainer.config, trainer.groups, cpu, torch.float32, micro_batch)
    after = sum(type(each) is FlatParameters for each in gc.get_objects())
    gc.enable()
    return after - before


def test_nothing_measured_stays_in_memory(pool: RankPool) -> None:
    assert [outcome.value for outcome in pool.run(4, left_over_job)] == [0] * 4


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


def sums_job() -> list[str]:
    """A sum that rounding makes depend on its order, told as its bits."""
    groups = world_groups(small(8, tp=2, pp=2))
    numbers = torch.tensor([0.1, 1e16, -1e16, 0.3], dtype=torch.float64).roll(groups.world_rank)
    return [number.hex() for number in sum_over_ranks(numbers, groups).tolist()]


def test_sums_are_the_same_bits_on_all_ranks(pool: RankPool) -> None:
    first, *others = [outcome.value for outcome in pool.run(8, sums_job)]
    assert all(other == first for other in others)


def first_rank_job() -> float:
    groups = world_groups(small(8, tp=2, pp=2))
    mine = torch.tensor([7.0 + groups.world_rank])
    return from_first_rank(mine, groups).item()


def test_the_first_rank_tells_all(pool: RankPool) -> None:
    assert [outcome.value for outcome in pool.run(8, first_rank_job)] == [7.0] * 8


def limit_job() -> float:
    """GPUs of unlike memory, the smallest in the middle of the grid."""
    config = small(4, tp=2, pp=2)
    groups = world_groups(config)
    own = (4e9, 3e9, 1e9, 2e9)[groups.world_rank]
    with mock.patch.object(shared, "_usable", return_value=own):
        return shared.memory_limit(config, groups, CPU)


def test_the_smallest_gpu_limits_all(pool: RankPool) -> None:
    assert [outcome.value for outcome in pool.run(4, limit_job)] == [1e9] * 4


def choice_job(limit: float) -> tuple[str, Costs | None, int]:
    """What is chosen, or why nothing is; its costs; and how many plans this rank made."""
    config = small(2, pp=2, schedule="auto")
    groups = world_groups(config)
    costs = estimated_costs(config)
    with mock.patch.object(shared, "predict", wraps=shared.predict) as predict:
        try:
            best, choices = shared.choose_on_first_rank(config, costs, limit, groups, CPU)
        except ConfigError as error:
            return str(error), None, predict.call_count
    assert (best in choices) == (groups.world_rank == 0), "what the table marks"
    return best.config.parallel.schedule, best.costs, predict.call_count


def test_only_the_first_rank_plans(pool: RankPool) -> None:
    first, second = (o.value for o in pool.run(2, choice_job, float("inf")))
    assert first[:2] == second[:2]
    assert first[0] in SCHEDULES
    assert first[2] > 5 and second[2] == 0


def test_all_ranks_refuse_alike(pool: RankPool) -> None:
    first, second = (o.value for o in pool.run(2, choice_job, 1.0))
    assert first[:2] == second[:2]
    assert "no schedule fits" in first[0]


def test_a_limit_binds_from_the_first_step(pool: RankPool) -> None:
    """Where no memory is left, each weight gradient follows its input gradient at once."""
    free, tight = (pool.run(2, left_for_later_job, gib)[0].value for gib in (0.0, 1e-6))
    assert free > 0
    assert tight == 0


def left_for_later_job(memory_limit: float) -> int:
    """Input gradients of rank 0 that something else follows than their weight gradient."""
    trainer = make_trainer(**LAYOUT, memory_limit=memory_limit)
    order = trainer.programs.training(trainer.config.num_micro_batches).plan.ranks[0]
    return sum(
        after != replace(action, op=Op.WEIGHT_GRADIENT)
        for action, after in pairwise(order)
        if action.op is Op.INPUT_GRADIENT
    )


def held_job(sequence_parallel: bool, recompute: str) -> tuple[int, int]:
    """Bytes held for the weight gradients of an inner stage, and estimated."""
    config = small(2, tp=2, sequence_parallel=sequence_parallel, recompute=recompute)
    spec = StageSpec(1, 2, 3, has_embedding=False, has_head=False)
    held = held_for_weights(config, spec, world_groups(config).tp)
    return held, kept_for_weights_bytes(config, spec)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_ranks_hold_what_is_estimated(
    pool: RankPool, sequence_parallel: bool, recompute: str
) -> None:
    for outcome in pool.run(2, held_job, sequence_parallel, recompute):
        held, estimated = outcome.value
        assert held == estimated > 0


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
        trainer.programs.replan(odd_costs(4))
    statistics = [trainer.train_step(step).tolist() for step in range(2)]
    program = trainer.programs.training(trainer.config.num_micro_batches)
    order = program.plan.ranks[trainer.groups.pp.rank]
    return trainer.flat.whole(trainer.flat.own_parameters), statistics, " ".join(map(str, order))


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


def replanned_job(**flags: Any) -> tuple[Costs, str]:
    """A whole run; the costs that its plan follows in the end."""
    trainer = make_trainer(**flags, steps=MEASURED_STEPS[-1] + 1, eval_steps=0)
    trainer.fit(None)
    program = trainer.programs.training(trainer.config.num_micro_batches)
    return trainer.programs.costs, " ".join(
        str(action) for order in program.ranks for action in order
    )


def test_a_run_plans_by_what_its_steps_took(pool: RankPool) -> None:
    job = partial(replanned_job, **LAYOUT)
    (costs, program), (other_costs, other_program) = (o.value for o in pool.run(2, job))
    assert costs == other_costs, "all ranks agree"
    assert program == other_program
    assert all(number > 0 for number in (*costs.forward, *costs.input_gradient))
    assert all(number > 0 for number in costs.weight_gradient)
    assert costs.message > 0 and costs.kept[0] > 0 and str(Op.WEIGHT_GRADIENT) in program


SKEWED = dict(forward=(9.0, 1.0), backward=(1.0, 9.0), message=0.5)


def replaced_job() -> tuple[bool, bool]:
    """Whether the programs at the end follow what was measured, and differ from the first ones."""
    trainer = make_trainer(pp=2, steps=MEASURED_STEPS[-1] + 1, eval_steps=0)
    count = trainer.config.num_micro_batches
    getters = (trainer.programs.training, trainer.programs.evaluating)
    before = [get(count).ranks for get in getters]
    skewed = replace(trainer.programs.costs, **SKEWED)
    with mock.patch.object(trainer_module, "recorded_costs", return_value=skewed):
        trainer.fit(None)
    programs = [get(count) for get in getters]
    follow = all(program == lower(program.plan, skewed) for program in programs)
    return follow, before != [program.ranks for program in programs]


def test_messages_are_placed_by_what_was_measured(pool: RankPool) -> None:
    assert [outcome.value for outcome in pool.run(2, replaced_job)] == [(True, True)] * 2


def test_whole_backwards_are_measured_for_their_messages(pool: RankPool) -> None:
    job = partial(replanned_job, pp=2)
    (costs, program), other = (o.value for o in pool.run(2, job))
    assert (costs, program) == other, "all ranks agree"
    assert all(number > 0 for number in (*costs.forward, *costs.backward, costs.message))
    assert not any(costs.input_gradient) and str(Op.WEIGHT_GRADIENT) not in program
