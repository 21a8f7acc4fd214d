"""Self-test of everything that ranks say to each other: right values, latency, bandwidth.

Bandwidths are "bus bandwidths" as nccl-tests defines them, which do not depend on the number of
ranks n. With S the bytes of the whole tensor and t the time: 2 (n - 1)/n S/t for an all-reduce,
(n - 1)/n S/t for an all-gather and a reduce-scatter, S/t for a broadcast and a message.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.config import Config
from megalite.parallel.groups import ParallelGroups
from megalite.parallel.pipeline import Message, PipelineGroup

LATENCY_BYTES = 4096
GPU_SIZES = (16 << 20, 64 << 20, 256 << 20, 1 << 30)
CPU_SIZES = (1 << 20, 16 << 20)
LONGEST_CALL_S = 0.2
"""A slow network is not asked for a larger tensor."""

WARM_UP, REPEATS, LATENCY_REPEATS = 2, 5, 50


@dataclass(frozen=True)
class Measured:
    """One verb.

    Attributes:
        verb: its name.
        problem: what is wrong with its values on this rank; empty if nothing.
        latency_us: of a small one [us].
        bandwidth: bytes of the whole tensor -> bus bandwidth [GB/s].
    """

    verb: str
    problem: str
    latency_us: float
    bandwidth: dict[int, float]


@dataclass(frozen=True)
class _Verb:
    """A collective: `run(x)` on x [elements], whose values `expected` says.

    Attributes:
        share: bus bandwidth over S/t.
        parts: the input is one of so many parts of the whole tensor.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    expected: Callable[[int], Tensor]
    share: float
    parts: int = 1


def measure_collectives(
    config: Config, groups: ParallelGroups, device: torch.device
) -> list[Measured]:
    """Test and time every verb between all ranks. All ranks call it.

    Args:
        config, groups: of a world whose ranks are all on the data axis.
        device: of this rank.
    """
    ranks = groups.dp.size
    line = ParallelGroups.create(config.replace(pp=ranks, dp=1), device, groups.activity)
    measured = []
    for verb in _verbs(groups, line.pp):
        groups.activity.begin(f"self-test: {verb.name}")
        problem = _problem(verb, ranks, groups.world_rank, device)
        groups.wait_for_all(device)
        latency = _seconds(verb, LATENCY_BYTES, groups, device)
        bandwidth = _bandwidth(verb, groups, device)
        measured.append(Measured(verb.name, problem, latency * 1e6, bandwidth))
    return measured


def _bandwidth(verb: _Verb, groups: ParallelGroups, device: torch.device) -> dict[int, float]:
    """Bus bandwidth by size [GB/s], as far as calls do not get long."""
    found: dict[int, float] = {}
    for size in GPU_SIZES if device.type == "cuda" else CPU_SIZES:
        groups.activity.begin(f"self-test: {verb.name} of {size >> 20} MiB")
        seconds = _seconds(verb, size, groups, device)
        found[size] = verb.share * size / seconds / 1e9
        slowest = groups.dp.all_reduce(torch.tensor([seconds], device=device), maximum=True)
        if slowest.item() > LONGEST_CALL_S:
            break
    return found


def _verbs(flat: ParallelGroups, line: PipelineGroup) -> list[_Verb]:
    """What megalite's layers and schedules use, as their group managers give it."""
    dp, n = flat.dp, flat.dp.size
    ring = (n - 1) / n

    def inputs(count: int) -> Tensor:
        return torch.stack([_values(rank, count) for rank in range(n)])

    def own_part(whole: Tensor) -> Tensor:
        length = len(whole) // n
        return whole[dp.rank * length : (dp.rank + 1) * length]

    return [
        _Verb("all_reduce", dp.all_reduce, lambda c: inputs(c).sum(0), 2 * ring),
        _Verb(
            "all_reduce (maximum)",
            lambda x: dp.all_reduce(x, maximum=True),
            lambda c: inputs(c).amax(0),
            2 * ring,
        ),
        _Verb(
            "all_gather",
            lambda x: dp.start_all_gather(x).wait(),
            lambda c: inputs(c).flatten(),
            ring,
            parts=n,
        ),
        _Verb(
            "reduce_scatter",
            lambda x: dp.start_reduce_scatter(x).wait(),
            lambda c: own_part(inputs(c).sum(0)),
            ring,
        ),
        _Verb("broadcast", lambda x: dp.broadcast(x, 0), lambda c: _values(0, c), 1.0),
        _Verb(
            "send / recv",
            lambda x: _to_the_next(flat, line, x),
            lambda c: _values(line.rank - line.rank % 2 if _has_pair(line) else line.rank, c),
            1.0,
        ),
    ]


def _has_pair(line: PipelineGroup) -> bool:
    """Ranks 0 and 1, 2 and 3, ... are pairs; the last of an odd number is alone."""
    return line.rank - line.rank % 2 + 1 < line.size


def _to_the_next(groups: ParallelGroups, line: PipelineGroup, x: Tensor) -> Tensor:
    """The first of each pair sends, the second receives."""
    if not _has_pair(line):
        return x
    is_first = line.rank % 2 == 0
    peer = line.rank + 1 if is_first else line.rank - 1
    what = "sending to the next rank" if is_first else "receiving from the rank before"
    groups.activity.at(what, peer=line.world_ranks[peer])
    line.start(Message(x, peer, is_first, later=True)).wait()
    groups.activity.at("")
    return x


def _values(rank: int, count: int) -> Tensor:
    """A rank's input: small integers, so that sums are exact in fp32."""
    return (torch.arange(count) * (rank + 1) + rank).remainder(1000).float()


def _problem(verb: _Verb, ranks: int, rank: int, device: torch.device) -> str:
    """How the result differs from its definition; empty if it does not."""
    # A multiple of the ranks, and of no power of two.
    count = ranks * 1001
    result = verb.run(_values(rank, count).to(device)).cpu()
    expected = verb.expected(count)
    if result.shape != expected.shape:
        return f"{list(result.shape)} elements instead of {list(expected.shape)}"
    wrong = (result != expected).nonzero()
    if not len(wrong):
        return ""
    first = int(wrong[0])
    return (
        f"{len(wrong)} of {len(expected)} values are wrong; the first, at {first}, is "
        f"{result[first]:g} instead of {expected[first]:g}"
    )


def _seconds(verb: _Verb, size: int, groups: ParallelGroups, device: torch.device) -> float:
    """Time of one call on a whole tensor of `size` bytes; the mean of several."""
    count = size // 4 // groups.dp.size * groups.dp.size // verb.parts
    x = torch.zeros(count, device=device)
    for _ in range(WARM_UP):
        verb.run(x)
    groups.wait_for_all(device)
    started = time.perf_counter()
    repeats = LATENCY_REPEATS if size == LATENCY_BYTES else REPEATS
    for _ in range(repeats):
        verb.run(x)
    groups.wait_for_all(device)
    return (time.perf_counter() - started) / repeats
