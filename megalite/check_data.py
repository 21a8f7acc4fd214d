"""Rules about how documents become samples. One part of `megalite.check`; no torch import."""

from __future__ import annotations

from collections.abc import Iterator

from megalite.config import Config
from megalite.data.sentinels import find_sentinels
from megalite.data.source import token_texts_known
from megalite.errors import ConfigError
from megalite.tokenizer.choose import open_tokenizer


def packing(config: Config) -> Iterator[str]:
    """Best fit needs to know where documents end, and gives the order of samples itself."""
    data = config.data
    if data.packing == "stream" or data.mock_data:
        return
    if data.data_order == "megatron":
        yield (
            f"--packing {data.packing} contradicts --data-order megatron, whose samples are cut "
            "out of a stream: give --data-order epoch, or --packing stream"
        )
    if not token_texts_known(data):
        yield (
            f"--packing {data.packing} needs the ends of documents: which token ends a document of "
            "a .bin is not known; give its --tokenizer-type"
        )


def fill_in_the_middle(config: Config) -> Iterator[str]:
    """It needs text, and a tokenizer that has its tokens."""
    data = config.data
    if not data.fim_rate:
        return
    if not token_texts_known(data):
        why = (
            "the random tokens of --mock-data have none"
            if data.mock_data
            else "that of a .bin is not known; give its --tokenizer-type"
        )
        yield f"--fim-rate {data.fim_rate:g} needs text: {why}"
        return
    size = 0 if "vocab_size" in config.derived else config.model.vocab_size
    try:
        tokenizer = open_tokenizer(data, size)
    except ConfigError:
        return  # told by the rule about tokenizers
    try:
        find_sentinels(data, tokenizer)
    except ConfigError as error:
        yield from error.violations
