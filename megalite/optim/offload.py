"""Optimizer states that lie in the host's memory, and are on the device while they are updated.

The update is the same kernel on the same numbers, so its bits are. States of a span come while the
one before is updated, and go back while the next one is: two spans are on the device at a time, in
buffers that stay. What crosses the bus is 12 bytes of each parameter of a bf16 run, both ways.

Source: after Ren et al., "ZeRO-Offload", arXiv:2101.06840, which updates on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from megalite.errors import ConfigError

Home = tuple[Tensor, ...]
"""The states of one span, in the host's memory, each of its length or empty."""


class HostMemory:
    """A block of the host's memory for all states of one kind, pinned for a GPU.

    One block, because torch rounds each up to a power of two.

    Args:
        length: elements of all of them.
        dtype: of each.
        device: where they come from.

    Raises:
        ConfigError: there is not so much memory that can be pinned.
    """

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device):
        self._taken = 0
        gib = length * dtype.itemsize / 2**30
        try:
            self._block = torch.empty(length, dtype=dtype, pin_memory=device.type == "cuda")
        except RuntimeError as error:
            raise ConfigError(
                f"--offload-optimizer: {gib:.1f} GiB more of the host's memory can't be pinned "
                f"({str(error).splitlines()[0]}); give more --dp, raise the "
                "limit (ulimit -l), or leave it out"
            ) from error

    def keep(self, state: Tensor) -> Tensor:
        """A copy of one of them."""
        begin, self._taken = self._taken, self._taken + len(state)
        return self._block[begin : self._taken].copy_(state)


class Offloaded:
    """Brings states to the device and back.

    Args:
        homes: of all spans.
        device: where they are updated.
    """

    def __init__(self, homes: Sequence[Home], device: torch.device):
        self._buffers = [
            [
                torch.empty(max(map(len, kind)), dtype=kind[0].dtype, device=device)
                for kind in zip(*homes, strict=True)
            ]
            for _ in range(min(2, len(homes)))
        ]
        self._way_in = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._way_out = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._gone: list[torch.cuda.Event | None] = [None, None]

    def visit(self, homes: Sequence[Home]) -> Iterator[tuple[Tensor, ...]]:
        """The states of each span in turn, on the device; what they are when the next ones are
        asked for goes back. The host waits for nothing."""
        if not homes:
            return
        _follow(self._way_in, self._way_out)  # what the last step sent back
        arriving = self._bring(homes[0], 0)
        for number, home in enumerate(homes):
            here = arriving
            if self._way_in is not None:
                torch.cuda.current_stream().wait_stream(self._way_in)
            if number + 1 < len(homes):
                arriving = self._bring(homes[number + 1], (number + 1) % 2)
            yield here
            self._send_back(here, home, number % 2)

    def settle(self) -> None:
        """What is read on the device afterwards comes after what is on its way back."""
        if self._way_out is not None:
            torch.cuda.current_stream().wait_stream(self._way_out)

    def _bring(self, home: Home, slot: int) -> tuple[Tensor, ...]:
        here = tuple(
            buffer[: len(state)] for buffer, state in zip(self._buffers[slot], home, strict=True)
        )
        gone = self._gone[slot]
        with _on(self._way_in):
            if self._way_in is not None and gone is not None:
                self._way_in.wait_event(gone)
            for buffer, state in zip(here, home, strict=True):
                buffer.copy_(state, non_blocking=True)
        return here

    def _send_back(self, here: tuple[Tensor, ...], home: Home, slot: int) -> None:
        if self._way_out is not None:
            self._way_out.wait_stream(torch.cuda.current_stream())
        with _on(self._way_out):
            for buffer, state in zip(here, home, strict=True):
                state.copy_(buffer, non_blocking=True)
        if self._way_out is not None:
            self._gone[slot] = self._way_out.record_event()


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _follow(stream: torch.cuda.Stream | None, other: torch.cuda.Stream | None) -> None:
    if stream is not None and other is not None:
        stream.wait_stream(other)
