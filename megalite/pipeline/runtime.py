"""The executor: runs a program's actions of one pipeline rank, whatever schedule they come from.

It knows stages, messages and autograd, and no schedule. Nothing here waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megalite.layers.batch import Documents, DropoutPlace, MicroBatch
from megalite.models.stage import StageSpec
from megalite.parallel.groups import ParallelGroups
from megalite.parallel.pipeline import Message
from megalite.pipeline.actions import SENDS, Action, Exchange, Op, Program, Step
from megalite.pipeline.check import message_number, peer_rank, send_positions

Head = Callable[[Tensor, MicroBatch], Tensor]
"""What becomes of the last stage's output: a scalar to differentiate, or a result."""


class Stage(Protocol):
    """What the executor asks of a stage; `megalite.models.llama.LlamaStage` is one."""

    spec: StageSpec
    dtype: torch.dtype
    device: torch.device

    def hidden_shape(self, length: int, batch: int) -> tuple[int, ...]:
        """Shape of the hidden states between stages."""
        ...

    def __call__(
        self, x: Tensor, place: DropoutPlace | None, documents: Documents | None
    ) -> Tensor:
        """The stage's forward."""
        ...


Place = tuple[int, int]
"""(stage, micro-batch)"""


@dataclass(frozen=True, eq=False)
class _Wait:
    """A message under way, and the world rank at its other end."""

    work: dist.Work
    action: Action
    peer: int

    def __str__(self) -> str:
        preposition = "to" if self.action.op in SENDS else "from"
        return f"{self.action.words()}, waiting {preposition} world rank {self.peer}"


@dataclass
class _Flight:
    """What is alive during one run of a program.

    Attributes:
        activations: inputs received or made here for a forward to come.
        gradients: gradients of a stage's output, received or made here.
        outgoing: what a send will take: outputs and input gradients.
        graphs: for each backward to come, the stage's input and the edge of its output; the output
            itself is not kept.
        sends: messages on their way; their tensors are kept until they are waited for.
        results: what the head returned, by micro-batch.
    """

    activations: dict[Place, Tensor] = field(default_factory=dict)
    gradients: dict[Place, Tensor] = field(default_factory=dict)
    outgoing: dict[Action, Tensor] = field(default_factory=dict)
    graphs: dict[Place, tuple[Tensor, GradientEdge, Tensor | None]] = field(default_factory=dict)
    sends: list[_Wait] = field(default_factory=list)
    results: dict[int, Tensor] = field(default_factory=dict)


