"""What a model's parts cost on the ranks that will train it: measured before the first step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from megalite.config import Config
from megalite.layers.batch import MicroBatch
from megalite.layers.shard import initialize
from megalite.models.llama import LlamaStage
from megalite.optim.flat import FlatParameters
from megalite.parallel.groups import ParallelGroups
from megalite.parallel.pipeline import Message
from megalite.planning.block_costs import BlockCosts, ModelCosts, estimated_costs, part_specs
from megalite.planning.shared import sum_over_ranks

WARM_UPS, REPEATS = 2, 5


def measure_costs(
    config: Config,
    groups: ParallelGroups,
    device: torch.device,
    dtype: torch.dtype,
    micro_batch: MicroBatch,
) -> ModelCosts:
    """Time each part of the model, and a message between neighbours.

    All ranks call it and get the same bits: means over all of them [s]. On a GPU the sizes that a
    part keeps are measured too; on a CPU they are `estimated_costs`'s.

    Args:
        config: the run's; its schedule does not matter.
        groups, device: of this rank.
        dtype: of the weights.
        micro_batch: any of the run.
    """
    estimate = estimated_costs(config)
    parts = {
        name: _measure_part(
            LlamaStage(config, spec, tp=groups.tp, dtype=dtype, device=device),
            groups,
            micro_batch,
            getattr(estimate, name),
        )
        for name, spec in part_specs().items()
    }
    message = measure_message(config, groups, device, dtype)
    flat = [value for part in parts.values() for value in astuple(part)] + [message]
    agreed = torch.tensor(flat, dtype=torch.float64, device=device)
    means = sum_over_ranks(agreed, groups) / groups.topology.world_size
    *values, message = means.tolist()
    width = len(values) // len(parts)
    blocks = {
        name: BlockCosts(*values[at * width : (at + 1) * width]) for at, name in enumerate(parts)
    }
    return ModelCosts(**blocks, message=message)


def _measure_part(
    stage: LlamaStage, groups: ParallelGroups, micro_batch: MicroBatch, estimate: BlockCosts
) -> BlockCosts:
    """One part as a stage of its own, through the same code as in training."""
    initialize(stage, stage.config.train.seed)
    part = _Part(stage, FlatParameters({stage.spec.stage: stage}, groups), micro_batch)
    on_gpu = stage.device.type == "cuda"
    clock = _gpu_seconds if on_gpu else _cpu_seconds
    rounds = []
    for _ in range(WARM_UPS + REPEATS):
        split = clock([part.forward, part.input_gradient, part.weight_gradient])
        whole = clock([part.forward, part.backward])
        rounds.append((split[0], whole[1], split[1], split[2]))
    forward, backward, inputs, weights = map(median, zip(*rounds[WARM_UPS:], strict=True))
    kept, for_weights = estimate.kept, estimate.kept_for_weights
    if on_gpu:
        kept, for_weights = part.sizes()
    part.flat.release()
    return BlockCosts(forward, backward, inputs, weights, kept, for_weights)


class _Part:
    """A stage's actions on one micro-batch."""

    def __init__(self, stage: LlamaStage, flat: FlatParameters, micro_batch: MicroBatch):
        self.stage, self.flat, self.micro_batch = stage, flat, micro_batch
        samples, length = micro_batch.tokens.shape
        shape = stage.hidden_shape(length, samples)
        self.x = torch.zeros(shape, dtype=stage.dtype, device=stage.device).normal_()
        self.gradient = torch.ones_like(self.x)

    def forward(self) -> None:
        stage, given = self.stage, self.micro_batch
        x = given.tokens if stage.spec.has_embedding else self.x.detach().requires_grad_()
        self.out = stage(x, given.place, given.documents)
        if stage.spec.has_head:
            weights = torch.full(given.mask.shape, 1e-3, device=stage.device)
            self.out = stage.weighted_loss(self.out, given.labels, weights)

    def backward(self) -> None:
        is_loss = self.stage.spec.has_head
        torch.autograd.backward(self.out, None if is_loss else self.gradient)
        del self.out

    def input_gradient(self) -> None:
        with self.stage.weight_gradients.deferring(0):
            self.backward()

    def weight_gradient(self) -> None:
        with torch.no_grad():
            for parameter, a, b in self.stage.weight_gradients.compute(0):
                self.flat.add_product(parameter, a, b)

    def sizes(self) -> tuple[float, float]:
        """Bytes that a forward keeps, and what is left of them for the weight gradient."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        self.forward()
        kept = torch.cuda.memory_allocated() - before
        self.input_gradient()
        for_weights = torch.cuda.memory_allocated() - before
        self.weight_gradient()
        return float(max(0, kept)), float(max(0, for_weights))


def _cpu_seconds(actions: Sequence[Callable[[], None]]) -> list[float]:
    marks = [time.perf_counter()]
    for action in actions:
        action()
        marks.append(time.perf_counter())
    return [b - a for a, b in pairwise(marks)]


def _gpu_seconds(actions: Sequence[Callable[[], None]]) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(actions) + 1)]
    marks[0].record()
    for action, mark in zip(actions, marks[1:], strict=True):
        action()
        mark.record()
    marks[-1].synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def measure_message(
    config: Config, groups: ParallelGroups, device: torch.device, dtype: torch.dtype
) -> float:
    """Mean time of hidden states from one rank to the next, down the pipeline and back [s].

    All ranks call it, while no other message is under way; those of one pipeline get the same.
    """
    pp, tp = groups.pp, groups.tp
    if pp.size == 1:
        return 0.0
    length = config.model.seq_length
    local = length // tp.size if tp.sequence_parallel else length
    shape = (local, config.train.micro_batch_size, config.model.hidden_size)
    hidden = torch.zeros(shape, dtype=dtype, device=device)
    times = []
    for _ in range(WARM_UPS + REPEATS):
        pp.all_reduce(torch.ones(1, device=device)).item()
        started = time.perf_counter()
        _pass_along(groups, hidden)
        times.append((time.perf_counter() - started) / (2 * (pp.size - 1)))
    # Only the first rank sees the whole way.
    mine = median(times[WARM_UPS:]) if pp.is_first else 0.0
    seen = torch.tensor([mine], dtype=torch.float64, device=device)
    return float(pp.all_reduce(seen).item())


def _pass_along(groups: ParallelGroups, hidden: Tensor) -> None:
    """From the first pipeline rank to the last and back."""
    pp = groups.pp
    before, after = pp.rank - 1, pp.rank + 1
    if not pp.is_first:
        pp.start(Message(hidden, before, is_send=False, later=True)).wait()
    if not pp.is_last:
        pp.start(Message(hidden, after, is_send=True, later=True)).wait()
        pp.start(Message(hidden, after, is_send=False, later=False)).wait()
    if not pp.is_first:
        pp.start(Message(hidden, before, is_send=True, later=False)).wait()
    if hidden.is_cuda:
        torch.cuda.synchronize()
