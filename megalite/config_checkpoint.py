"""Where weights come from and go to. One group of `megalite.config`; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.option import option


@dataclass(frozen=True)
class CheckpointConfig:
    """Weights that a run begins with, and those that it leaves behind."""

    init_from: str = option(
        "",
        "Folder of a Hugging Face LLaMA (config.json, *.safetensors) to begin with the weights of. "
        "It sets the model's fields too.",
        metavar="DIR",
    )
    export_hf: str = option(
        "", "Folder to write the final weights to as a Hugging Face model.", metavar="DIR"
    )
    export_dtype: str = option(
        "auto",
        "Precision of --export-hf; fp32 takes the master weights. auto: that of the run's weights "
        "(fp32 in fp64).",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
