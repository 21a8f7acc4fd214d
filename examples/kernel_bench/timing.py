"""Times on the GPU, by replays of CUDA graphs after a flush of its cache; times of the host."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_bench.problem import Prepared

FLUSH_BYTES = 256 << 20
"""More than any card's L2."""
WARM_UPS = 3
ROUNDS = 20
FEWEST_ROUNDS = 7
LONGEST_ROW_S = 4.0
HOST_CALLS = 50
HOST_ROUNDS = 7


class Times(NamedTuple):
    """Milliseconds: median, and the bounds of the middle three fifths."""

    median: float
    p20: float
    p80: float


class Launch(NamedTuple):
    """Work that is ready to be launched.

    Args:
        go: launches it on the clock's stream.
        restore: puts back overwritten inputs, untimed.
        trouble: why it is no graph; empty if it is.
    """

    go: Callable[[], object]
    restore: Callable[[], None] | None
    trouble: str


class TooLongError(Exception):
    """A call that was cut off."""

    TEXT = "compilation took over"


class Clock:
    """One GPU's stopwatch.

    Everything, inputs and autograd graphs too, is made under `torch.cuda.stream(clock.stream)`, by
    the caller: a backward runs where its forward did, and must be on the stream that is captured.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self._pool = torch.cuda.graph_pool_handle()

    def new_row(self) -> None:
        """Forget the graphs of the row before; theirs shared their memory."""
        self._pool = torch.cuda.graph_pool_handle()

    def launch(self, prepared: Prepared) -> Launch:
        """Warm up and capture; without a graph if it can't be captured."""
        for _ in range(WARM_UPS):
            prepared.run()
            if prepared.restore is not None:
                prepared.restore()
        self.stream.synchronize()
        if waits(prepared):
            return Launch(prepared.run, prepared.restore, "eager: it waits for the device")
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                prepared.run()
            return Launch(graph.replay, prepared.restore, "")
        except Exception as error:
            self.new_row()
            torch.cuda.synchronize(self.device)
            reason = (str(error).strip() or repr(error)).splitlines()[0][:60]
            return Launch(prepared.run, prepared.restore, f"eager, no graph: {reason}")

    def rounds(
        self,
        launches: Mapping[str, Launch],
        align: Callable[[], object] | None = None,
        longest_s: float = LONGEST_ROW_S,
    ) -> dict[str, Times]:
        """Time all in turn, round after round, each after a flush.

        Args:
            launches: by name.
            align: work put between flush and start, such as a collective that lets ranks start
                together.
            longest_s: the row ends after so long, if it has FEWEST_ROUNDS.
        """
        taken: dict[str, list[float]] = {name: [] for name in launches}
        begun = time.perf_counter()
        for number in range(ROUNDS + 1):
            events = {name: self._one(launch, align) for name, launch in launches.items()}
            self.stream.synchronize()
            if number == 0:
                continue  # a graph's first replay uploads it
            for name, (start, end) in events.items():
                taken[name].append(start.elapsed_time(end))
            if number >= FEWEST_ROUNDS and time.perf_counter() - begun > longest_s:
                break
        return {name: spread(values) for name, values in taken.items()}

    def _one(
        self, launch: Launch, align: Callable[[], object] | None
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if launch.restore is not None:
            launch.restore()
        self._flush.zero_()
        if align is not None:
            align()
        start.record()
        launch.go()
        end.record()
        return start, end

    def copy(self, total_bytes: int) -> Prepared:
        """torch's copy that reads half of the bytes and writes the other half."""
        numbers = max(1, total_bytes // 4)  # of 2 bytes, read and written
        source = torch.empty(numbers, dtype=torch.int16, device=self.device).random_()
        target = torch.empty_like(source)

        def run() -> tuple[Tensor, ...]:
            return (target.copy_(source),)

        return Prepared(run)

    def peak_bytes(self, prepared: Prepared) -> int:
        """Memory that one call takes over what is there before it: results and temporaries."""
        self.stream.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        results = prepared.run()
        self.stream.synchronize()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del results
        if prepared.restore is not None:
            prepared.restore()
        return peak

    def poison(self, size: int) -> None:
        """Leave NaN in memory that the next allocations are likely to get."""
        free, _ = torch.cuda.mem_get_info(self.device)
        torch.full((min(size, free // 4) // 4,), torch.nan, device=self.device)


def waits(prepared: Prepared) -> bool:
    """Whether a call has the host wait for the device, which a graph can't hold."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        prepared.run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
        if prepared.restore is not None:
            prepared.restore()
    return False


def spread(values: list[float]) -> Times:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Times(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


def host_us(run: Callable[[], object], wait: Callable[[], object]) -> float:
    """Microseconds of host time a call, of many that don't wait for the device."""
    for _ in range(WARM_UPS):
        run()
    taken = []
    for _ in range(HOST_ROUNDS):
        wait()
        begun = time.perf_counter()
        for _ in range(HOST_CALLS):
            run()
        taken.append((time.perf_counter() - begun) / HOST_CALLS * 1e6)
    wait()
    return statistics.median(taken)


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise `TooLongError` within, after that time, from the main thread's next instruction.

    Args:
        seconds: 0 for no limit.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TooLongError(f"{TooLongError.TEXT} {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
