"""How every kernel is launched: raw in eager mode, as an opaque operator under torch.compile.

An eager call of a registered operator adds host time to the launch (about 10 us, as reported in
PyTorch's issue 177109; not measured here), and a compiled graph needs an operator to know shapes
without running the kernel; so each launching function is both, chosen by whether a compiler traces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Launcher = TypeVar("Launcher", bound=Callable[..., Any])

_NOWHERE = nullcontext()


def operator(
    fake: Callable[..., Any], mutates: Iterable[str] = ()
) -> Callable[[Launcher], Launcher]:
    """Make a launching function an operator `megalite::<its name>` where a compiler traces it.

    The function takes and returns tensors, numbers and strings with annotations that
    `torch.library.infer_schema` reads; what it returns must be new tensors (None if it works in
    place). It is called between an `autograd.Function`'s forward and backward, so it has no
    gradient of its own.

    Args:
        fake: the same arguments to results of right shape, dtype and strides, without data.
        mutates: names of the arguments that are written to.
    """

    def decorate(launch: Launcher) -> Launcher:
        name = f"megalite::{launch.__name__.strip('_')}"
        op = torch.library.custom_op(name, launch, mutates_args=tuple(mutates))
        op.register_fake(fake)

        @functools.wraps(launch)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return op(*args)
            return launch(*args)

        return cast(Launcher, call)

    return decorate


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Make x's GPU the current one, as a launch needs; costs nothing if it is already."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NOWHERE
    return torch.cuda.device(x.get_device())


def num_multiprocessors(x: Tensor) -> int:
    """Of the tensor's GPU; a small number in Triton's interpreter, where programs run in turn."""
    return _multiprocessors(x.get_device()) if x.is_cuda else INTERPRETED_MULTIPROCESSORS


INTERPRETED_MULTIPROCESSORS = 4


@functools.cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count
