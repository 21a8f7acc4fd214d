"""Weight gradients that are computed later than the input gradients, as a schedule wants them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from megalite.parallel.group import Pending
from megalite.parallel.tensor import TensorGroup


class ProductSums(Protocol):
    """Where weight gradients add up; `megalite.optim.flat.FlatParameters` is one."""

    def await_weight(self, parameter: nn.Parameter) -> None:
        """The parameter is about to be read."""
        ...

    def add_product(self, parameter: nn.Parameter, a: Tensor, b: Tensor) -> None:
        """a @ b to the parameter's gradient: [O, T] and [T, I], T tokens."""
        ...


@dataclass(frozen=True)
class _Product:
    """A weight gradient to come: dy^T x, [O, I].

    Attributes:
        weight: [O, I].
        dy: gradient of the layer's output, [S, B, O].
        x: the layer's input, [S, B, I], or this rank's part of the sequence.
        tp: the group to gather the input over; None if it is whole.
    """

    weight: nn.Parameter
    dy: Tensor
    x: Tensor
    tp: TensorGroup | None

    def start(self) -> Pending:
        """The whole input under way."""
        return Pending(self.x) if self.tp is None else self.tp.start_all_gather(self.x)


class WeightGradients:
    """Those of one stage's linear layers: where they go, and when they are computed.

    With `sums` the product that makes a weight gradient adds it to the sum over micro-batches, in
    that sum's precision, and autograd sees no gradient of the weight.

    While a backward runs inside `deferring`, its linear layers leave the factors of their weight
    gradients here, and `compute` multiplies them when the plan says so. Other parameters' gradients
    (of norm weights and the embedding) are made with the input gradients.

    Sources: Qi et al., "Zero Bubble Pipeline Parallelism", arXiv:2401.10241; for the sums,
    Megatron-LM's fusion of gradient accumulation.

    Attributes:
        sums: where the products add up; None: each is a gradient of its own, for autograd.
    """

    def __init__(self) -> None:
        self.sums: ProductSums | None = None
        self._deferred: dict[int, deque[_Product]] = {}
        self._micro_batch: int | None = None

    @contextmanager
    def deferring(self, micro_batch: int) -> Iterator[None]:
        """The backward in this context computes input gradients only."""
        self._micro_batch = micro_batch
        self._deferred[micro_batch] = deque()
        try:
            yield
        finally:
            self._micro_batch = None

    def defer(
        self, weight: nn.Parameter, dy: Tensor, x: Tensor, tp: TensorGroup | None = None
    ) -> bool:
        """Take the factors of a weight gradient, if it is to be computed later.

        Returns:
            Whether it is; otherwise the layer computes it now.
        """
        if self._micro_batch is None:
            return False
        self._deferred[self._micro_batch].append(_Product(weight, dy, x, tp))
        return True

    def await_weight(self, weight: nn.Parameter) -> None:
        """A backward is about to read a weight, which is not always there."""
        if self.sums is not None:
            self.sums.await_weight(weight)

    def give(self, weight: nn.Parameter, dy: Tensor, x: Tensor) -> Tensor | None:
        """dy^T x over all tokens, [O, I], to where it adds up; else returned for autograd.

        Args:
            weight: [O, I].
            dy: gradient of the layer's output, [S, B, O].
            x: the layer's whole input, [S, B, I].
        """
        a, b = _factors(dy, x)
        if self.sums is None:
            return a @ b
        self.sums.add_product(weight, a, b)
        return None

    def compute(self, micro_batch: int) -> Iterator[tuple[nn.Parameter, Tensor, Tensor]]:
        """Each weight with the factors of its gradient, [O, T] and [T, I]; they are forgotten one
        by one.

        Collective over the tensor group where inputs have to be gathered: each is gathered while
        the product before it is computed.
        """
        products = self._deferred.pop(micro_batch)
        gathered = products[0].start() if products else None
        while products:
            product = products.popleft()
            assert gathered is not None, "started with the product before"
            x = gathered.wait()
            gathered = products[0].start() if products else None
            yield product.weight, *_factors(product.dy, x)


def _factors(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """[S, B, O], [S, B, I] -> [O, T], [T, I]."""
    return dy.flatten(0, -2).t(), x.flatten(0, -2)
