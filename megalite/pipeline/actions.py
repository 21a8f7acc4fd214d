"""The vocabulary of schedules: actions, plans and programs, as plain values. No torch import.

A *plan* lists what each pipeline rank computes, in order. A *program* is a plan with the messages
between ranks written in (`megalite.pipeline.lower`). Text form of an action, as in PyTorch's
pipelining: stage, operation, micro-batch: `2F0`, `0B3`, `1RECV_F3`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Op(StrEnum):
    """What an action does to one micro-batch on one stage."""

    FORWARD = "F"
    BACKWARD = "B"
    SEND_FORWARD = "SEND_F"
    RECV_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    RECV_BACKWARD = "RECV_B"


COMPUTE = (Op.FORWARD, Op.BACKWARD)
SENDS = (Op.SEND_FORWARD, Op.SEND_BACKWARD)


@dataclass(frozen=True)
class Action:
    """One operation of one stage on one micro-batch.

    `SEND_F` sends the stage's output, `RECV_F` receives its input; `SEND_B` sends the gradient of
    its input, `RECV_B` receives the gradient of its output.
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


@dataclass(frozen=True)
class Exchange:
    """Messages that are started as one batch, in this order."""

    messages: tuple[Action, ...]

    def __str__(self) -> str:
        return "{" + " ".join(map(str, self.messages)) + "}"

    def words(self) -> str:
        """Those of its messages."""
        return " and ".join(message.words() for message in self.messages)


Step = Action | Exchange


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
    ranks: tuple[tuple[Action, ...], ...]
    has_backward: bool = True

    @property
    def num_stages(self) -> int:
        """Stages of the model."""
        return len(self.stage_rank)


@dataclass(frozen=True)
class Program:
    """A plan with its messages: what each rank executes, in order."""

    plan: Plan
    ranks: tuple[tuple[Step, ...], ...]


class PlanError(ValueError):
    """A plan or program that would compute the wrong thing or hang."""
