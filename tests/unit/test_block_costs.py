"""Costs of a model's parts, of the stages made of them, and what is chosen by them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from commands import run

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.estimate import kept_bytes, kept_for_weights_bytes
from megalite.models.stage import head_cost_in_layers, stage_specs
from megalite.planning.block_costs import BlockCosts, ModelCosts, estimated_costs, stage_costs
from megalite.planning.choice import choose, has_choice, predictions, table, without_choice

FLAGS = ("--model", "1b", "--pp", "4", "--micro-batch-size", "1", "--global-batch-size", "16")


def config(*flags: str) -> Config:
    return run(*FLAGS, "--precision", "bf16", *flags)


def part(number: float) -> BlockCosts:
    """A part each of whose costs is a multiple of a power of ten of its own."""
    return BlockCosts(*(number * 10.0**-i for i in range(6)))


PARTS = ModelCosts(part(1.0), part(2.0), part(3.0), part(5.0), message=0.25)


def test_a_stage_costs_what_its_parts_do() -> None:
    whole = config("--num-layers", "4", "--pp-layers", "1,1.5,0.5,1")
    costs = stage_costs(whole, PARTS)
    # Embedding and a layer; a layer and an attention; an MLP; a layer and the head.
    assert costs.forward == pytest.approx((1 + 5, 5 + 2, 3, 5 + 5))
    assert costs.backward == pytest.approx((0.6, 0.7, 0.3, 1.0))
    assert costs.input_gradient == pytest.approx((0.06, 0.07, 0.03, 0.1))
    assert costs.weight_gradient == pytest.approx((0.006, 0.007, 0.003, 0.01))
    assert costs.kept_for_weights == pytest.approx((6e-5, 7e-5, 3e-5, 1e-4))
    assert costs.message == 0.25


def test_estimates_are_in_forwards_of_a_layer() -> None:
    given = config()
    costs = estimated_costs(given)
    assert costs.attention.forward + costs.mlp.forward == pytest.approx(1.0)
    assert costs.head.forward == head_cost_in_layers(given)
    # Matrices take as long for each side; attention's scores have no weights.
    assert costs.mlp.input_gradient == costs.mlp.weight_gradient == costs.mlp.forward
    assert costs.attention.weight_gradient < costs.attention.forward < costs.attention.backward
    assert costs.head.weight_gradient == 0.0, "never left for later"
    assert costs.head.backward == 2 * costs.head.forward
    per_layer = costs.attention.kept + costs.mlp.kept
    spec = stage_specs(given)[1]
    assert kept_bytes(given, spec) == pytest.approx(per_layer * spec.num_layers)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_stages_keep_what_is_estimated_of_them(recompute: str) -> None:
    """The parts' sizes add up, also where a layer that is computed again keeps one input for two
    blocks, and the halves of a cut layer one each."""
    given = config("--recompute", recompute, "--num-layers", "4", "--pp-layers", "1,1.5,0.5,1")
    costs = stage_costs(given, estimated_costs(given))
    specs = stage_specs(given)
    assert costs.kept == tuple(kept_bytes(given, spec) for spec in specs)
    assert costs.kept_for_weights == tuple(kept_for_weights_bytes(given, spec) for spec in specs)
    if recompute == "full":
        assert costs.kept_for_weights[0] > 10 * costs.kept[0]


def test_one_stage_leaves_nothing_to_choose() -> None:
    alone = config("--pp", "1", "--schedule", "auto")
    assert not has_choice(alone)
    assert without_choice(alone).parallel.schedule == "1f1b"
    for flags in (("--pp", "1", "--chunks", "2"), ("--pp", "4")):
        several = config(*flags, "--schedule", "auto")
        assert has_choice(several)
        assert without_choice(several) is several


def test_what_is_computed_again_belongs_to_the_input_gradient() -> None:
    none, full = (estimated_costs(config("--recompute", r)) for r in ("none", "full"))
    for name in ("attention", "mlp"):
        before, after = getattr(none, name), getattr(full, name)
        assert after.input_gradient == before.input_gradient + before.forward
        assert after.weight_gradient == before.weight_gradient
        assert after.kept < before.kept


def test_the_fastest_that_fits_is_chosen() -> None:
    choices = predictions(config(), estimated_costs(config()), limit=float("inf"))
    best = choose(choices, float("inf"))
    assert best.step_time <= min(choice.step_time for choice in choices) / 0.995
    tight = 1.001 * min(choice.memory for choice in choices)
    fitting = choose(predictions(config(), estimated_costs(config()), tight), tight)
    assert fitting.memory <= tight < best.memory
    with pytest.raises(ConfigError, match="no schedule fits"):
        choose(predictions(config(), estimated_costs(config()), 1.0), 1.0)


def test_among_those_as_fast_the_one_that_needs_least_memory_is_chosen() -> None:
    alone = config("--pp", "1")
    choices = predictions(alone, estimated_costs(alone), float("inf"))
    assert len({round(choice.step_time, 6) for choice in choices}) == 1, "no one waits"
    assert choose(choices, float("inf")).config.parallel.schedule == "1f1b"


def test_given_chunks_and_layers_narrow_the_choice() -> None:
    costs = estimated_costs(config())
    two = predictions(config("--chunks", "2", "--schedule", "auto"), costs, float("inf"))
    assert {choice.config.parallel.chunks for choice in two} == {2}
    split = ["--pp-layers", "5,4,4,3", "--schedule", "auto"]
    four = predictions(config(*split), costs, float("inf"))
    assert {len(stage_specs(choice.config)) for choice in four} == {4}


def test_costly_messages_speak_against_many_chunks() -> None:
    costs = estimated_costs(config())
    slow = replace(costs, message=3.0)
    free, paid = (
        {(c.config.parallel.schedule, c.config.parallel.chunks): c.step_time for c in found}
        for found in (predictions(config(), each, float("inf")) for each in (costs, slow))
    )
    assert free["interleaved", 4] < free["1f1b", 1]
    assert paid["interleaved", 4] > paid["1f1b", 1]


def test_the_table_shows_all_and_marks_the_chosen() -> None:
    limit = 30 * 2.0**30
    choices = predictions(config(), estimated_costs(config()), limit)
    best = choose(choices, limit)
    lines = table(choices, best, "ms", 1e3).splitlines()
    assert len(lines) == 1 + len(choices)
    (marked,) = [line for line in lines if line.endswith("chosen")]
    assert marked.split()[0] == best.config.parallel.schedule
    assert f"{1e3 * best.step_time:.4g}" in marked
    refused = [choice for choice in choices if not choice.fits]
    assert sum(line.endswith("does not fit") for line in lines) == len(refused)
