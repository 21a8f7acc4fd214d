"""Which implementation serves a call: the Triton kernels or plain torch.

`auto`, the default, decides per call by the device: Triton for CUDA tensors of at most 32 bits,
torch for the rest. `use_backend` and the environment variable MEGALITE_KERNELS override it.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

VARIABLE = "MEGALITE_KERNELS"
CHOICES = ("auto", "triton", "torch")
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_CAPABILITY = (7, 0)
"""Compute capability from which Triton compiles for a card."""
OLDEST_TRITON = (3, 4)
"""The first version in which a kernel can start before the one it waits for has ended."""
_INTERPRETER_WORDS = ("1", "true", "on", "yes", "y")
"""What Triton takes for a yes, in small letters or capitals."""
_PLAIN = f"set {VARIABLE}=torch to run plain torch (slower)"


class BackendError(RuntimeError):
    """The back end that was asked for, or that the device calls for, can't serve."""


def interpreter_asked() -> bool:
    """Whether TRITON_INTERPRET, as it is now, asks for Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _INTERPRETER_WORDS


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


# Constants, because a compiler that traces a decision can follow no look-up.
INSTALLED = _is_installed("triton")
INTERPRETING = INSTALLED and interpreter_asked()
"""Whether this process runs Triton kernels in Triton's interpreter, on CPU tensors too.

Triton itself decides it once, when a kernel is defined.
"""


class _Switch:
    """What `use_backend` asks for in this process; None: nothing."""

    forced: str | None = None


_SWITCH = _Switch()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Take one back end for the calls within, in every thread of the process.

    It is no matter of one thread, because autograd runs the backward of CUDA tensors in threads of
    its own: a checkpointed forward that is computed again there has to be served as it was before.
    So keep the block open over the backward too; what is computed again after its end is served by
    what is in force then, and torch's checkpoint may find that it saved other tensors. Compiled
    functions follow the choice: they are compiled again when it changes.

    Args:
        name: "auto", "triton" or "torch".

    Raises:
        ValueError: another name.
    """
    before, _SWITCH.forced = _SWITCH.forced, _checked(name, "use_backend")
    try:
        yield
    finally:
        _SWITCH.forced = before


def chosen_backend() -> str:
    """What serves, "auto", "triton" or "torch": of `use_backend`, else of MEGALITE_KERNELS."""
    return _SWITCH.forced or _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)


def runs_fused(x: Tensor) -> bool:
    """Whether the Triton kernels serve a call whose first tensor is `x`.

    Raises:
        BackendError: a CUDA tensor, and Triton can't serve it; or "triton" was asked for and can't.
    """
    return fused_on(x.device, x.dtype)


def fused_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels serve tensors of this device and dtype; raises as `runs_fused`.

    Under `torch.compile` it is decided while the call is traced. What only the card or Triton can
    tell is not asked then: the compiler needs them itself. With `fullgraph=True` torch wraps the
    error.
    """
    choice = chosen_backend()
    if choice == "torch" or dtype not in FUSED_DTYPES:
        return False
    if device.type == "cuda":
        if not torch.compiler.is_compiling():
            require_triton(device.index)
        elif (reason := _installation_trouble()) is not None:
            raise BackendError(reason)
        return True
    if choice == "auto":
        return False
    if not INTERPRETING:
        raise BackendError(
            f"{VARIABLE}=triton: on a {device.type.upper()} the kernels need Triton's interpreter; "
            f"set TRITON_INTERPRET=1 before the start, or {VARIABLE} to auto or torch"
        )
    return True


@cache
def require_triton(device_index: int | None) -> None:
    """Raise unless Triton can serve this CUDA device.

    Raises:
        BackendError: with the remedy.
    """
    reason = triton_trouble(device_index)
    if reason is not None:
        raise BackendError(reason)


def triton_trouble(device_index: int | None) -> str | None:
    """What keeps Triton from serving a CUDA device, with the remedies; None if nothing does."""
    reason = _installation_trouble()
    if reason is not None:
        return reason
    version = _triton_version()
    if _numbers(version) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return (
            f"megalite's kernels need triton {oldest}, and {version} is installed: "
            f"pip install 'triton>={oldest}', or {_PLAIN}"
        )
    capability = torch.cuda.get_device_capability(device_index)
    if capability < OLDEST_CAPABILITY:
        card = torch.cuda.get_device_name(device_index)
        oldest = ".".join(map(str, OLDEST_CAPABILITY))
        found = ".".join(map(str, capability))
        return (
            f"triton needs compute capability {oldest}, and {card} has {found}: "
            f"use a newer card, or {_PLAIN}"
        )
    return None


def _installation_trouble() -> str | None:
    """The part of `triton_trouble` that a compiler can follow."""
    if torch.version.hip is not None:
        return f"megalite's kernels are for NVIDIA's GPUs, and this torch is for AMD's: {_PLAIN}"
    if not INSTALLED:
        return (
            "megalite's kernels on a GPU need triton, which is not installed: "
            f"pip install triton, or {_PLAIN}"
        )
    return None


def describe_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Who serves calls on this device, "triton 3.6.0" or "torch", for a run's opening lines."""
    return f"triton {_triton_version()}" if fused_on(device, dtype) else "torch"


def _triton_version() -> str:
    import triton

    return triton.__version__


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _checked(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(
            f"{source}: {name!r} is not a back end; choose one of {', '.join(CHOICES)}"
        )
    return name
