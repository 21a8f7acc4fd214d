"""What a run reads, and how it is cut into samples. One group of `megalite.config`; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.option import option
from megalite.tokenizer.settings import TokenizerSettings


@dataclass(frozen=True)
class DataConfig(TokenizerSettings):
    """What the model reads."""

    data: tuple[str, ...] = option(
        (),
        "A .txt, .jsonl (also .gz, .zst) or .parquet file, or a .bin/.idx prefix; or many of them, "
        "each with a weight before it or none. Default: this Python's standard library.",
        metavar="[W] PATH",
    )
    train_data_path: tuple[str, ...] = option(
        (), "Training data in place of a share of --data; one or many.", metavar="[W] PATH"
    )
    valid_data_path: tuple[str, ...] = option(
        (), "Validation data beside --train-data-path; one or many.", metavar="[W] PATH"
    )
    mock_data: bool = option(False, "Random tokens in place of a corpus, for benchmarks.")
    split: str = option(
        "95,5", "Shares of training and validation; a third one is left out.", metavar="A,B[,C]"
    )
    reset_attention_mask: bool = option(
        False, "Attention stays inside a document (its end-of-document token is its last)."
    )
    reset_position_ids: bool | None = option(
        None, "Positions count from the document's start. Default: on with --reset-attention-mask."
    )
    eod_mask_loss: bool | None = option(
        None,
        "Leave the token after an end of document out of the loss. Default: on with "
        "--reset-attention-mask.",
    )
    data_order: str = option(
        "epoch",
        "Order of samples: each epoch shuffled by (seed, epoch), whatever the length of the run; "
        "or Megatron-LM's, which depends on it.",
        choices=("epoch", "megatron"),
    )
    order_samples: int = option(
        0,
        "Megatron-LM's order: samples of the run that it is made for. 0: steps x global batch.",
        metavar="SAMPLES",
    )
    data_cache_path: str = option(
        "", "Tokenized corpora and indices. Default: the user's cache folder.", metavar="DIR"
    )
