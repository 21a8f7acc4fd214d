"""The vocabulary of schedules: actions, plans and programs, as plain values. No torch import.

A *plan* lists what each pipeline rank computes, in order. A *program* is a plan with the messages
between ranks written in (`megalite.pipeline.lower`). Text form of an action, as in PyTorch's
pipelining: stage, operation, micro-batch: `2F0`, `0B3`, `1I3`, `1W3`, `1RECV_F3`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Op(StrEnum):
    """What an action does to one micro-batch on one stage.

    A backward is whole, or split into the gradient of the stage's input and that of its weights.
    """

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"
    SEND_FORWARD = "SEND_F"
    RECV_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    RECV_BACKWARD = "RECV_B"


COMPUTE = (Op.FORWARD, Op.BACKWARD, Op.INPUT_GRADIENT, Op.WEIGHT_GRADIENT)
GIVES_INPUT_GRADIENT = (Op.BACKWARD, Op.INPUT_GRADIENT)
GIVES_WEIGHT_GRADIENT = (Op.BACKWARD, Op.WEIGHT_GRADIENT)
SENDS = (Op.SEND_FORWARD, Op.SEND_BACKWARD)


@dataclass(frozen=True)
class Action:
    """One operation of one stage on one micro-batch.

    `SEND_F` starts to send the stage's output, `RECV_F` to receive its input; `SEND_B` the gradient
    of its input, `RECV_B` the gradient of its output. None of them waits.
    """

    stage: int
    op: Op
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.micro_batch}"

    def words(self) -> str:
        """`stage 1, micro-batch 3, recv_forward`, for people."""
        return f"stage {self.stage}, micro-batch {self.micro_batch}, {self.op.name.lower()}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action of a text form.

        Raises:
            ValueError: the text is none.
        """
        match = re.fullmatch(r"(\d+)([A-Z_]+)(\d+)", text.strip())
        if not match or match[2] not in list(Op):
            raise ValueError(f"{text!r} is not an action such as 2F0 or 1RECV_B3")
        return cls(int(match[1]), Op(match[2]), int(match[3]))


Use = tuple[int, bool]
"""What an action does with weights: a stage's, in a forward (False) or a backward (True)."""

Order = tuple[Action, ...]
"""What one rank does, one action after the other."""


@dataclass(frozen=True)
class Plan:
    """What each pipeline rank computes, in order.

    Attributes:
        name: of the schedule.
        num_micro_batches: of one step.
        stage_rank: pipeline rank of each stage.
        ranks: compute actions of each rank.
        has_backward: False for a plan of forwards only.
    """

    name: str
    num_micro_batches: int
    stage_rank: tuple[int, ...]
    ranks: tuple[Order, ...]
    has_backward: bool = True

    @property
    def num_stages(self) -> int:
        """Stages of the model."""
        return len(self.stage_rank)

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.ranks)

    def source(self, action: Action) -> tuple[int, Op] | None:
        """Stage whose result the action takes, and in which direction that result travels.

        None: the first stage's forward reads tokens, the last stage's backward begins with its own
        loss, and a weight gradient takes what its stage has kept.
        """
        if action.op is Op.FORWARD and action.stage > 0:
            return action.stage - 1, Op.FORWARD
        if action.op in GIVES_INPUT_GRADIENT and action.stage < self.num_stages - 1:
            return action.stage + 1, Op.BACKWARD
        return None

    def is_remote(self, stage: int, other: int) -> bool:
        """Whether the two stages lie on different ranks."""
        return self.stage_rank[stage] != self.stage_rank[other]


@dataclass(frozen=True)
class Program:
    """A plan with its messages: what each rank starts, in order."""

    plan: Plan
    ranks: tuple[Order, ...]


class PlanError(ValueError):
    """A plan or program that would compute the wrong thing or hang."""
