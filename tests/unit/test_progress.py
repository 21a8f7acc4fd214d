"""Marks of a GPU's progress, on a CPU whose copies arrive at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megalite.parallel import progress
from megalite.parallel.progress import GpuProgress


def not_pinned(full: Callable, *args: Any, pin_memory: bool) -> torch.Tensor:
    """Pinned memory needs a GPU."""
    return full(*args)


def test_numbers_repeat_and_order_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "NUMBERS", 8)
    monkeypatch.setattr(progress.torch, "full", functools.partial(not_pinned, torch.full))
    gpu = GpuProgress(torch.device("cpu"))
    assert gpu.passed_since(0) == -1
    for turn in range(20):
        number = gpu.mark()
        assert number == turn % 8
        assert gpu.passed_since(number) == 0
        assert gpu.passed_since((number + 1) % 8) == -1
        assert turn < 3 or gpu.passed_since((number - 3) % 8) == 3
