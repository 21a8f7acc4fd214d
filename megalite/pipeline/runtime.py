"""The executor: runs a program's actions of one pipeline rank, whatever schedule they come from.

It knows stages, messages and autograd, and no schedule. Nothing here waits for the GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megalite.layers.batch import Documents, DropoutPlace, MicroBatch
from megalite.layers.weight_gradients import WeightGradients
from megalite.models.stage import StageSpec
from megalite.parallel.groups import ParallelGroups
from megalite.parallel.pipeline import Message
from megalite.pipeline.actions import GIVES_WEIGHT_GRADIENT, SENDS, Action, Op, Program
from megalite.pipeline.channels import (
    goes_later,
    is_message,
    message_number,
    peer_rank,
    received_for,
    send_positions,
)
from megalite.pipeline.recorder import Recorder

Head = Callable[[Tensor, MicroBatch], Tensor]
"""What becomes of the last stage's output: a scalar to differentiate, or a result."""


class Stage(Protocol):
    """What the executor asks of a stage; `megalite.models.llama.LlamaStage` is one."""

    spec: StageSpec
    dtype: torch.dtype
    device: torch.device
    weight_gradients: WeightGradients

    def hidden_shape(self, length: int, batch: int) -> tuple[int, ...]:
        """Shape of the hidden states between stages."""
        ...

    def __call__(
        self, x: Tensor, place: DropoutPlace | None, documents: Documents | None
    ) -> Tensor:
        """The stage's forward."""
        ...


class GradientSums(Protocol):
    """Where gradients go; `megalite.optim.flat.FlatParameters` is one."""

    def add(self, parameter: torch.nn.Parameter, gradient: Tensor) -> None:
        """Take a gradient that autograd does not deliver itself."""
        ...

    def begin_last_gradients(self, stage: int, *, deferred: bool) -> None:
        """The last action that gives the stage's weights gradients begins: `W`, or whole `B`."""
        ...

    def end_last_gradients(self, stage: int) -> None:
        """It has ended: the stage's gradients of this rank are complete."""
        ...


Place = tuple[int, int]
"""(stage, micro-batch)"""


@dataclass(frozen=True, eq=False)
class _Transfer:
    """A message under way, its content, and the world rank at its other end."""

    work: dist.Work
    action: Action
    peer: int
    tensor: Tensor

    def __str__(self) -> str:
        preposition = "to" if self.action.op in SENDS else "from"
        return f"{self.action.words()}, waiting {preposition} world rank {self.peer}"


@dataclass
class _Flight:
    """What is alive during one run of a program.

    Attributes:
        local: results of one stage for its neighbour on the same rank, by the message that would
            have brought them.
        outgoing: what a send will take: outputs and input gradients.
        arriving: messages that are being received.
        leaving: messages that are being sent; their tensors are kept until they have arrived.
        graphs: for each backward to come, the stage's input and the edge of its output; the output
            itself is not kept.
        results: what the head returned, by micro-batch.
    """

    local: dict[Action, Tensor] = field(default_factory=dict)
    outgoing: dict[Action, Tensor] = field(default_factory=dict)
    arriving: dict[Action, _Transfer] = field(default_factory=dict)
    leaving: deque[_Transfer] = field(default_factory=deque)
    graphs: dict[Place, tuple[Tensor, GradientEdge, Tensor | None]] = field(default_factory=dict)
    results: dict[int, Tensor] = field(default_factory=dict)


