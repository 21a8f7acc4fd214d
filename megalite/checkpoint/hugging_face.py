"""A running layout's weights from a Hugging Face folder, and to one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megalite.checkpoint.hf_export import write_hf
from megalite.checkpoint.hf_folder import HuggingFaceFolder
from megalite.checkpoint.parts import DTYPE_NAMES, Part
from megalite.checkpoint.state import MASTER, load_weights, saved_parts, start_from_weights
from megalite.config import Config
from megalite.data.source import token_texts_known
from megalite.errors import ConfigError
from megalite.layers.dtypes import DTYPES
from megalite.optim.flat import FlatParameters
from megalite.optim.optimizer import Optimizer
from megalite.parallel.groups import ParallelGroups
from megalite.saving import limit_s
from megalite.tensor_names import tensor_shapes
from megalite.tokenizer.choose import open_tokenizer
from megalite.tokenizer.hf_files import TokenizerFiles, hf_files


def open_init_from(config: Config) -> HuggingFaceFolder | None:
    """The folder of `--init-from`, with the tensors of the run's model; None if it is not given.

    Raises:
        ConfigError, DamagedError: see `HuggingFaceFolder.open`.
    """
    folder = config.checkpoint.init_from
    return HuggingFaceFolder.open(Path(folder), tensor_shapes(config.model)) if folder else None


def init_from(
    config: Config, flat: FlatParameters, optimizer: Optimizer, groups: ParallelGroups
) -> None:
    """Make a run's weights, master weights too, those of `--init-from`, if it is given.

    Every rank reads its own parts; all call it.
    """
    source = open_init_from(config)
    if source is None:
        return
    allowance_s = limit_s(config, _num_bytes(flat))
    groups.activity.begin("reading weights", "checkpoint", allowance_s=allowance_s)
    load_weights(flat, source)
    start_from_weights(flat, optimizer, source)


def export_hf(
    config: Config, flat: FlatParameters, optimizer: Optimizer, groups: ParallelGroups
) -> str:
    """Write a run's weights to `--export-hf`, if it is given; all ranks call it.

    Returns:
        A line for people: where it is, and why no tokenizer is with it, if none is.

    Raises:
        DataError: see `write_hf`.
    """
    if not config.checkpoint.export_hf:
        return ""
    allowance_s = limit_s(config, _num_bytes(flat))
    groups.activity.begin("exporting weights", "checkpoint", allowance_s=allowance_s)
    optimizer.validate()
    flat.wait_for_parameters()
    asked = config.checkpoint.export_dtype
    own = torch.float32 if flat.dtype == torch.float64 else flat.dtype
    dtype = own if asked == "auto" else DTYPES[asked]
    tokenizer = tokenizer_files(config)
    write_hf(
        Path(config.checkpoint.export_hf),
        config.model,
        exported_parts(flat, optimizer, groups, dtype),
        DTYPE_NAMES[dtype],
        tokenizer,
        config.run.name,
        is_first=groups.world_rank == 0,
        wait_for_all=lambda: groups.wait_for_all(flat.device),
    )
    told = f"; {tokenizer.told}" if tokenizer.told else ""
    return f"exported to {config.checkpoint.export_hf}, a Hugging Face model{told}"


def exported_parts(
    flat: FlatParameters, optimizer: Optimizer, groups: ParallelGroups, dtype: torch.dtype
) -> Iterator[Part]:
    """What this rank writes: of master weights, where files of this precision hold more of them
    than the weights do."""
    of_master = optimizer.has_master and dtype.itemsize > flat.dtype.itemsize
    taken = MASTER if of_master else ""
    frozen = {piece.name for _, shard in flat.frozen for piece in shard.pieces}
    for part in saved_parts(flat, optimizer if of_master else None, groups):
        if part.name.startswith(taken) or part.name in frozen:
            yield Part(part.name.removeprefix(taken), part.shape, part.region, part.values)


def tokenizer_files(config: Config) -> TokenizerFiles:
    """The files of the tokenizer of a run's data; none, and why, if they are not there any more:
    weights do not wait for them."""
    if not token_texts_known(config.data):
        return TokenizerFiles(
            told="no tokenizer files: which tokenizer the data is of was not said "
            "(--tokenizer-type)"
        )
    try:
        return hf_files(config.data, open_tokenizer(config.data, config.model.vocab_size))
    except ConfigError as error:
        return TokenizerFiles(told=f"no tokenizer files: {error.violations[0]}")


def _num_bytes(flat: FlatParameters) -> int:
    """Of this rank's weights."""
    frozen_bytes = sum(parameter.nbytes for parameter, _ in flat.frozen)
    return flat.length * flat.dtype.itemsize + frozen_bytes
