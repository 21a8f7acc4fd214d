"""`data.json` in a run's folder: which data the run was trained on. No torch import.

`config.json` names files, and files change. What goes on from a run, or looks back at it, compares
what the names hold now with this record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from megalite.data.mixture import Mixture, Part
from megalite.errors import DataError
from megalite.wording import counted

NAME = "data.json"
_RESTORE = "restore it, or remove it to go without this check"
_CORPUS = MappingProxyType({"name": str, "fingerprint": str, "documents": int, "tokens": int})


@dataclass(frozen=True)
class CorpusRecord:
    """One corpus.

    Attributes:
        name: for people: its file, or what it is.
        fingerprint: of its whole index and its first 16 Mi tokens (`Corpus.fingerprint`). A later
            change inside of the `.bin` is found by `tools/inspect_dataset.py --verify` alone.
        documents, tokens: their numbers.
    """

    name: str
    fingerprint: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class DataRecord:
    """What a run was trained on.

    Attributes:
        tokenizer: its fingerprint.
        train, valid, test: in the order of the command line; weights are in `config.json`.
    """

    tokenizer: str
    train: tuple[CorpusRecord, ...]
    valid: tuple[CorpusRecord, ...]
    test: tuple[CorpusRecord, ...]

    def write(self, folder: Path) -> None:
        """Write it to a run's folder."""
        (folder / NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def changes(self, now: DataRecord) -> list[str]:
        """A sentence for everything that is not what it was; none if the run can be repeated."""
        found = list(_changes("--data", self.train, now.train))
        found += _changes("--valid-data-path", self.valid, now.valid)
        found += _changes("--test-data-path", self.test, now.test)
        if self.tokenizer != now.tokenizer:
            found.append(
                f"the run was trained with the tokenizer {self.tokenizer}, its files now give "
                f"{now.tokenizer}: restore them"
            )
        return found


def record_of(mixture: Mixture, tokenizer: str) -> DataRecord:
    """The record of what a run reads.

    Args:
        mixture: all of it.
        tokenizer: its fingerprint.
    """
    read = (mixture.train, mixture.valid, mixture.test)
    return DataRecord(tokenizer, *map(_records, read))


def read_record(folder: Path) -> DataRecord | None:
    """The record of a run; None if it has none, as runs of before it was kept.

    Raises:
        DataError: it is damaged.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}: {_RESTORE}") from None
    splits = ("train", "valid", "test")
    if not isinstance(content, dict) or not isinstance(content.get("tokenizer"), str):
        raise DataError(f"{path} is damaged: it names no tokenizer: {_RESTORE}")
    for split in splits:
        corpora = content.get(split)
        if not isinstance(corpora, list) or not all(map(_is_corpus, corpora)):
            raise DataError(
                f"{path} is damaged: {split!r} is no list of corpora, each with "
                f"{', '.join(_CORPUS)}: {_RESTORE}"
            )
    read = (tuple(CorpusRecord(**each) for each in content[split]) for split in splits)
    return DataRecord(content["tokenizer"], *read)


def _is_corpus(content: object) -> bool:
    return (
        isinstance(content, dict)
        and content.keys() == _CORPUS.keys()
        and all(type(content[name]) is kind for name, kind in _CORPUS.items())
    )


def _records(parts: Sequence[Part]) -> tuple[CorpusRecord, ...]:
    return tuple(
        CorpusRecord(
            part.corpus.description,
            part.corpus.fingerprint,
            part.corpus.documents,
            part.corpus.tokens,
        )
        for part in parts
    )


def _changes(flag: str, then: Sequence[CorpusRecord], now: Sequence[CorpusRecord]) -> Iterator[str]:
    if len(then) != len(now):
        yield f"{flag}: the run was trained on {counted(len(then), 'dataset')}, not {len(now)}"
        return
    for old, new in zip(then, now, strict=True):
        if old.fingerprint != new.fingerprint:
            yield (
                f"{new.name} is not what the run was trained on: fingerprint {old.fingerprint} "
                f"({_size(old)}) expected, found "
                f"{new.fingerprint} ({_size(new)}): "
                "restore it"
            )


def _size(record: CorpusRecord) -> str:
    return f"{counted(record.documents, 'document')}, {counted(record.tokens, 'token')}"
