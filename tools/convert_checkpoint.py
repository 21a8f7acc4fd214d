"""Weights between megalite's checkpoints and Hugging Face's folders, one tensor at a time.

python tools/convert_checkpoint.py --input runs/x/weights --output x-hf --to hf
python tools/convert_checkpoint.py --input llama-hf --output checkpoints --to megalite

The input is a checkpoint, a folder of them (the newest that is not damaged), or a Hugging Face
LLaMA: safetensors, or the older pytorch_model*.bin (or model.pt), of which tensors alone are read.
A run needs no conversion: --init-from and --export-hf of `python -m megalite.pretrain` read and
write those folders themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megalite.check_hf import is_taken
from megalite.checkpoint.hf_export import write_hf
from megalite.checkpoint.hf_folder import (
    DERIVED,
    INDEX,
    PRECISIONS,
    WEIGHTS,
    HuggingFaceFolder,
    is_plain,
)
from megalite.checkpoint.hugging_face import tokenizer_files
from megalite.checkpoint.parts import DTYPE_NAMES, Part
from megalite.checkpoint.reader import Checkpoint
from megalite.checkpoint.regions import whole
from megalite.checkpoint.state import MASTER, shape_changes
from megalite.checkpoint.tensor_file import ITEM_BYTES
from megalite.checkpoint.weights_alone import write_weights
from megalite.config import Config, resolve
from megalite.config_file import saved_config
from megalite.errors import ConfigError, DamagedError, DataError
from megalite.hf_config import NAME as HF_CONFIG
from megalite.hf_config import read_hf_config, read_json
from megalite.layers.dtypes import DTYPES
from megalite.preprocessing.flags import Flag, end, read_flags, terminate_as_interrupt
from megalite.presets import LARGE_RUN
from megalite.saving import facts_of
from megalite.tensor_names import EMBEDDING, HEAD, tensor_shapes
from megalite.tokenizer.hf_files import TokenizerFiles, settings_of

FLAGS = (
    Flag("--input", "Checkpoint, folder of checkpoints, or model.", metavar="DIR", required=True),
    Flag(
        "--output",
        "New folder: of a model (hf), or of checkpoints, with one of step 0 (megalite).",
        metavar="DIR",
        required=True,
    ),
    Flag("--to", "What to write.", choices=("hf", "megalite"), required=True),
    Flag(
        "--dtype",
        "Precision of what is written; fp32 takes master weights, where there are any. auto: that "
        "of the weights.",
        "auto",
        choices=("auto", "bf16", "fp16", "fp32"),
    ),
)
TORCH_FILES = ("pytorch_model.bin", "model.pt")
TORCH_INDEX = "pytorch_model.bin.index.json"


class Model(NamedTuple):
    """What is converted.

    Attributes:
        config: resolved.
        dtype: of its weights, as safetensors calls it.
        tokenizer: that goes along with it.
        read: a whole tensor, by its name and the precision that is wanted of it.
    """

    config: Config
    dtype: str
    tokenizer: TokenizerFiles
    read: Callable[[str, str], Tensor]


def main(argv: Sequence[str]) -> int:
    """Run the tool; returns its exit code."""
    values, problems = read_flags(
        argv, FLAGS, prog="convert_checkpoint.py", description=__doc__ or ""
    )
    output = Path(values["output"])
    if values["output"] and is_taken(output):
        problems.append(f"--output {output} exists; choose another name or remove it")
    if problems:
        raise ConfigError(problems)
    model = open_model(Path(values["input"]))
    dtype = DTYPE_NAMES[DTYPES[values["dtype"]]] if values["dtype"] != "auto" else model.dtype
    shapes = tensor_shapes(model.config.model)
    parts = (
        Part(name, shape, whole(shape), model.read(name, dtype).reshape(-1))
        for name, shape in shapes.items()
    )
    run_id = f"convert-{os.getpid()}"
    if values["to"] == "hf":
        write_hf(output, model.config.model, parts, dtype, model.tokenizer, run_id)
        print(f"{output}: a Hugging Face model, {dtype}")
        if model.tokenizer.told:
            print(model.tokenizer.told)
        return 0
    try:
        folder = write_weights(output, shapes, parts, dtype, facts_of(model.config, {}), run_id)
    except OSError as error:
        raise DataError(f"--output {output}: {error.strerror}") from None
    print(f"{folder}: a checkpoint of weights alone, {dtype}")
    print(
        f"python -m megalite.pretrain --load {output} --finetune starts from it, with the flags of "
        "its model: --model DIR reads them from a config.json"
    )
    return 0


def open_model(folder: Path) -> Model:
    """What is in a folder.

    Raises:
        ConfigError: nothing that can be converted.
        DamagedError: it is damaged or hostile.
    """
    if not (folder / HF_CONFIG).is_file():
        return _of_checkpoint(Checkpoint.newest(folder))
    config = Config().replace(**{**LARGE_RUN, **read_hf_config(folder)})
    settings = settings_of(folder)
    tokenizer = TokenizerFiles(told=f"no tokenizer files: there are none in {folder}")
    if settings is not None:
        config = config.replace(**vars(settings))
        tokenizer = tokenizer_files(config)
    config = resolve(config)
    shapes = tensor_shapes(config.model)
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
        source = HuggingFaceFolder.open(folder, shapes)
        dtype = _widest(source.tensors[name].dtype for name in shapes)
        return Model(config, dtype, tokenizer, lambda name, _: source.whole(name))
    tensors = _torch_tensors(folder, shapes)
    dtype = _widest(DTYPE_NAMES[tensors[name].dtype] for name in shapes)
    return Model(config, dtype, tokenizer, lambda name, _: tensors[name])


def _of_checkpoint(checkpoint: Checkpoint) -> Model:
    """Weights of a run, or its master weights where they are wanted more precise."""
    if damages := checkpoint.damages():
        raise DamagedError([f"{checkpoint.folder}: {damage}" for damage in damages])
    path = checkpoint.folder / "manifest.json"
    saved = checkpoint.manifest.facts.get("config")
    if not isinstance(saved, dict):
        raise DamagedError(f"{path} has no configuration of a run")
    config = saved_config(path, saved)
    if config.model.num_layers > len(checkpoint.tensors):
        raise DamagedError(f"{path} has fewer tensors than its configuration layers")
    shapes = tensor_shapes(config.model)
    if wrong := list(shape_changes(shapes, checkpoint)):
        raise DamagedError([f"{path}: {sentence}" for sentence in wrong])
    own = _widest(checkpoint.tensors[name].dtype for name in shapes)

    def read(name: str, dtype: str) -> Tensor:
        wants_more = ITEM_BYTES[dtype] > ITEM_BYTES[own]
        is_there = MASTER + name in checkpoint.tensors
        return checkpoint.whole(MASTER + name if wants_more and is_there else name)

    return Model(config, "F32" if own == "F64" else own, tokenizer_files(config), read)


def _torch_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of files that torch.save wrote, whose values are read when they are used.

    torch unpickles tensors alone (`weights_only`): anything else in a file is refused, not run.

    Raises:
        ConfigError: there are no such files.
        DamagedError: a file or a tensor is not as it should be.
    """
    found: dict[str, Tensor] = {}
    for path in _torch_files(folder):
        for name, value in _torch_load(path).items():
            if str(name).endswith(DERIVED):
                continue
            if name in found:
                raise DamagedError(f"{path}: {name} is in another file too")
            found[name] = value
    tied = found.pop(HEAD, None) if HEAD not in shapes else None
    for name in sorted(found.keys() ^ shapes.keys()):
        what = "has a tensor that config.json knows nothing of" if name in found else "lacks"
        raise DamagedError(f"{folder} {what}: {name}")
    for name, value in found.items():
        if tuple(value.shape) != shapes[name] or (DTYPE_NAMES.get(value.dtype) not in PRECISIONS):
            raise DamagedError(
                f"{folder}: {name} is {value.dtype} of shape {list(value.shape)}; config.json says "
                f"{list(shapes[name])}"
            )
        if value.nbytes > value.untyped_storage().nbytes():
            raise DamagedError(f"{folder}: {name} has fewer values than its shape")
    if tied is not None and not torch.equal(tied, found[EMBEDDING]):
        raise DamagedError(f"{folder}: {HEAD} is not {EMBEDDING}, though they are tied")
    return found


def _torch_files(folder: Path) -> list[Path]:
    index = folder / TORCH_INDEX
    if not index.exists():
        for name in TORCH_FILES:
            if (folder / name).is_file():
                return [folder / name]
        raise ConfigError(
            f"{folder} has none of {', '.join((WEIGHTS, INDEX, TORCH_INDEX, *TORCH_FILES))}"
        )
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise DamagedError(f"{index} has no weight_map")
    for file in names.values():
        if not is_plain(file):
            raise DamagedError(f"{index}: {file!r} is no plain file name")
    return [folder / file for file in dict.fromkeys(names.values())]


def _torch_load(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged file makes of torch's reader
        raise DamagedError(
            f"{path} holds more than tensors, is damaged, or older than torch 1.6: it is not read "
            f"({type(error).__name__})"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise DamagedError(f"{path} holds something else than tensors by name")
    return content


def _widest(dtypes: Iterable[str]) -> str:
    """Of the precisions of a model's tensors the one that holds them all."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else max(found | {"F32"}, key=ITEM_BYTES.__getitem__)


if __name__ == "__main__":
    terminate_as_interrupt()
    end(main)
