"""What a rank saves, and loads: weights and the optimizer's states as parts of whole tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from megalite.checkpoint.parts import Part, parameter_parts, span_parts
from megalite.checkpoint.reader import Checkpoint
from megalite.checkpoint.regions import whole
from megalite.checkpoint.source import Source
from megalite.errors import ConfigError
from megalite.optim.flat import FlatParameters
from megalite.optim.optimizer import Optimizer
from megalite.parallel.groups import ParallelGroups

MASTER = "optimizer.master."
EXP_AVG = "optimizer.exp_avg."
EXP_AVG_SQ = "optimizer.exp_avg_sq."
COUNTER = "optimizer.state."
"""Before the name of a weight, or of a counter. A weight's own name has nothing before it."""


def saved_parts(
    flat: FlatParameters, optimizer: Optimizer | None, groups: ParallelGroups
) -> Iterator[Part]:
    """What this rank writes; all ranks together have every element of everything once.

    Args:
        flat: the weights; after `Optimizer.validate`.
        optimizer: of them; None: weights alone.
        groups: of this rank. Ranks that own the same share the work.
    """
    replicas = groups.dp.replicas
    share = replicas.rank, replicas.size

    def of_spans(values: Sequence[Tensor], prefix: str) -> Iterator[Part]:
        return span_parts(flat.slots, flat.spans, values, prefix, share)

    yield from of_spans(flat.own_parameters, "")
    for parameter, shard in flat.frozen:
        yield from parameter_parts(parameter, shard, (groups.dp.rank, groups.dp.size))
    if optimizer is None:
        return
    for prefix, values in _states(optimizer).items():
        yield from of_spans(values, prefix)
    if groups.world_rank == 0:
        for name, value in optimizer.counters().items():
            shape = tuple(value.shape)
            yield Part(COUNTER + name, shape, whole(shape), value.reshape(-1))


def load_weights(flat: FlatParameters, checkpoint: Source) -> None:
    """Fill this rank's weights, from master weights where there are any: those are more precise.

    Ranks of the shard group are told of what each has read; all call it.
    """
    for part in span_parts(flat.slots, flat.spans, flat.own_parameters, "", None):
        checkpoint.read(part, _most_precise(checkpoint, part.name))
    for parameter, shard in flat.frozen:
        for part in parameter_parts(parameter, shard, None):
            checkpoint.read(part, _most_precise(checkpoint, part.name))
    for number in range(len(flat.spans)):
        flat.pass_on(number)


def load_optimizer(flat: FlatParameters, optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    """Fill this rank's states of the optimizer; weights are loaded.

    Raises:
        ConfigError: the checkpoint has other states than this run keeps.
    """
    if missing := missing_states(flat, optimizer, checkpoint):
        raise ConfigError(missing)
    for prefix, values in _states(optimizer).items():
        for part in span_parts(flat.slots, flat.spans, values, prefix, None):
            stored = part.name
            if prefix == MASTER and stored not in checkpoint.tensors:
                stored = part.name.removeprefix(MASTER)
            checkpoint.read(part, stored)
    counters = {
        name: checkpoint.whole(COUNTER + name)
        for name in optimizer.counters()
        if COUNTER + name in checkpoint.tensors
    }
    optimizer.restore(counters)


def start_from_weights(flat: FlatParameters, optimizer: Optimizer, checkpoint: Source) -> None:
    """Make master weights, where a run has them, those that were loaded; nothing else changes."""
    if not optimizer.has_master:
        return
    for part in span_parts(flat.slots, flat.spans, optimizer.master, "", None):
        checkpoint.read(part, _most_precise(checkpoint, part.name))


def missing_states(flat: FlatParameters, optimizer: Optimizer, checkpoint: Checkpoint) -> list[str]:
    """A sentence if the checkpoint lacks states that this rank keeps."""
    wanted = {
        part.name
        for prefix, values in _states(optimizer).items()
        if prefix != MASTER
        for part in span_parts(flat.slots, flat.spans, values, prefix, None)
    }
    missing = sorted(wanted - checkpoint.tensors.keys())
    if not missing:
        return []
    return [
        f"{checkpoint.folder} lacks {missing[0]}"
        + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        + ": it was saved by another optimizer, or with weights alone; --no-load-optim starts the "
        "optimizer anew"
    ]


def shape_changes(shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint) -> Iterator[str]:
    """A sentence for every whole tensor that is another one in the checkpoint.

    Args:
        shapes: of all whole tensors of the run, by name.
    """
    for name, shape in shapes.items():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            yield f"{checkpoint.folder} has no {name}"
        elif stored.shape != shape:
            yield f"{name} is {list(stored.shape)} in {checkpoint.folder}, {list(shape)} here"


def _states(optimizer: Optimizer) -> dict[str, Sequence[Tensor]]:
    """The optimizer's states by span, by what their names begin with."""
    states: dict[str, Sequence[Tensor]] = {}
    if optimizer.has_master:
        states[MASTER] = optimizer.master
    return states | {EXP_AVG: optimizer.exp_avg, EXP_AVG_SQ: optimizer.exp_avg_sq}


def _most_precise(checkpoint: Source, name: str) -> str:
    """Name of what is stored of a weight in the most digits."""
    return MASTER + name if MASTER + name in checkpoint.tensors else name
