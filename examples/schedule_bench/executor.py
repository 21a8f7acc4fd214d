"""The executor's own host time: stages that compute next to nothing, messages that have arrived.

What the stages and autograd take is measured by itself, on the same actions in the same order, and
taken off. What is left is what a real run's host spends between its stages: looking up, handing
on, keeping a record of what it is doing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from megalite.layers.batch import Documents, DropoutPlace, MicroBatch
from megalite.layers.weight_gradients import WeightGradients
from megalite.models.stage import StageSpec
from megalite.parallel.activity import Activity
from megalite.parallel.groups import ParallelGroups
from megalite.parallel.pipeline import Message
from megalite.parallel.topology import Topology
from megalite.pipeline.actions import Op, Program, Use
from megalite.pipeline.channels import is_message
from megalite.pipeline.lower import lower
from megalite.pipeline.runtime import Executor
from megalite.pipeline.schedules import make_plan

SHAPE = (4, 1, 8)
"""Of hidden states: [S, B, H], so small that arithmetic costs nothing."""
WARM_UPS = 20
"""Steps that are not timed, in which libraries load what they load on first use."""


class StubStage:
    """A stage of one addition."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, spec: StageSpec):
        self.spec, self.weight_gradients = spec, WeightGradients()
        self._table = torch.zeros(SHAPE, requires_grad=True)

    def hidden_shape(self, _length: int, _batch: int) -> tuple[int, ...]:
        """Always the same."""
        return SHAPE

    def __call__(
        self, x: Tensor, _place: DropoutPlace | None, _documents: Documents | None
    ) -> Tensor:
        """Add one."""
        return (self._table if self.spec.has_embedding else x) + 1.0


class StubParameters:
    """Weights that are always there, and gradients that nobody sums."""

    def begin_action(self, _use: Use | None, _following: Use | None) -> None:
        """Nothing."""

    def add_product(self, _parameter: torch.nn.Parameter, _a: Tensor, _b: Tensor) -> None:
        """Nothing."""

    def begin_last_gradients(self, _stage: int, *, deferred: bool) -> None:
        """Nothing."""

    def end_last_gradients(self, _stage: int) -> None:
        """Nothing."""


class Arrived:
    """A message's work, done."""

    def is_completed(self) -> bool:
        """At once."""
        return True

    def wait(self) -> bool:
        """At once."""
        return True


@dataclass
class StubPipeline:
    """A pipeline axis whose messages arrive when they are started."""

    rank: int
    size: int

    def __post_init__(self) -> None:
        self.world_ranks = tuple(range(self.size))
        self._arrived = Arrived()

    def start(self, _message: Message) -> Arrived:
        """Nothing travels."""
        return self._arrived


@dataclass(frozen=True)
class OwnTime:
    """Of one schedule, on the rank where a computation takes most [s].

    Attributes:
        action_s: for each action of the program, messages among them.
        computation_s: for each computation, with the messages before and after it.
        stages_s: what was taken off for each computation: the stage and autograd.
    """

    action_s: float
    computation_s: float
    stages_s: float


def own_time(
    schedule: str,
    num_ranks: int,
    num_micro_batches: int,
    chunks: int = 0,
    *,
    activity: Activity | None = None,
    repeats: int = 100,
) -> OwnTime:
    """The executor's own time in a step of a schedule, as medians over repeats.

    Args:
        schedule, num_ranks, num_micro_batches, chunks: of the plan.
        activity: what the executor writes down what it does in; with that of a rank on a GPU, its
            marks in the GPU's queue are counted too.
        repeats: steps.
    """
    program = lower(make_plan(schedule, num_ranks, num_micro_batches, chunks=chunks))
    activity = activity or Activity()
    found = [_of_rank(program, rank, activity, repeats) for rank in range(num_ranks)]
    return max(found, key=lambda own: own.computation_s)


def _of_rank(program: Program, rank: int, activity: Activity, repeats: int) -> OwnTime:
    stages = stub_stages(program, rank)
    executor = stub_executor(program, rank, stages, activity)
    tokens = torch.zeros(SHAPE[1], SHAPE[0], dtype=torch.int64)
    micro_batch = MicroBatch(tokens, tokens, tokens.bool())
    batch = [micro_batch] * program.plan.num_micro_batches
    for _ in range(WARM_UPS):
        executor.run(program, batch, head)
        run_alone(program, rank, stages, batch)
    # By turns, so that both see the machine alike.
    times = [
        (
            _seconds(lambda: executor.run(program, batch, head)),
            _seconds(lambda: run_alone(program, rank, stages, batch)),
        )
        for _ in range(repeats)
    ]
    own = median(run - alone for run, alone in times)
    steps = program.ranks[rank]
    computations = sum(not is_message(action) for action in steps)
    return OwnTime(
        action_s=own / len(steps),
        computation_s=own / computations,
        stages_s=median(alone for _, alone in times) / computations,
    )


def stub_stages(program: Program, rank: int) -> dict[int, StubStage]:
    """The rank's stages."""
    last = program.plan.num_stages - 1
    return {
        stage: StubStage(StageSpec(stage, stage, 1, stage == 0, stage == last))
        for stage, owner in enumerate(program.plan.stage_rank)
        if owner == rank
    }


def stub_executor(
    program: Program, rank: int, stages: dict[int, StubStage], activity: Activity
) -> Executor:
    """An executor whose stages and messages cost next to nothing."""
    size = program.plan.num_ranks
    solo = ParallelGroups.solo()
    pipeline = cast("Any", StubPipeline(rank, size))
    groups = ParallelGroups(Topology(pp=size), rank, solo.tp, pipeline, solo.dp, activity)
    return Executor(stages, groups, StubParameters())


def head(out: Tensor, _: MicroBatch) -> Tensor:
    """A scalar."""
    return out.sum()


def run_alone(
    program: Program, rank: int, stages: dict[int, StubStage], batch: list[MicroBatch]
) -> None:
    """The rank's computations without an executor: calls of stages and of autograd."""
    graphs: dict[tuple[int, int], Any] = {}
    hidden = torch.zeros(SHAPE)
    for action in program.plan.ranks[rank]:
        stage, place = stages[action.stage], (action.stage, action.micro_batch)
        if action.op is Op.FORWARD:
            micro_batch = batch[action.micro_batch]
            out = stage(hidden.detach().requires_grad_(), None, None)
            if stage.spec.has_head:
                out = head(out, micro_batch)
            graphs[place] = get_gradient_edge(out), torch.ones_like(out)
        elif action.op is Op.INPUT_GRADIENT:
            with stage.weight_gradients.deferring(action.micro_batch):
                torch.autograd.backward(*graphs.pop(place))
        elif action.op is Op.WEIGHT_GRADIENT:
            list(stage.weight_gradients.compute(action.micro_batch))
        else:
            torch.autograd.backward(*graphs.pop(place))


def _seconds(call: Callable[[], object]) -> float:
    """Of this thread's CPU: what it takes on a machine that does nothing else."""
    started = time.thread_time()
    call()
    return time.thread_time() - started
