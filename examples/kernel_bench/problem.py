"""One op on one size: its inputs, and the call that a contestant makes on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

FORWARD, BACKWARD, BOTH, STEP = "forward", "backward", "forward+backward", "step"

Run = Callable[[], tuple[Tensor, ...]]
Outputs = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
Expected = tuple[int, slice, Tensor]
"""Index of a result, rows of it, what they should be."""


class UnsupportedError(Exception):
    """A contestant that has no such op, or not on this size; the text says why."""


@dataclass(frozen=True)
class Problem:
    """What every contestant is given.

    Args:
        op, direction, size: of the case.
        tensors: inputs by name. A contestant that overwrites one works on a copy of its own.
        leaves: names of the inputs whose gradients are asked for.
        gradients: of the outputs, in a backward; empty if the output is a scalar loss.
        options: numbers and words: scale, layout, heads.
    """

    op: str
    direction: str
    size: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    leaves: tuple[str, ...] = ()
    gradients: tuple[Tensor, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A contestant that is ready to run.

    Args:
        run: launches the work; its results come in the order of the op's definition.
        restore: puts back inputs that `run` has overwritten; None if it overwrites none.
        note: what a reader should know of this contestant.
    """

    run: Run
    restore: Callable[[], None] | None = None
    note: str = ""


Builder = Callable[[Problem], Prepared]


def plain(outputs: Outputs, note: str = "") -> Builder:
    """The builder of a contestant that is a function of the problem's tensors."""

    def build(problem: Problem) -> Prepared:
        return Prepared(call(problem, outputs), note=note)

    return build


def call(problem: Problem, outputs: Outputs, *, entrance: bool = False) -> Run:
    """The forward, the backward or both, by autograd.

    Args:
        problem: its direction says which.
        outputs: the function of its tensors.
        entrance: hand over the leaves behind an identity, to a function that writes into them.
    """
    if problem.direction in (FORWARD, STEP):

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return outputs(problem.tensors)

        return forward

    leaves = [problem.tensors[name].detach().requires_grad_() for name in problem.leaves]

    def made() -> tuple[Tensor, ...]:
        given = [_Entrance.apply(leaf) for leaf in leaves] if entrance else leaves
        return outputs({**problem.tensors, **dict(zip(problem.leaves, given, strict=True))})

    def gradients(results: tuple[Tensor, ...], keep: bool) -> tuple[Tensor, ...]:
        differentiable = [result for result in results if result.requires_grad]
        grads = problem.gradients or None
        return torch.autograd.grad(differentiable, leaves, grads, retain_graph=keep)

    if problem.direction == BOTH:

        def both() -> tuple[Tensor, ...]:
            results = made()
            return (*(result.detach() for result in results), *gradients(results, keep=False))

        return both

    graph: list[tuple[Tensor, ...]] = []

    def backward() -> tuple[Tensor, ...]:
        if not graph:  # made where it will run: autograd goes back on the forward's stream
            graph.append(made())
        return gradients(graph[0], keep=True)

    return backward


def in_place(problem: Problem, names: Iterable[str]) -> tuple[Problem, Callable[[], None]]:
    """The problem on copies of some of its tensors, and what makes the copies new again."""
    originals = {name: problem.tensors[name] for name in names}
    copies = {name: tensor.clone() for name, tensor in originals.items()}

    def restore() -> None:
        for name, copy in copies.items():
            copy.copy_(originals[name])

    return replace(problem, tensors={**problem.tensors, **copies}), restore


def largest_error(results: tuple[Tensor, ...], expected: Iterable[Expected]) -> float:
    """The largest ||result - expected|| / ||expected|| over the results; nan and inf stay so."""
    wrong: dict[int, Tensor] = {}
    right: dict[int, Tensor] = {}
    for index, rows, reference in expected:
        found = results[index]
        if found.dim() > reference.dim():
            found = found.flatten(0, -2)
        if found.dim():
            found = found[rows]
        if found.shape != reference.shape:
            raise ValueError(f"result {index} is {found.shape}, expected {reference.shape}")
        difference = (found.to(reference.dtype) - reference).square().sum()
        wrong[index] = wrong.get(index, 0.0) + difference
        right[index] = right.get(index, 0.0) + reference.square().sum()
    if len(wrong) != len(results):
        raise ValueError(f"{len(results)} results, and {len(wrong)} are expected")
    errors = [float((wrong[i] / right[i]).sqrt()) for i in wrong]
    return max(errors, key=lambda error: error if error == error else float("inf"))


class _Entrance(Function):
    """Identity on the same memory: what comes out may be written to, a leaf may not."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
