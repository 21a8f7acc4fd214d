"""Text and plain values as values of fields, and the record of what is wrong. No torch import."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from types import NoneType
from typing import Any, get_args

from megalite.config import FieldSpec


class Problems:
    """What is wrong so far, and which fields are not to be judged for it."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.unread: set[str] = set()

    def add(self, sentence: str, *unread: str) -> None:
        """One more; `unread` are the fields that it leaves open."""
        self.sentences.append(sentence)
        self.unread.update(unread)


def convert(spec: FieldSpec, value: Any) -> Any:
    """Text of a flag, or a value of a file, as the field's type.

    Raises:
        ValueError: the value does not fit; the message says what was expected.
    """
    if is_bool(spec):
        text = str(value).lower()
        if text not in ("true", "false"):
            raise ValueError("expected true or false")
        return text == "true"
    if spec.type is int:
        return _whole_number(value)
    if spec.type is float:
        if isinstance(value, bool):
            raise ValueError("expected a number")
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("expected a number") from None
    if spec.type is str:
        if not isinstance(value, str):
            raise ValueError("expected text")
        if spec.choices and value not in spec.choices:
            meant = closest(value, spec.choices)
            hint = f"; did you mean {meant}?" if meant else ""
            raise ValueError(f"expected one of {', '.join(spec.choices)}{hint}")
        return value
    if is_words(spec):
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError('expected text, or a list of texts as in ["0.7", "a", "0.3", "b"]')
        return tuple(words)
    if spec.type == tuple[float, ...]:
        return _list_of(_number, value, "numbers separated by commas, as in 8.5,7.5")
    return _list_of(_whole_number, value, "whole numbers separated by commas, as in 9,7")


def _list_of(one: Callable[[Any], Any], value: Any, what: str) -> tuple[Any, ...]:
    """Values from text with commas, or from a list."""
    if not isinstance(value, str | list):
        raise ValueError(f"expected {what}")
    parts = [
        part
        for word in ([value] if isinstance(value, str) else value)
        for part in (word.split(",") if isinstance(word, str) else [word])
    ]
    return tuple(one(part) for part in parts)


def _number(value: Any) -> float:
    """A finite number; an int if it is whole, so that it is written as one."""
    try:
        return _whole_number(value)
    except ValueError:
        pass
    try:
        number = float(value)
        if math.isfinite(number) and not isinstance(value, bool):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError("expected a number")


def _whole_number(value: Any) -> int:
    """An int from 32, "32", "2e9" or "1_000_000"."""
    if isinstance(value, bool):
        raise ValueError("expected a whole number")
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    try:
        number = float(value) if not isinstance(value, int) else value
        if number == int(number):
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError("expected a whole number")


def is_bool(spec: FieldSpec) -> bool:
    """Whether the field is a switch, `--x` and `--no-x`."""
    return spec.type is bool or get_args(spec.type) == (bool, NoneType)


def is_words(spec: FieldSpec) -> bool:
    """Whether the field holds any number of texts."""
    return spec.type == tuple[str, ...]


def takes_many(spec: FieldSpec) -> bool:
    """Whether the field's flag takes any number of words."""
    return spec.type in (tuple[str, ...], tuple[int, ...], tuple[float, ...])


def closest(word: str, known: Iterable[str]) -> str | None:
    """What was probably meant."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return close[0] if close else None


def suggest(word: str, known: Iterable[str], *, every: bool = False) -> str:
    """The end of a sentence about an unknown word: what was meant, or where to look."""
    known = list(known)
    meant = closest(word, known)
    if meant:
        return f"; did you mean {meant}?"
    return f"; there are {', '.join(known)}" if every else "; see --help"
