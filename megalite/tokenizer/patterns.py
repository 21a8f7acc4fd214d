r"""How the byte-level BPE vocabularies of the field split text, and which special tokens they add.

A pattern is a fact about a vocabulary: it was learned from text split so. In all of them no piece
holds a character that is not white space before a space: `bpe.split_points` relies on it.

Sources: OpenAI's tiktoken (gpt2, cl100k_base, o200k_base), Meta's llama-models (llama3),
NVIDIA's Megatron-LM (v1, v2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_MEGATRON_SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_LLAMA3_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"),
    *("<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
    *("<|python_tag|>", "<|image|>"),
)


@dataclass(frozen=True)
class Style:
    """A pattern and its special tokens.

    Attributes:
        pattern: for the `regex` package and, in the same words, for tiktoken.
        special: ids of the special tokens by text, given (number of ranks, number of special
            tokens); the latter counts where `special_first`.
        eod: text of the token that ends a document.
        special_first: the special tokens stand before the ranks, which move up by their number.
    """

    pattern: str
    special: Callable[[int, int], dict[str, int]]
    eod: str
    special_first: bool = False


def _after(**offsets: int) -> Callable[[int, int], dict[str, int]]:
    """Special tokens `<|name|>` so far behind the last rank."""
    return lambda ranks, _: {f"<|{name}|>": ranks + offset for name, offset in offsets.items()}


def _llama3(ranks: int, _: int) -> dict[str, int]:
    """256 tokens behind the ranks, by LLaMA 3.1's names."""
    reserved = range(2, 2 + 256 - len(_LLAMA3_SPECIAL))
    names = (*_LLAMA3_SPECIAL, *(f"<|reserved_special_token_{i}|>" for i in reserved))
    return {name: ranks + i for i, name in enumerate(names)}


def _megatron(_: int, count: int) -> dict[str, int]:
    """The first `count` tokens."""
    fillers = (f"<SPECIAL_{i}>" for i in range(len(_MEGATRON_SPECIAL), count))
    return {name: i for i, name in enumerate((*_MEGATRON_SPECIAL, *fillers))}


GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"

STYLES: Mapping[str, Style] = MappingProxyType(
    {
        "gpt2": Style(GPT2_PATTERN, _after(endoftext=0), "<|endoftext|>"),
        "cl100k_base": Style(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
            r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++\z|\s*[\r\n]|\s+(?!\S)|\s",
            # Id `ranks` itself is used by none.
            _after(endoftext=1, fim_prefix=2, fim_middle=3, fim_suffix=4, endofprompt=20),
            "<|endoftext|>",
        ),
        "o200k_base": Style(
            rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}?"
            rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTIONS}?"
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            _after(endoftext=1, endofprompt=20),
            "<|endoftext|>",
        ),
        "llama3": Style(
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            _llama3,
            "<|end_of_text|>",
        ),
        "v1": Style(
            r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
            _megatron,
            "</s>",
            special_first=True,
        ),
        "v2": Style(
            rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+"
            rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            _megatron,
            "</s>",
            special_first=True,
        ),
    }
)
"""By the names of `--tiktoken-pattern`; v1 and v2 are Megatron-LM's."""

_ASCII = (
    (_UPPER, "A-Z"),
    (_LOWER, "a-z"),
    (r"\p{L}\p{N}", "A-Za-z0-9"),  # inside of brackets
    (r"\p{L}", "[A-Za-z]"),
    (r"\p{N}", "[0-9]"),
    (r"[^\s", r"[^\t-\r "),
    (r"\S", r"[^\t-\r ]"),
    (r"\s", r"[\t-\r ]"),
    (r"\z", r"\Z"),
)
"""What the patterns are made of, and what that is in ASCII; white space is Unicode's."""


def for_ascii(pattern: str) -> str:
    """A pattern of these in the words of Python's `re`, for text that is ASCII alone.

    It finds the same pieces in half the time of the `regex` package, which looks each character up.
    """
    for unicode, ascii_ in _ASCII:
        pattern = pattern.replace(unicode, ascii_)
    assert r"\p" not in pattern, pattern
    return pattern


LEAST_SPECIAL_TOKENS = len(_MEGATRON_SPECIAL)
"""Of v1 and v2."""
