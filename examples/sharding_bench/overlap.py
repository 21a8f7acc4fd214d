"""How much of a step's communication nothing hides, from the kernels that a GPU ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Interval = tuple[float, float]


def communication_ms(
    step: Callable[[], object], ready: Callable[[], object], device: torch.device
) -> tuple[float, float]:
    """Time of a step in which NCCL's collectives run, and in which no other kernel does [ms].

    Messages of a pipeline are left out: their kernels run while they wait for others' computing.
    Zeros on a CPU.

    Args:
        step: what is recorded.
        ready: returns when all ranks have called it.
        device: of this rank.
    """
    if device.type != "cuda":
        step()
        return 0.0, 0.0
    how = {"activities": [ProfilerActivity.CUDA], "acc_events": True}
    with profile(**how):
        # The first profile of a process takes long to begin: others would seem to communicate.
        torch.cuda.synchronize(device)
    ready()
    with profile(**how) as recorded:
        step()
        torch.cuda.synchronize(device)
    ours: list[Interval] = []
    others: list[Interval] = []
    for event in recorded.events():
        if event.device_type == DeviceType.CUDA and "SendRecv" not in event.name:
            kind = ours if "nccl" in event.name.lower() else others
            kind.append((event.time_range.start, event.time_range.end))
    both = length(union([*ours, *others]))
    return length(union(ours)) / 1e3, (both - length(union(others))) / 1e3


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals that cover the same."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def length(intervals: Iterable[Interval]) -> float:
    """Sum of their lengths."""
    return sum(end - start for start, end in intervals)
