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
    test_data_path: tuple[str, ...] = option(
        (), "Data of the test after training, beside --train-data-path.", metavar="[W] PATH"
    )
    mock_data: bool = option(False, "Random tokens in place of a corpus, for benchmarks.")
    split: str = option(
        "95,5",
        "Shares of training, validation and, if there is a third, of a test after training.",
        metavar="A,B[,C]",
    )
    packing: str = option(
        "stream",
        "How documents fill samples: one after the other, cut where a sample ends; or cut only if "
        "they are longer than a sample, and packed into it by best fit.",
        choices=("stream", "best-fit"),
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
        "--reset-attention-mask and with --packing best-fit.",
    )
    fim_rate: float = option(
        0.0,
        "Share of the training documents whose middle is moved to the end (fill-in-the-middle).",
        metavar="X",
    )
    fim_spm_rate: float = option(
        0.5, "Share of those in the order suffix, prefix, middle.", metavar="X"
    )
    fim_prefix_token: str = option(
        "<fim_prefix>", "Special token before the prefix.", metavar="TOKEN"
    )
    fim_middle_token: str = option(
        "<fim_middle>", "Special token before the middle.", metavar="TOKEN"
    )
    fim_suffix_token: str = option(
        "<fim_suffix>", "Special token before the suffix.", metavar="TOKEN"
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
