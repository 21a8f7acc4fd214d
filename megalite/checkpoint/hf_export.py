"""Weights as a Hugging Face model: written by all ranks straight to its files, there at once.

    DIR.tmp-<run>/   while it is written; it gets its name when all of it is on the disk
    DIR/config.json, generation_config.json, model*.safetensors, its index, the tokenizer's files

transformers, and what reads its folders (lm_eval, vLLM, ...), load it without any code of ours.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megalite.checkpoint.directory import sync_folder
from megalite.checkpoint.hf_folder import INDEX
from megalite.checkpoint.parts import Part
from megalite.checkpoint.whole_files import MOST_BYTES, WholeFiles
from megalite.config_model import ModelConfig
from megalite.errors import DataError
from megalite.hf_config import NAME, to_hf_config
from megalite.tensor_names import tensor_shapes
from megalite.tokenizer.hf_files import TokenizerFiles

TORCH_NAMES: Mapping[str, str] = MappingProxyType(
    {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
)
"""What config.json calls the precisions of safetensors."""


def write_hf(
    folder: Path,
    model: ModelConfig,
    parts: Iterable[Part],
    dtype: str,
    tokenizer: TokenizerFiles,
    run_id: str,
    *,
    is_first: bool = True,
    wait_for_all: Callable[[], None] = lambda: None,
    most_bytes: int = MOST_BYTES,
) -> None:
    """Write a model; all ranks call it, and it is there when it returns.

    Args:
        folder: of the model; not there yet, or empty. Equal on all ranks, on a disk that all see.
        model: resolved.
        parts: of its tensors, that this rank writes; all ranks together have all, once.
        dtype: of the files, as safetensors calls it.
        tokenizer: that goes along.
        run_id: names the folder until it is complete; equal on all ranks.
        is_first: on the rank that makes folder and files.
        wait_for_all: returns when every rank has called it.
        most_bytes: of one file; see `MOST_BYTES`.

    Raises:
        DataError: the folder can't be written to, or a value does not fit the precision.
    """
    temporary = folder.with_name(f"{folder.name}.tmp-{run_id}")
    shapes = tensor_shapes(model)
    files = WholeFiles.plan(
        temporary, {name: (dtype, shape) for name, shape in shapes.items()}, most_bytes
    )
    try:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run of this name that died
            temporary.mkdir(parents=True)
            files.create()
        wait_for_all()
        files.write(parts)
        wait_for_all()
        if is_first:
            for name, content in _small_files(model, files, dtype, tokenizer).items():
                _write_small(temporary / name, content)
            sync_folder(temporary)
            os.rename(temporary, folder)
            sync_folder(folder.parent)
        wait_for_all()
    except OSError as error:
        raise DataError(
            f"{folder} can't be written: {error.strerror} ({error.filename or temporary}); it has "
            "to be a new folder, on a disk that all ranks see"
        ) from None
    finally:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)  # it is there no more if all went well


def _small_files(
    model: ModelConfig, files: WholeFiles, dtype: str, tokenizer: TokenizerFiles
) -> dict[str, bytes]:
    ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    content: dict[str, Any] = {
        NAME: to_hf_config(model, TORCH_NAMES[dtype], tokenizer.bos, tokenizer.eos),
        "generation_config.json": {key: token for key, token in ends.items() if token is not None},
    }
    if len(files.layouts) > 1:
        places = {
            entry.name: name for name, layout in files.layouts.items() for entry in layout.entries
        }
        size = sum(entry.num_bytes for each in files.layouts.values() for entry in each.entries)
        content[INDEX] = {"metadata": {"total_size": size}, "weight_map": places}
    texts = {name: (json.dumps(each, indent=2) + "\n").encode() for name, each in content.items()}
    return texts | dict(tokenizer.files)


def _write_small(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
