"""Jobs of ranks that begin with a Hugging Face model, and write one; see `test_hf.py`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from worlds import make_trainer

from megalite.checkpoint.hf_export import write_hf
from megalite.checkpoint.hugging_face import export_hf, exported_parts, init_from
from megalite.checkpoint.parts import DTYPE_NAMES
from megalite.hf_config import read_hf_config
from megalite.layers.dtypes import DTYPES
from megalite.sampling import next_token_logits
from megalite.tokenizer.hf_files import TokenizerFiles
from megalite.trainer import Trainer

PROMPT = [3, 100, 41, 7, 7, 59, 2, 88, 17, 63, 30, 1]


def trainer_from(folder: Path, **values: object) -> Trainer:
    """A trainer with the weights of a folder."""
    shape = {**read_hf_config(folder), "seq_length": 16, "make_vocab_size_divisible_by": 8}
    trainer = make_trainer(**shape, init_from=str(folder), **values)
    init_from(trainer.config, trainer.flat, trainer.optimizer, trainer.groups)
    return trainer


def into_and_out(
    source: Path, target: Path, dtypes: tuple[str, ...], values: dict[str, object]
) -> Tensor | None:
    """Load a folder, write it again in each precision, in small files; returns the logits of the
    token after the prompt, on the last stage's ranks."""
    trainer = trainer_from(source, **values)
    for dtype in dtypes:
        write_hf(
            target / dtype,
            trainer.config.model,
            exported_parts(trainer.flat, trainer.optimizer, trainer.groups, DTYPES[dtype]),
            DTYPE_NAMES[DTYPES[dtype]],
            TokenizerFiles(),
            "test",
            is_first=trainer.groups.world_rank == 0,
            wait_for_all=lambda: trainer.groups.wait_for_all(trainer.device),
            most_bytes=30_000,
        )
    return next_token_logits(trainer, PROMPT)


def export_trained(source: Path, target: Path, values: dict[str, object]) -> str:
    """Load a folder, take a step, write the run's weights as `--export-hf` does."""
    trainer = trainer_from(source, export_hf=str(target), **values)
    trainer.train_step(0)
    return export_hf(trainer.config, trainer.flat, trainer.optimizer, trainer.groups)
