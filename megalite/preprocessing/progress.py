"""The line that says how far a run is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from megalite.preprocessing.run import Progress, Report
from megalite.reading.records import left_out
from megalite.wording import counted

_TERMINAL_SECONDS = 0.2
_LOG_SECONDS = 5.0


class ProgressLine:
    """Shows progress: on a terminal one line that changes, elsewhere a line every few seconds.

    Args:
        stream: where to.
        log_interval: a line of its own every so many documents; 0: by time.
        clock: seconds.
    """

    def __init__(
        self, stream: TextIO, log_interval: int = 0, clock: Callable[[], float] = time.monotonic
    ):
        self._stream, self._clock, self._log_interval = stream, clock, log_interval
        self._on_terminal = stream.isatty() and not log_interval
        self._first: tuple[float, Progress] | None = None
        self._started = clock()
        self._shown = self._started
        self._shown_documents = 0

    def show(self, progress: Progress) -> None:
        """Take note of the progress, and show it when it is time."""
        now = self._clock()
        if self._first is None:
            # A resumed run's rates are those of its own work.
            self._first = now, progress
        if self._log_interval:
            due = progress.documents // self._log_interval > self._shown_documents
        else:
            pause = _TERMINAL_SECONDS if self._on_terminal else _LOG_SECONDS
            due = now - self._shown >= pause
        if due:
            self._shown = now
            self._shown_documents = progress.documents // (self._log_interval or 1)
            self._write(progress_line(progress, *self._first, now))

    def close(self) -> None:
        """Clear the line."""
        if self._on_terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _write(self, line: str) -> None:
        self._stream.write(f"\r{line}\x1b[K" if self._on_terminal else line + "\n")
        self._stream.flush()


def progress_line(progress: Progress, since: float, first: Progress, now: float) -> str:
    """What has been done, how fast since the first progress, and how long it will take.

    MB/s are of the text that is tokenized, whatever it is packed in.
    """
    seconds = max(now - since, 1e-9)
    text = progress.text_bytes - first.text_bytes
    documents = progress.documents - first.documents
    read = progress.read_bytes - first.read_bytes
    parts = [
        counted(progress.documents, "document"),
        counted(progress.tokens, "token"),
        f"{text / seconds / 1e6:.1f} MB/s",
        f"{documents / seconds:,.0f} documents/s",
    ]
    if progress.total_bytes:
        parts.insert(0, f"{progress.read_bytes / progress.total_bytes:6.1%}")
        if read:
            left = (progress.total_bytes - progress.read_bytes) / read * seconds
            parts.append(f"ETA {duration(left)}")
    if progress.left_out:
        parts.append(f"{progress.left_out:,} left out")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def summary(report: Report) -> str:
    """What a run has made, and what it left out, for people."""
    lines = []
    for prefix, sidecar in report.datasets.items():
        lines.append(
            f"{prefix}.bin, .idx, .json: {counted(sidecar.documents, 'document')}, "
            f"{counted(sidecar.tokens, 'token')} of {counted(sidecar.text_bytes, 'byte')} of text"
        )
        empty = sidecar.documents - sidecar.sequences
        if empty:
            lines.append(f"  {empty:,} of the documents {'is' if empty == 1 else 'are'} empty")
    return "\n".join([*lines, *left_out(report.left_out, report.examples)])
