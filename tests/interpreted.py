"""The Triton kernels in Triton's interpreter, on a machine without a GPU.

Triton decides when a kernel is defined whether it will be interpreted, so the variable that asks
for it is set while triton and all kernels are imported, and taken back before tests start programs
that would inherit it. This comes before any test is collected: much of torch imports triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys

import pytest
import torch

INTERPRETED = not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None

interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="Triton's interpreter: it takes triton, and a machine without a GPU"
)
"""Of a test that runs kernels in it."""


def define_interpreted_kernels() -> None:
    """Import every kernel as an interpreted one; nothing where they are not `INTERPRETED`."""
    if not INTERPRETED:
        return
    before = os.environ.get("TRITON_INTERPRET")
    assert before == "1" or "triton" not in sys.modules, "triton was imported before its variable"
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from megalite_kernels import backend, fused

        assert backend.INTERPRETING, "imported before its variable was set"
        for module in pkgutil.iter_modules(fused.__path__, f"{fused.__name__}."):
            importlib.import_module(module.name)
        # From 3.9 on the first launch imports it, and it must be interpreted too.
        if importlib.util.find_spec("triton.experimental"):
            importlib.import_module("triton.experimental.gluon")
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
