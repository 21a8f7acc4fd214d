"""Which implementation serves a call: the Triton kernels or plain torch.

`auto`, the default, decides per call by the device: Triton for CUDA tensors of at most 32 bits,
torch for the rest. `use_backend` and the environment variable MEGALITE_KERNELS override it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

VARIABLE = "MEGALITE_KERNELS"
CHOICES = ("auto", "triton", "torch")
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_CAPABILITY = (7, 0)
"""Compute capability from which Triton compiles for a card."""

_forced: ContextVar[str | None] = ContextVar("megalite_kernels_backend", default=None)


class BackendError(RuntimeError):
    """The back end that was asked for, or that the device calls for, can't serve."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Take one back end for the calls within, in this thread or task.

    A function under `torch.compile` does not see it: a compiler can't follow context variables, so
    there the environment variable decides, as it is at the time of compilation.

    Args:
        name: "auto", "triton" or "torch".

    Raises:
        ValueError: another name.
    """
    token = _forced.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def chosen_backend() -> str:
    """What serves, "auto", "triton" or "torch": of `use_backend`, else of MEGALITE_KERNELS."""
    forced = None if torch.compiler.is_compiling() else _forced.get()
    return forced if forced is not None else _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


def runs_fused(x: Tensor) -> bool:
    """Whether the Triton kernels serve a call whose first tensor is `x`.

    Raises:
        BackendError: a CUDA tensor, and Triton can't serve it; or "triton" was asked for and can't.
    """
    choice = chosen_backend()
    if choice == "torch" or x.dtype not in FUSED_DTYPES:
        return False
    if x.is_cuda:
        if not torch.compiler.is_compiling():  # which needs Triton itself, and says so
            require_triton(x.get_device())
        return True
    if choice == "auto":
        return False
    if not torch.compiler.is_compiling() and not interpreting():
        raise BackendError(
            f"{VARIABLE}=triton: a tensor on {x.device.type} needs Triton's interpreter; "
            f"set TRITON_INTERPRET=1 before the start, or {VARIABLE}=auto"
        )
    return True


@cache
def interpreting() -> bool:
    """Whether this process runs Triton kernels in Triton's interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _has_triton()


@cache
def require_triton(device_index: int) -> None:
    """Raise unless Triton can serve this CUDA device.

    Raises:
        BackendError: with the remedy.
    """
    reason = triton_trouble(device_index)
    if reason is not None:
        raise BackendError(f"{reason}, or set {VARIABLE}=torch to run plain torch (slower)")


def triton_trouble(device_index: int) -> str | None:
    """What keeps Triton from serving a CUDA device, with the remedy; None if nothing does."""
    if not _has_triton():
        return "megalite's kernels on a GPU need triton, which is not installed: pip install triton"
    capability = torch.cuda.get_device_capability(device_index)
    if capability < OLDEST_CAPABILITY:
        card = torch.cuda.get_device_name(device_index)
        oldest = ".".join(map(str, OLDEST_CAPABILITY))
        found = ".".join(map(str, capability))
        return f"triton needs compute capability {oldest}, and {card} has {found}: use a newer card"
    return None


def describe_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Who serves calls on this device, "triton 3.6.0" or "torch", for a run's opening lines."""
    if not runs_fused(torch.empty(0, device=device, dtype=dtype)):
        return "torch"
    import triton

    return f"triton {triton.__version__}"


def _checked(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(
            f"{source}: {name!r} is not a back end; choose one of {', '.join(CHOICES)}"
        )
    return name


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
