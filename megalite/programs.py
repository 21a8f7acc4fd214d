"""The programs of a rank's run: what each number of micro-batches is computed by."""

from __future__ import annotations

from megalite.config import Config
from megalite.pipeline.actions import Plan, Program
from megalite.pipeline.check import check_program
from megalite.pipeline.costs import Costs
from megalite.pipeline.lower import lower
from megalite.pipeline.schedules import SCHEDULES, forward_only
from megalite.run_plan import is_file, run_plan


class Programs:
    """Plans with their messages, made and checked when they are asked for, and kept.

    Args:
        config: the run, its schedule chosen.
        costs: of the stages, by which messages and weight gradients are placed.
        limit: of memory for what a plan keeps, as `run_plan` takes it; None: none.

    Attributes:
        costs: as given, or replaced.
        stage_rank: pipeline rank of each stage.
    """

    def __init__(self, config: Config, costs: Costs, limit: float | None):
        self._config, self.costs, self._limit = config, costs, limit
        # A batch that grows has more micro-batches later.
        self._plans: dict[int, Plan] = {}
        self._training: dict[int, Program] = {}
        self._evaluating: dict[int, Program] = {}
        self.stage_rank = self._plan(config.num_micro_batches).stage_rank

    def training(self, num_micro_batches: int) -> Program:
        """What computes a step of so many micro-batches."""
        if num_micro_batches not in self._training:
            plan = self._plan(num_micro_batches)
            self._training[num_micro_batches] = _checked(lower(plan, self.costs))
        return self._training[num_micro_batches]

    def evaluating(self, num_micro_batches: int) -> Program:
        """What evaluates so many micro-batches."""
        if num_micro_batches not in self._evaluating:
            plan = forward_only(num_micro_batches, self.stage_rank)
            self._evaluating[num_micro_batches] = _checked(lower(plan, self.costs))
        return self._evaluating[num_micro_batches]

    def replan(self, costs: Costs) -> None:
        """Place messages and weight gradients by other costs from now on.

        The order of gradients on each stage stays, so every sum does: the numbers do not change.
        """
        self.costs = costs
        if splits_backwards(self._config):
            self._plans.clear()
        self._training.clear()
        self._evaluating.clear()

    def _plan(self, num_micro_batches: int) -> Plan:
        """What the run computes in a step; one in a file is read once, whatever becomes of it."""
        if num_micro_batches not in self._plans:
            plan = run_plan(self._config, num_micro_batches, self.costs, self._limit)
            self._plans[num_micro_batches] = plan
        return self._plans[num_micro_batches]


def splits_backwards(config: Config) -> bool:
    """Whether weight gradients are placed by costs and by the memory there is."""
    schedule = config.parallel.schedule
    return not is_file(schedule) and SCHEDULES[schedule].keeps is not None


def _checked(program: Program) -> Program:
    check_program(program)
    return program
