"""The executor: runs a program's actions of one pipeline rank, whatever schedule they come from.

It knows stages, messages and autograd, and no schedule. Nothing here waits for the GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
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
from megalite.pipeline.actions import GIVES_WEIGHT_GRADIENT, SENDS, Action, Op, Plan, Program, Use
from megalite.pipeline.channels import (
    goes_later,
    is_message,
    message_number,
    peer_rank,
    received_for,
    received_from,
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


class Parameters(Protocol):
    """Where weights come from and gradients go; `megalite.optim.flat.FlatParameters` is one."""

    def begin_action(self, use: Use | None, following: Use | None) -> None:
        """An action begins that uses weights so, or none, and the next one that uses any."""
        ...

    def add_product(self, parameter: torch.nn.Parameter, a: Tensor, b: Tensor) -> None:
        """Add a @ b to a gradient that autograd does not deliver itself."""
        ...

    def begin_last_gradients(self, stage: int, *, deferred: bool) -> None:
        """The last action that gives the stage's weights gradients begins: `W`, or whole `B`."""
        ...

    def end_last_gradients(self, stage: int) -> None:
        """It has ended: the stage's gradients of this rank are complete."""
        ...


Place = tuple[int, int]
"""(stage, micro-batch)"""


@dataclass(frozen=True, slots=True)
class _Step:
    """An action and what follows from its plan: found once for a program, not in every step of it.

    A result that a neighbouring stage takes has the number of the message that brings it there, or
    would, were the stage on another rank; see `message_number`.

    Attributes:
        action: what to do.
        words: the same for people.
        is_message: whether it sends or receives.
        number: of the message, or of the result that a computation takes; -1 if of none.
        peer: pipeline rank at the other end of that message; -1 if there is no message.
        awaits: that message as its receiver names it, if this rank receives it.
        later: whether it goes from an earlier rank to a later one.
        makes: number of the result that a computation hands on; -1 if of none.
        is_last: it gives its stage's weights their last gradients.
        use: what a computation does with weights; None: nothing.
        following: the next one's that does anything.
    """

    action: Action
    words: str
    is_message: bool
    number: int = -1
    peer: int = -1
    awaits: str = ""
    later: bool = False
    makes: int = -1
    is_last: bool = False
    use: Use | None = None
    following: Use | None = None


@dataclass(frozen=True, eq=False, slots=True)
class _Transfer:
    """A message under way, its content, and the world rank at its other end."""

    work: dist.Work
    step: _Step
    peer: int
    tensor: Tensor

    def __str__(self) -> str:
        preposition = "from" if self.step.awaits else "to"
        return f"{self.step.words}, waiting {preposition} world rank {self.peer}"


@dataclass
class _Flight:
    """What is alive during one run of a program.

    Attributes:
        made: outputs and input gradients, by their numbers, until a send or a neighbour on the same
            rank takes them.
        arriving: messages that are being received, by their numbers.
        leaving: messages that are being sent to later and to earlier ranks; their tensors are kept
            until they have arrived.
        graphs: for each backward to come, the stage's input and the edge of its output, None if
            nothing before it asks for a gradient; the output itself is not kept.
        results: what the head returned, by micro-batch.
    """

    made: dict[int, Tensor] = field(default_factory=dict)
    arriving: dict[int, _Transfer] = field(default_factory=dict)
    leaving: tuple[deque[_Transfer], deque[_Transfer]] = field(
        default_factory=lambda: (deque(), deque())
    )
    graphs: dict[Place, tuple[Tensor, GradientEdge | None, Tensor | None]] = field(
        default_factory=dict
    )
    results: dict[int, Tensor] = field(default_factory=dict)