class Executor:
    """Runs programs on this rank's stages.

    Args:
        stages: this rank's stages by number.
        pp: the pipeline group.
        before_last_backward: called with a stage's number before its last backward of a run, so
            that its gradients are reduced as they become final.
        groups: of this rank.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        groups: ParallelGroups,
        before_last_backward: Callable[[int], None],
    ):
        self.stages, self.pp = stages, groups.pp
        self._topology, self._activity = groups.topology, groups.activity
        self._before_last_backward = before_last_backward

    def run(self, program: Program, batch: Sequence[MicroBatch], head: Head) -> dict[int, Tensor]:
        """Run one step.

        Args:
            program: checked; its number of micro-batches is that of `batch`.
            batch: all of one shape.
            head: applied to the last stage's output. If the program has backwards, it returns the
                scalar whose gradient they compute.

        Returns:
            The head's results (detached) by micro-batch; empty on ranks without the last stage.
        """
        flight = _Flight()
        steps = program.ranks[self.pp.rank]
        last_backward = {
            step.stage: index
            for index, step in enumerate(steps)
            if isinstance(step, Action) and step.op is Op.BACKWARD
        }
        self._activity.sends = partial(send_positions, program, self._topology)
        for index, step in enumerate(steps):
            self._begin(program, index, step)
            if isinstance(step, Exchange):
                self._exchange(program, step, batch, flight)
            elif step.op is Op.FORWARD:
                self._forward(program, step, batch[step.micro_batch], head, flight)
            else:
                if last_backward[step.stage] == index:
                    self._before_last_backward(step.stage)
                self._backward(program, step, flight)
        self._wait(flight.sends)
        # Past the last message, for whoever still waits for one.
        self._activity.enter("", len(steps))
        return flight.results

    def _begin(self, program: Program, index: int, step: Step) -> None:
        """Say what is done now, and what a GPU does when it comes to it."""
        awaits, peer = "", -1
        if isinstance(step, Exchange):
            # What arrives, if anything does, is what a GPU will wait for.
            message = min(step.messages, key=lambda message: message.op in SENDS)
            awaits = "" if message.op in SENDS else str(message)
            peer = self.pp.world_ranks[peer_rank(program.plan, message)]
        self._activity.enter(step.words(), index, awaits, peer)

    def _forward(
        self,
        program: Program,
        action: Action,
        micro_batch: MicroBatch,
        head: Head,
        flight: _Flight,
    ) -> None:
        stage, place = self.stages[action.stage], (action.stage, action.micro_batch)
        differentiate = program.plan.has_backward
        if stage.spec.has_embedding:
            x = micro_batch.tokens
        else:
            x = flight.activations.pop(place).requires_grad_(differentiate)
        out = stage(x, micro_batch.place, micro_batch.documents)
        if stage.spec.has_head:
            out = head(out, micro_batch)
            flight.results[action.micro_batch] = out.detach()
        if differentiate:
            seed = torch.ones_like(out) if stage.spec.has_head else None
            flight.graphs[place] = (x, get_gradient_edge(out), seed)
        if not stage.spec.has_head:
            self._hand_on(program, action, Op.SEND_FORWARD, 1, out.detach(), flight)

    def _backward(self, program: Program, action: Action, flight: _Flight) -> None:
        place = (action.stage, action.micro_batch)
        x, edge, gradient = flight.graphs.pop(place)
        if gradient is None:
            gradient = flight.gradients.pop(place)
        torch.autograd.backward(edge, gradient)
        if not self.stages[action.stage].spec.has_embedding:
            assert x.grad is not None, f"{action} gave its input no gradient"
            self._hand_on(program, action, Op.SEND_BACKWARD, -1, x.grad, flight)

    def _hand_on(
        self,
        program: Program,
        action: Action,
        op: Op,
        direction: int,
        tensor: Tensor,
        flight: _Flight,
    ) -> None:
        """Give a result to the neighbouring stage, or to the message that sends it there."""
        neighbour = action.stage + direction
        if program.plan.stage_rank[neighbour] == self.pp.rank:
            box = flight.activations if op is Op.SEND_FORWARD else flight.gradients
            box[neighbour, action.micro_batch] = tensor
        else:
            flight.outgoing[Action(action.stage, op, action.micro_batch)] = tensor

    def _exchange(
        self, program: Program, step: Exchange, batch: Sequence[MicroBatch], flight: _Flight
    ) -> None:
        messages = [self._message(program, action, batch, flight) for action in step.messages]
        works = [
            _Wait(work, action, self.pp.world_ranks[message.peer])
            for work, action, message in zip(
                self.pp.exchange(messages), step.messages, messages, strict=False
            )
        ]
        for action, message in zip(step.messages, messages, strict=True):
            place = (action.stage, action.micro_batch)
            if action.op is Op.RECV_FORWARD:
                flight.activations[place] = message.tensor
            elif action.op is Op.RECV_BACKWARD:
                flight.gradients[place] = message.tensor
        # Those of the exchange before: a plan is checked as if every exchange waited for its own.
        self._wait(flight.sends)
        # With one handle for each message, only what arrives is waited for now.
        later = works if len(works) == len(messages) else []
        flight.sends = [wait for wait in later if wait.action.op in SENDS]
        self._wait(wait for wait in works if wait not in flight.sends)

    def _wait(self, waits: Iterable[_Wait]) -> None:
        for wait in waits:
            awaits = "" if wait.action.op in SENDS else str(wait.action)
            self._activity.at(wait, self._activity.position, awaits, wait.peer)
            wait.work.wait()

    def _message(
        self, program: Program, action: Action, batch: Sequence[MicroBatch], flight: _Flight
    ) -> Message:
        peer, tag = peer_rank(program.plan, action), message_number(program.plan, action)
        if action.op in SENDS:
            return Message(flight.outgoing.pop(action).contiguous(), peer, True, tag)
        stage = self.stages[action.stage]
        samples, length = batch[action.micro_batch].tokens.shape
        buffer = torch.empty(
            stage.hidden_shape(length, samples), dtype=stage.dtype, device=stage.device
        )
        return Message(buffer, peer, False, tag)
