"""The fields that say what is saved, and what a run starts from. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.option import option


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: where they are written, what a run goes on from; other weights in and out."""

    save: str = option(
        "",
        "Folder of checkpoints. A run goes on from the newest one that is there.",
        metavar="DIR",
    )
    save_interval: int = option(0, "Steps between checkpoints. 0: one at the end.", metavar="STEPS")
    keep_last: int = option(
        0,
        "Keep so many of the newest checkpoints; older ones are removed once a newer one has been "
        "read back. 0: all.",
        metavar="N",
    )
    keep_every: int = option(
        0,
        "--keep-last: keep those of steps that are multiples of this too. 0: no others.",
        metavar="STEPS",
    )
    async_save: bool = option(True, "Write checkpoints while training goes on.")
    resume: bool = option(
        True, "Go on from the newest checkpoint of --save. With --no-resume it must be empty."
    )
    load: str = option(
        "",
        "Start from the newest checkpoint of this folder, or from this one, unless --save holds "
        "any.",
        metavar="DIR",
    )
    finetune: bool = option(
        False, "--load: weights alone; steps and data begin anew, and so does the optimizer."
    )
    load_optim: bool = option(
        True, "--load: the optimizer's states too. With --no-load-optim they begin anew."
    )
    verify_load: str = option(
        "full",
        "What is checked of a checkpoint before a run starts from it: every byte, or the sizes of "
        "its files.",
        choices=("full", "size"),
    )
    fallback: bool = option(
        True,
        "If the newest checkpoint is damaged, go on from the one before. With --no-fallback the "
        "run ends with exit code 3.",
    )
    allow_change: tuple[str, ...] = option(
        (),
        "What may differ from the checkpoint's run: names of fields, data, or tokenizer.",
        metavar="NAME,...",
    )
    init_from: str = option(
        "",
        "Folder of a Hugging Face LLaMA (config.json, *.safetensors), whose weights and model a "
        "new run begins with.",
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
