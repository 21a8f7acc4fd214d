"""How far a GPU has come, readable while nothing else about it is.

Work is queued on a GPU long before it runs. Asking the driver whether an event has been reached
takes a lock that a launch into a full queue holds, which is what a hanging rank is in; and the
interpreter waits with it. So the GPU itself writes numbers to the host's memory as it goes.
"""

from __future__ import annotations

import torch

NUMBERS = 1 << 14
"""Numbers repeat after so many: more than the queue of a GPU holds."""


class GpuProgress:
    """Marks in the queue of one GPU.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device):
        # Cut here, not at every mark.
        self._numbers = torch.arange(NUMBERS, device=device).split(1)
        self._host = torch.full((1,), NUMBERS - 1, pin_memory=True)
        self._reached = self._host.numpy()
        self._next = 0

    def mark(self) -> int:
        """Put the next number into the current stream's queue; returns it."""
        number = self._next
        self._host.copy_(self._numbers[number], non_blocking=True)
        self._next = (number + 1) % NUMBERS
        return number

    def passed_since(self, number: int) -> int:
        """How many marks have been reached after this one; -1 if it has not been itself."""
        passed = (int(self._reached[0]) - number) % NUMBERS
        return passed if passed < NUMBERS // 2 else -1
