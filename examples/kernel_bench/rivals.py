"""Who takes part, and who doesn't and why."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch

from kernel_bench import rivals_apex, rivals_torch
from kernel_bench.problem import Builder, Prepared, Problem

COMPILED = MappingProxyType({"compile": "default", "compile-max": "max-autotune-no-cudagraphs"})
LONGEST_COMPILATION_S = 45


class Rival(NamedTuple):
    """A contestant that can be imported.

    Args:
        name, version: for the table.
        build: prepares it for a problem; raises `UnsupportedError` if it has no such op.
        compiles: its first call compiles for long and is cut off.
    """

    name: str
    version: str
    build: Builder
    compiles: bool = False


def found(names: Sequence[str] | None = None) -> tuple[list[Rival], dict[str, str]]:
    """The contestants that are here, in the table's order, and why others aren't.

    Args:
        names: those to look for; all if None.
    """
    here, absent = [], {}
    for name, look in _LOOKUPS.items():
        if names is not None and name not in names:
            continue
        try:
            with warnings.catch_warnings():  # of what they'd like to have beside them
                warnings.simplefilter("ignore")
                here.append(look(name))
        except Exception as error:  # a broken installation may raise anything
            absent[name] = str(error).strip().splitlines()[0] if str(error) else repr(error)
    return here, absent


def _module(package: str, module: str, builder: str, name: str) -> Rival:
    importlib.import_module(module)
    build = importlib.import_module(f"kernel_bench.{builder}").build
    return Rival(name, importlib.metadata.version(package), build)


def _ours(name: str) -> Rival:
    from kernel_bench import rivals_ours

    return Rival(name, "", rivals_ours.BUILDERS[name])


def _torch(name: str) -> Rival:
    return Rival(name, torch.__version__, rivals_torch.build)


def _step_only(name: str) -> Rival:
    return Rival(name, torch.__version__, rivals_torch.build_step_only)


def _compiled(name: str) -> Rival:
    def build(problem: Problem) -> Prepared:
        return rivals_torch.build_compiled(problem, COMPILED[name])

    return Rival(name, torch.__version__, build, compiles=True)


def _apex(name: str) -> Rival:
    reason = rivals_apex.missing()
    if reason is not None:
        raise ImportError(reason)
    import amp_C  # noqa: F401

    return Rival(name, "", rivals_apex.build)


_LOOKUPS: Mapping[str, Callable[[str], Rival]] = MappingProxyType(
    {
        "ours": _ours,
        "ours-main": _ours,
        "ours-unfused": _ours,
        "torch": _torch,
        "torch-step": _step_only,
        "compile": _compiled,
        "compile-max": _compiled,
        "liger": partial(_module, "liger-kernel", "liger_kernel.functional", "rivals_liger"),
        "quack": partial(_module, "quack-kernels", "quack", "rivals_quack"),
        "megatron": partial(_module, "megatron-core", "megatron.core", "rivals_megatron"),
        "apex": _apex,
    }
)
NAMES = tuple(_LOOKUPS)
