"""Lines of the table: what they hold, how they are printed and appended to the CSV."""

from __future__ import annotations

import csv
import dataclasses
from dataclasses import dataclass
from pathlib import Path

REFERENCE_GBPS = 3016.0
"""The copy ceiling of the H100 of `measured.md`, to compare with its figures."""
MEASURED, WRONG, ABSENT = "ok", "WRONG", "-"
HOST = "host"
"""In the place of a direction: the row is of host time."""


@dataclass(frozen=True)
class Line:
    """One contestant on one case. Times in ms unless the name says otherwise; None: not measured.

    Args:
        op, size, direction, contestant: what was measured.
        status: "ok"; "WRONG", for results over the tolerance, which are not timed; "-", with the
            reason in `note`.
        error: largest ||result - reference|| / ||reference||.
        floor_bytes: the fewest bytes read and written.
        copy_ms: of a copy that reads and writes as many bytes together.
        memory_bytes: peak over the inputs.
        tflops: useful ones.
        host_us: of an eager forward + backward; `over_torch_us` is what it takes over torch's own.
        compile_s: of the first call of a compiled contestant.
        ours: ms (or us of the host) over ours, same row.
    """

    op: str
    size: str
    direction: str
    contestant: str
    status: str = MEASURED
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    floor_bytes: int | None = None
    copy_ms: float | None = None
    memory_bytes: int | None = None
    tflops: float | None = None
    host_us: float | None = None
    over_torch_us: float | None = None
    ours: float | None = None
    error: float | None = None
    compile_s: float | None = None
    note: str = ""

    @property
    def gbps(self) -> float | None:
        """Floor bytes over time."""
        if self.ms is None or self.floor_bytes is None:
            return None
        return self.floor_bytes / self.ms * 1e-6

    @property
    def percent_of_copy(self) -> float | None:
        """Floor bytes over time, over the GB/s of the copy that moves as many bytes."""
        if self.ms is None or self.copy_ms is None or self.floor_bytes is None:
            return None
        return 100 * self.copy_ms / self.ms

    @property
    def percent_of_reference(self) -> float | None:
        """Of REFERENCE_GBPS."""
        gbps = self.gbps
        return None if gbps is None else 100 * gbps / REFERENCE_GBPS


COMPUTED = ("gbps", "percent_of_copy", "percent_of_reference")
FIELDS = tuple(field.name for field in dataclasses.fields(Line))


def good(line: Line) -> bool:
    """Whether the line has a time."""
    return line.status == MEASURED and (line.ms is not None or line.host_us is not None)


def record(line: Line, where: dict[str, str]) -> dict[str, str]:
    """A row of the CSV.

    Args:
        line: the figures.
        where: date, commit, card, versions.
    """
    values = {name: getattr(line, name) for name in (*FIELDS, *COMPUTED)}
    return where | {name: "" if value is None else _plain(value) for name, value in values.items()}


def append(path: Path, rows: list[dict[str, str]]) -> None:
    """Add rows to a CSV, with a header if it is new.

    Raises:
        ValueError: the file has other columns.
    """
    if not rows:
        return
    columns = list(rows[0])
    new = not path.exists() or not path.stat().st_size
    if not new:
        check_columns(path, columns)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def check_columns(path: Path, columns: list[str]) -> None:
    """Raise ValueError unless the CSV's first line holds these columns."""
    with path.open(newline="", encoding="utf-8") as file:
        found = next(csv.reader(file), [])
    if found != columns:
        raise ValueError(f"{path} has other columns than this program writes; name another --csv")


def read(path: Path) -> list[dict[str, str]]:
    """All rows of a CSV."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


HEAD = (
    f"{'contestant':<12s} {'ms':>9s} {'p20-p80':>17s} {'GB/s':>6s} {'% copy':>7s} {'% 3016':>7s}"
    f" {'TFLOP/s':>7s} {'peak MB':>9s} {'/ ours':>7s} {'error':>8s}  note"
)
HOST_HEAD = f"{'contestant':<12s} {'host us':>9s} {'over torch':>10s} {'/ ours':>7s}  note"


def show(line: Line) -> str:
    """A line of the printed table."""
    if line.status != MEASURED:
        error = "" if line.error is None else f"error {line.error:.1e} "
        return f"{line.contestant:<12s} {line.status:>9s}  {error}{line.note}".rstrip()
    if line.host_us is not None:
        cells = (
            _cell(line.host_us, 9, 1),
            _cell(line.over_torch_us, 10, 1),
            _cell(line.ours, 7, 2),
        )
        return f"{line.contestant:<12s} {' '.join(cells)}  {line.note}".rstrip()
    middle = "" if line.p20 is None or line.p80 is None else f"{line.p20:.4f}-{line.p80:.4f}"
    megabytes = None if line.memory_bytes is None else line.memory_bytes / 1e6
    compiled = "" if line.compile_s is None else f"compiled in {line.compile_s:.0f} s"
    error = f"{'' if line.error is None else f'{line.error:.1e}':>8s}"
    cells = (
        _cell(line.ms, 9, 4),
        f"{middle:>17s}",
        _cell(line.gbps, 6, 0),
        _cell(line.percent_of_copy, 7, 1),
        _cell(line.percent_of_reference, 7, 1),
        _cell(line.tflops, 7, 0),
        _cell(megabytes, 9, 1),
        _cell(line.ours, 7, 3),
        error,
    )
    notes = ", ".join(text for text in (line.note, compiled) if text)
    return f"{line.contestant:<12s} {' '.join(cells)}  {notes}".rstrip()


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'' if value is None else f'{value:.{digits}f}':>{width}s}"


def _plain(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
