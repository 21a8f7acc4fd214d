"""Hugging Face's tokenizer.json, through the `tokenizers` package (the extra `hf`)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from megalite.errors import ConfigError, DataError
from megalite.tokenizer.files import read_bytes
from megalite.tokenizer.text import id_array, well_formed

if TYPE_CHECKING:
    import numpy as np

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Tokens that end a document, where no file beside tokenizer.json names one."""


class HuggingFaceTokenizer:
    """A tokenizer.json. See `Tokenizer` for the attributes.

    What the file's post-processor puts around a text is put there (LLaMA 3's beginning of text), as
    by Megatron-LM's own HuggingFaceTokenizer; that of `megatron.core.tokenizers` leaves it out. A
    document
    ends with the `eos_token` of tokenizer_config.json or special_tokens_map.json beside the file,
    or else with the one of <|endoftext|>, <|end_of_text|>, </s> and <eos> that it has. Truncation
    and padding in the file are left out: they are not of the text.

    Args:
        path: the file, or its folder.

    Raises:
        ConfigError: the `tokenizers` package is not installed.
        DataError: unreadable or malformed files, or no token that ends a document.
    """

    def __init__(self, path: str):
        if find_spec("tokenizers") is None:
            raise ConfigError(
                f"{path} needs the package tokenizers: pip install 'megalite[hf]' (or tokenizers)"
            )
        import tokenizers

        file = Path(path)
        if os.path.isdir(path):
            file = file / "tokenizer.json"
        self._content = read_bytes(str(file))
        try:
            self._model = tokenizers.Tokenizer.from_buffer(self._content)
        except Exception as error:  # the package raises nothing narrower
            raise DataError(f"{file} is no tokenizer.json: {error}") from None
        self._model.no_truncation()
        self._model.no_padding()
        added = self._model.get_added_tokens_decoder()
        self.special: Mapping[str, int] = MappingProxyType(
            {token.content: number for number, token in added.items() if token.special}
        )
        self.symbols: Mapping[str, int] = MappingProxyType(
            {token.content: number for number, token in added.items()}
        )
        numbers = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(numbers.values(), default=0)
        self.eod = _end_of_document(file, numbers)

    @cached_property
    def fingerprint(self) -> str:
        """Names the mapping: the file's content, whatever its layout, and the last token."""
        content = json.dumps(json.loads(self._content), sort_keys=True)
        digest = hashlib.sha256(f"tokenizer.json 1 {self.eod} {content}".encode())
        return f"hf-{digest.hexdigest()[:16]}"

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a text; see `Tokenizer`."""
        self._model.encode_special_tokens = not allow_special
        return self._model.encode(well_formed(text)).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [tokens]; on this thread alone."""
        return [id_array(self.encode(text)) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens as the library writes it, special tokens too."""
        known = [int(t) for t in tokens if 0 <= t < self.vocab_size]
        return self._model.decode(known, skip_special_tokens=False)


def _end_of_document(file: Path, numbers: Mapping[str, int]) -> int:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        beside = file.with_name(name)
        if beside.is_file():
            token = _eos_token(beside)
            if token is not None:
                if token not in numbers:
                    raise DataError(f"{beside}: eos_token {token!r} is no token of {file}")
                return numbers[token]
    found = [token for token in _ENDS if token in numbers]
    if len(found) != 1:
        what = f"{' and '.join(found)} could each be" if found else "it has none of the usual"
        raise DataError(
            f"{file} does not say which token ends a document ({what}): name it as eos_token in "
            "a tokenizer_config.json beside it"
        )
    return numbers[found[0]]


def _eos_token(path: Path) -> str | None:
    try:
        settings: Any = json.loads(read_bytes(str(path)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not JSON: {error}") from None
    token = settings.get("eos_token") if isinstance(settings, dict) else None
    # An added token is written out with its properties.
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
