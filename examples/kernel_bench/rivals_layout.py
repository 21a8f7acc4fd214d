"""Rotary embedding for rivals that keep the batch before the sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kernel_bench.problem import Problem, Run


def batch_first(problem: Problem) -> tuple[Problem, Callable[[], None], Callable[[Run], Run]]:
    """The problem on contiguous [B, S, ...] copies, which the rival may turn in place.

    Returns:
        The problem; what makes its copies and gradients new again; what turns the rival's call
        into one with results as [S, B, ...] views.
    """
    given = {name: problem.tensors[name] for name in problem.leaves}
    copies = {name: _swapped(tensor) for name, tensor in given.items()}
    gradients = tuple(map(_swapped, problem.gradients))

    def restore() -> None:
        for name, copy in copies.items():
            copy.copy_(given[name].transpose(0, 1))
        for copy, gradient in zip(gradients, problem.gradients, strict=True):
            copy.copy_(gradient.transpose(0, 1))

    def back(run: Run) -> Run:
        def first_sequence() -> tuple[Tensor, ...]:
            return tuple(result.transpose(0, 1) for result in run())

        return first_sequence

    tensors = {**problem.tensors, **copies}
    return replace(problem, tensors=tensors, gradients=gradients), restore, back


def _swapped(x: Tensor) -> Tensor:
    """A copy even of a batch of one, whose transpose is contiguous already."""
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format)