class Executor:
    """Runs programs on this rank's stages.

    Args:
        stages: this rank's stages by number.
        groups: of this rank.
        parameters: told which weights are used, so that they are there, and where each stage's
            gradients become final, so that they are reduced at once.

    Attributes:
        recorder: of when each action runs, for whoever asks it to record.
    """

    def __init__(self, stages: Mapping[int, Stage], groups: ParallelGroups, parameters: Parameters):
        self.stages, self.pp = stages, groups.pp
        self._topology, self._activity = groups.topology, groups.activity
        self._parameters = parameters
        device = next(iter(stages.values())).device
        self.recorder = Recorder(device, self.pp.rank)
        self._known: tuple[Program, tuple[_Step, ...]] | None = None

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
        steps = self._steps(program)
        self._activity.sends = partial(send_positions, program, self._topology)
        self.recorder.runs(program.plan)
        for index, step in enumerate(steps):
            action = step.action
            micro_batch = batch[action.micro_batch]
            if step.is_message:
                self._activity.at(step.words, index)
                self._start(step, micro_batch, flight)
                continue
            taken = self._take_input(index, step, flight)
            self._activity.enter(step.words, index)
            self.recorder.begins(action)
            self._parameters.begin_action(step.use, step.following)
            if step.is_last:
                deferred = action.op is Op.WEIGHT_GRADIENT
                self._parameters.begin_last_gradients(action.stage, deferred=deferred)
            match action.op:
                case Op.FORWARD:
                    self._forward(program, step, taken, micro_batch, head, flight)
                case Op.WEIGHT_GRADIENT:
                    self._weight_gradients(action)
                case _:
                    self._backward(step, taken, flight)
            if step.is_last:
                self._parameters.end_last_gradients(action.stage)
            self.recorder.ends()
            del taken
            for channel in flight.leaving:
                _forget_arrived(channel)
        for channel in flight.leaving:
            while channel:
                self._wait(channel.popleft(), len(steps))
        # Past the last message, for whoever still waits for one.
        self._activity.enter("", len(steps))
        return flight.results

    def _steps(self, program: Program) -> tuple[_Step, ...]:
        """This rank's steps, kept for the next run of the same program."""
        if self._known is None or self._known[0] is not program:
            self._known = program, _steps(program, self.pp.rank)
        return self._known[1]

    def _forward(
        self,
        program: Program,
        step: _Step,
        x: Tensor | None,
        micro_batch: MicroBatch,
        head: Head,
        flight: _Flight,
    ) -> None:
        action, differentiate = step.action, program.plan.has_backward
        stage = self.stages[action.stage]
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
            # A first stage whose parameters are all frozen has no graph.
            edge = get_gradient_edge(out) if out.requires_grad else None
            flight.graphs[place] = (x, edge, seed)
        if not stage.spec.has_head:
            flight.made[step.makes] = out.detach()

    def _backward(self, step: _Step, gradient: Tensor | None, flight: _Flight) -> None:
        """The whole backward, or its input gradient while the weights' are left for later."""
        action = step.action
        stage = self.stages[action.stage]
        x, edge, seed = flight.graphs.pop((action.stage, action.micro_batch))
        gradient = seed if gradient is None else gradient
        later = stage.weight_gradients.deferring(action.micro_batch)
        with later if action.op is Op.INPUT_GRADIENT else nullcontext():
            if edge is not None:
                torch.autograd.backward(edge, gradient)
        if not stage.spec.has_embedding:
            assert x.grad is not None, f"{action} gave its input no gradient"
            flight.made[step.makes] = x.grad

    def _weight_gradients(self, action: Action) -> None:
        """What the input gradient left for later."""
        later = self.stages[action.stage].weight_gradients
        with torch.no_grad():
            for parameter, a, b in later.compute(action.micro_batch):
                self._parameters.add_product(parameter, a, b)

    def _take_input(self, index: int, step: _Step, flight: _Flight) -> Tensor | None:
        """What the neighbouring stage made for an action; None if it takes nothing of another."""
        if step.number < 0:
            return None
        if step.peer < 0:
            return flight.made.pop(step.number)
        transfer = flight.arriving.pop(step.number)
        # What a GPU comes to is this message, whose arrival the host does not wait for.
        self._activity.enter(transfer.step.words, index, step.awaits, transfer.peer)
        self.recorder.waits(step.peer)
        self._wait(transfer, index)
        return transfer.tensor

    def _start(self, step: _Step, micro_batch: MicroBatch, flight: _Flight) -> None:
        """Begin to send or to receive."""
        sends = not step.awaits
        if sends:
            tensor = flight.made.pop(step.number).contiguous()
        else:
            stage = self.stages[step.action.stage]
            samples, length = micro_batch.tokens.shape
            shape = stage.hidden_shape(length, samples)
            tensor = torch.empty(shape, dtype=stage.dtype, device=stage.device)
        message = Message(tensor, step.peer, sends, later=step.later, tag=step.number)
        work = self.pp.start(message)
        transfer = _Transfer(work, step, self.pp.world_ranks[step.peer], tensor)
        if sends:
            flight.leaving[step.later].append(transfer)
        else:
            flight.arriving[step.number] = transfer

    def _wait(self, transfer: _Transfer, position: int) -> None:
        self._activity.at(transfer, position, transfer.step.awaits, transfer.peer)
        transfer.work.wait()


def _steps(program: Program, rank: int) -> tuple[_Step, ...]:
    """A rank's steps of a program."""
    order = program.ranks[rank]
    last = {a.stage: index for index, a in enumerate(order) if a.op in GIVES_WEIGHT_GRADIENT}
    uses = [None if is_message(action) else _use(action) for action in order]
    following = [next(filter(None, uses[index + 1 :]), None) for index in range(len(order))]
    return tuple(
        _message(program.plan, action)
        if is_message(action)
        else replace(
            _computation(program.plan, action, is_last=last.get(action.stage) == index),
            use=uses[index],
            following=following[index],
        )
        for index, action in enumerate(order)
    )


def _use(action: Action) -> Use | None:
    """What a computation does with weights."""
    if action.op is Op.WEIGHT_GRADIENT:
        return None
    return action.stage, action.op is not Op.FORWARD


def _message(plan: Plan, action: Action) -> _Step:
    return _Step(
        action,
        action.words(),
        is_message=True,
        number=message_number(plan, action),
        peer=peer_rank(plan, action),
        awaits="" if action.op in SENDS else str(action),
        later=goes_later(plan, action),
    )


def _computation(plan: Plan, action: Action, *, is_last: bool) -> _Step:
    received, made = received_for(plan, action), received_from(plan, action)
    peer = -1 if received is None else peer_rank(plan, received)
    is_remote = received is not None and peer != plan.stage_rank[action.stage]
    return _Step(
        action,
        action.words(),
        is_message=False,
        number=-1 if received is None else message_number(plan, received),
        peer=peer if is_remote else -1,
        awaits=str(received) if is_remote else "",
        makes=-1 if made is None else message_number(plan, made),
        is_last=is_last,
    )


def _forget_arrived(leaving: deque[_Transfer]) -> None:
    """Free what has been sent, without waiting for what has not."""
    while leaving and leaving[0].work.is_completed():
        # No wait any more, but NCCL's own hold on the tensor ends here.
        leaving.popleft().work.wait()
