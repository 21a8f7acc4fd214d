"""Rows of a benchmark that is measured piece by piece: one CSV, which says what is done already.

No torch import.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from kernel_bench.table import append, check_columns, read

MEASURED, FAILED = "ok", "failed"
"""Of a row's field `status`."""


class CaseRow(Protocol):
    """A row of one case of one op."""

    @property
    def op(self) -> str: ...  # noqa: D102

    @property
    def case(self) -> str: ...  # noqa: D102

    @property
    def status(self) -> str: ...  # noqa: D102


R = TypeVar("R")
C = TypeVar("C", bound=CaseRow)


class RowTable(Generic[R]):
    """The rows of one CSV.

    Args:
        path: of the CSV.
        where: first columns: date, commit, device, versions, flags.
        kind: dataclass of a row; its fields are texts, or numbers that may be None.
        show: a row as it is printed.

    Raises:
        ValueError, OSError: the file is not one of this program's, or cannot be written.
    """

    def __init__(
        self, path: Path, where: Mapping[str, str], kind: type[R], show: Callable[[R], str]
    ):
        self._path, self._where, self._kind, self._show = path, dict(where), kind, show
        if path.exists() and path.stat().st_size:
            check_columns(path, [*where, *field_names(kind)])
        with path.open("a", encoding="utf-8"):
            pass

    def add(self, row: R) -> None:
        """Append a row and print it."""
        values = {name: _plain(getattr(row, name)) for name in field_names(self._kind)}
        append(self._path, [self._where | values])
        print(self._show(row), flush=True)

    def rows(self) -> list[R]:
        """Those measured here and thus: all first columns but the date are equal."""
        same = [name for name in self._where if name != "date"]
        found = read(self._path)
        return [
            row_of(self._kind, each)
            for each in found
            if all(each[name] == self._where[name] for name in same)
        ]


def measured(rows: Iterable[C], op: str) -> dict[str, C]:
    """The last good row of each case of an op."""
    return {row.case: row for row in rows if row.op == op and row.status == MEASURED}


def field_names(kind: type) -> list[str]:
    """Of a dataclass."""
    return [field.name for field in dataclasses.fields(kind)]


def row_of(kind: type[R], values: Mapping[str, str]) -> R:
    """The row of a CSV's line."""
    return kind(**{f.name: _read(f.type, values[f.name]) for f in dataclasses.fields(kind)})  # type: ignore[arg-type]


def _read(annotation: Any, value: str) -> str | int | float | None:
    """A cell as its field has it; annotations are texts: `float | None`."""
    if annotation == "str":
        return value
    if not value:
        return None
    return int(value) if annotation.startswith("int") else float(value)


def _plain(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def cell(value: float | None, width: int, digits: int) -> str:
    """A number of a printed row; blank if it is None."""
    return f"{'' if value is None else f'{value:.{digits}f}':>{width}s}"


def share(value: float | None) -> str:
    """A share of a printed row, in percent."""
    return f"{'' if value is None else f'{value:.1%}':>6s}"