class Executor:
    """Runs programs on this rank's stages.

    Args:
        stages: this rank's stages by number.
        groups: of this rank.
        gradients: told where each stage's gradients become final, so that they are reduced at once.

    Attributes:
        recorder: of when each action runs, for whoever asks it to record.
    """

    def __init__(
        self, stages: Mapping[int, Stage], groups: ParallelGroups, gradients: GradientSums
    ):
        self.stages, self.pp = stages, groups.pp
        self._topology, self._activity = groups.topology, groups.activity
        self._gradients = gradients
        device = next(iter(stages.values())).device
        self.recorder = Recorder(device, self.pp.rank)

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
        last = {a.stage: i for i, a in enumerate(steps) if a.op in GIVES_WEIGHT_GRADIENT}
        self._activity.sends = partial(send_positions, program, self._topology)
        self.recorder.runs(program.plan)
        for index, action in enumerate(steps):
            micro_batch = batch[action.micro_batch]
            if is_message(action):
                self._activity.at(action.words(), index)
                self._start(program, action, micro_batch, flight)
                continue
            taken = self._take_input(program, index, action, flight)
            self._activity.enter(action.words(), index)
            self.recorder.begins(action)
            is_last = last.get(action.stage) == index
            if is_last:
                deferred = action.op is Op.WEIGHT_GRADIENT
                self._gradients.begin_last_gradients(action.stage, deferred=deferred)
            match action.op:
                case Op.FORWARD:
                    self._forward(program, action, taken, micro_batch, head, flight)
                case Op.WEIGHT_GRADIENT:
                    self._weight_gradients(action)
                case _:
                    self._backward(program, action, taken, flight)
            if is_last:
                self._gradients.end_last_gradients(action.stage)
            self.recorder.ends()
            _forget_arrived(flight.leaving)
        while flight.leaving:
            self._wait(flight.leaving.popleft(), len(steps))
        # Past the last message, for whoever still waits for one.
        self._activity.enter("", len(steps))
        return flight.results

    def _forward(
        self,
        program: Program,
        action: Action,
        x: Tensor | None,
        micro_batch: MicroBatch,
        head: Head,
        flight: _Flight,
    ) -> None:
        stage, differentiate = self.stages[action.stage], program.plan.has_backward
        if x is None:
            x = micro_batch.tokens
        else:
            x.requires_grad_(differentiate)
        out = stage(x, micro_batch.place, micro_batch.documents)
        if stage.spec.has_head:
            out = head(out, micro_batch)
            flight.results[action.micro_batch] = out.detach()
        if differentiate:
            seed = torch.ones_like(out) if stage.spec.has_head else None
            place = (action.stage, action.micro_batch)
            flight.graphs[place] = (x, get_gradient_edge(out), seed)
        if not stage.spec.has_head:
            self._hand_on(program, Op.FORWARD, action, 1, out.detach(), flight)

    def _backward(
        self, program: Program, action: Action, gradient: Tensor | None, flight: _Flight
    ) -> None:
        """The whole backward, or its input gradient while the weights' are left for later."""
        stage = self.stages[action.stage]
        x, edge, seed = flight.graphs.pop((action.stage, action.micro_batch))
        gradient = seed if gradient is None else gradient
        if action.op is Op.INPUT_GRADIENT:
            with stage.weight_gradients.deferring(action.micro_batch):
                torch.autograd.backward(edge, gradient)
        else:
            torch.autograd.backward(edge, gradient)
        if not stage.spec.has_embedding:
            assert x.grad is not None, f"{action} gave its input no gradient"
            self._hand_on(program, Op.BACKWARD, action, -1, x.grad, flight)

    def _weight_gradients(self, action: Action) -> None:
        """What the input gradient left for later."""
        later = self.stages[action.stage].weight_gradients
        with torch.no_grad():
            for parameter, gradient in later.compute(action.micro_batch):
                self._gradients.add(parameter, gradient)

    def _hand_on(
        self,
        program: Program,
        direction: Op,
        action: Action,
        step: int,
        tensor: Tensor,
        flight: _Flight,
    ) -> None:
        """Give a result to the neighbouring stage, or to the message that sends it there."""
        neighbour, i = action.stage + step, action.micro_batch
        if program.plan.is_remote(action.stage, neighbour):
            flight.outgoing[Action(action.stage, Op(f"SEND_{direction}"), i)] = tensor
        else:
            flight.local[Action(neighbour, Op(f"RECV_{direction}"), i)] = tensor

    def _take_input(
        self, program: Program, index: int, action: Action, flight: _Flight
    ) -> Tensor | None:
        """What the neighbouring stage made for an action; None if it takes nothing of another."""
        received = received_for(program.plan, action)
        if received is None:
            return None
        if received in flight.local:
            return flight.local.pop(received)
        transfer = flight.arriving.pop(received)
        # What a GPU comes to is this message, whose arrival the host does not wait for.
        self._activity.enter(transfer.action.words(), index, str(received), transfer.peer)
        self.recorder.waits(peer_rank(program.plan, received))
        self._wait(transfer, index)
        return transfer.tensor

    def _start(
        self, program: Program, action: Action, micro_batch: MicroBatch, flight: _Flight
    ) -> None:
        """Begin to send or to receive."""
        plan = program.plan
        sends = action.op in SENDS
        if sends:
            tensor = flight.outgoing.pop(action).contiguous()
        else:
            stage = self.stages[action.stage]
            samples, length = micro_batch.tokens.shape
            shape = stage.hidden_shape(length, samples)
            tensor = torch.empty(shape, dtype=stage.dtype, device=stage.device)
        peer, tag = peer_rank(plan, action), message_number(plan, action)
        message = Message(tensor, peer, sends, later=goes_later(plan, action), tag=tag)
        work = self.pp.start(message)
        transfer = _Transfer(work, action, self.pp.world_ranks[peer], tensor)
        if sends:
            flight.leaving.append(transfer)
        else:
            flight.arriving[action] = transfer

    def _wait(self, transfer: _Transfer, position: int) -> None:
        awaits = "" if transfer.action.op in SENDS else str(transfer.action)
        self._activity.at(transfer, position, awaits, transfer.peer)
        transfer.work.wait()


def _forget_arrived(leaving: deque[_Transfer]) -> None:
    """Free what has been sent, without waiting for what has not."""
    while leaving and leaving[0].work.is_completed():
        leaving.popleft()
