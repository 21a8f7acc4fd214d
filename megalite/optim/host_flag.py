"""A flag on the device that the host asks for later."""

from __future__ import annotations

import torch
from torch import Tensor


class HostFlag:
    """What a flag is now, for the host to read once the device has come to this point.

    Reading waits for nothing that is queued behind it.

    Args:
        flag: one element; it may change afterwards.
    """

    def __init__(self, flag: Tensor):
        self._arrived: torch.cuda.Event | None = None
        if not flag.is_cuda:
            self._value = flag.clone()
            return
        self._value = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
        self._value.copy_(flag, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def read(self) -> bool:
        """Whether it was set."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)
