"""Rows for software: kernels, attention, optional packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import torch

import megalite
from megalite.config import Config, resolve, resolve_device
from megalite.diagnosis.row import ABSENT, BROKEN, OK, SLOWER, WARNING, Row
from megalite.layers.sdpa import attention_back_end, fastest_attention
from megalite.presets import PRESETS
from megalite_kernels import OPERATIONS, BackendError, back_ends
from megalite_kernels.backend import interpreter_asked

APEX_SOURCE = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation "
    "git+https://github.com/NVIDIA/apex"
)


def packages() -> list[Row]:
    """All rows of this room."""
    return [
        Row("megalite", OK, f"{megalite.__version__}, {Path(megalite.__file__).parent}"),
        _triton(),
        *_operations(),
        _attention(),
        _apex(),
        _flash_attention(),
        _tokenizers(),
        _tensorboard(),
    ]


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution; None if there is none. Imports nothing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton() -> Row:
    version = version_of("triton")
    if version is None:
        if sys.platform != "linux":
            return Row("triton", ABSENT, "none: it exists on Linux only; torch's operations run")
        return Row("triton", ABSENT, "none: torch's operations run", "", "pip install triton")
    if interpreter_asked():
        asked = os.environ["TRITON_INTERPRET"]
        why = f"TRITON_INTERPRET={asked}: kernels run in Python, thousands of times slower"
        return Row("triton", SLOWER, version, why, "unset TRITON_INTERPRET")
    if not torch.cuda.is_available():
        return Row("triton", OK, f"{version}; idle, as there is no GPU to compile for")
    return Row("triton", OK, version)


def _operations() -> list[Row]:
    """What serves the operations between the matrix products on this machine's devices."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    try:
        served = back_ends(device, torch.bfloat16)
    except BackendError as error:
        where = "GPU" if has_gpu else "CPU"
        return [Row("kernels", BROKEN, f"none can run on the {where}", str(error))]
    names = ", ".join(OPERATIONS)
    if "torch" in served.values() and has_gpu:
        why = "MEGALITE_KERNELS=torch: several passes over memory for each"
        return [Row("kernels", SLOWER, f"torch: {names}", why, "unset MEGALITE_KERNELS")]
    back_end = served[OPERATIONS[0]]
    return [Row("kernels", OK, f"{back_end}: {names}")]


def _attention() -> Row:
    """What serves the attention of the preset `1b`, in the precision that is usual here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = resolve_device(resolve(Config().replace(**PRESETS["1b"])), device.type)
    with fastest_attention(device):
        text = attention_back_end(config, device)
    text += f" (head dim {config.model.head_dim}, {config.train.precision})"
    if device.type == "cuda" and "cuDNN" not in text and "flash" not in text:
        why = "this GPU has neither cuDNN's nor the flash kernel"
        return Row("attention", SLOWER, text, why)
    return Row("attention", OK, text)


def _apex() -> Row:
    genuine, why = apex_status()
    if genuine:
        return Row("NVIDIA apex", OK, f"at {why}; nothing in this version of megalite needs it")
    if "not NVIDIA's" in why:
        return Row("NVIDIA apex", WARNING, "none", why, "pip uninstall apex")
    text = f"none ({why}); nothing in this version of megalite needs it"
    enable = APEX_SOURCE if torch.cuda.is_available() else ""
    return Row("NVIDIA apex", ABSENT, text, "", enable)


def apex_status() -> tuple[bool, str]:
    """Whether NVIDIA's apex is installed, and where it is or why not.

    The package of that name on PyPI is a stranger's, so nothing named apex is imported to find out.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return False, "not installed"
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / "optimizers/fused_adam.py").is_file():
        return False, f"the package at {folder} is not NVIDIA's: it is the stranger of that name"
    if importlib.util.find_spec("amp_C") is None:
        return False, f"{folder} was built without its CUDA extensions"
    return True, str(folder)


def _flash_attention() -> Row:
    version = version_of("flash-attn")
    text = "torch brings flash and cuDNN kernels of its own, and those run"
    if version is None:
        return Row("flash-attn", ABSENT, f"none; {text}")
    problem = import_problem("flash_attn")
    if problem:
        why = f"flash-attn {version} cannot be imported: {problem}"
        return Row("flash-attn", WARNING, text, why, "pip uninstall flash-attn")
    return Row("flash-attn", ABSENT, f"{version} is installed, but not used: {text}")


def import_problem(module: str) -> str:
    """Why a module cannot be imported; empty if it can. It may be built for another torch."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return ""


def _tokenizers() -> Row:
    found = [
        f"{name} {version}"
        for name in ("sentencepiece", "tiktoken", "tokenizers")
        if (version := version_of(name))
    ]
    text = "bytes, GPT-2's and tiktoken's files; with their packages SentencePiece, tokenizer.json"
    if found:
        text += f" ({', '.join(found)} installed)"
    return Row("tokenizers", OK, text)


def _tensorboard() -> Row:
    version = version_of("tensorboard")
    if version is None:
        enable = "pip install tensorboard"
        return Row("TensorBoard", ABSENT, "none: scalars go to metrics.jsonl only", "", enable)
    return Row("TensorBoard", OK, version)
