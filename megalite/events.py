"""What happened to a run, a line of JSON each: `events.jsonl`; and what its time went into.

No torch import. World rank 0 writes while there are ranks, and the launcher between two starts.
Every line has `time` [s since 1970], `event`, `attempt` (how often the run has been started again
by its launcher) and most have `step`, how many steps are done:

    start    the ranks are ready: `step` (those taken over from a checkpoint), the environment
    steps    steps `first` to `step` have taken `seconds`
    save     a checkpoint after `step`; training stood still for `seconds`
    skipped  a step changed nothing: `why`
    slow     a rank computes longer than the others: `rank`, `phase`
    times    where the time of each rank's steps went, at the end: `step_s`, shares by phase
    restart  the launcher starts all ranks again: `why`, `code`
    stop     the run ends before its last step: `why`, `code`
    end      the run is done
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import megalite
from megalite.config import Config
from megalite.wording import counted

FILE = "events.jsonl"

Event = Mapping[str, Any]

_PACKAGES = ("torch", "numpy", "triton", "safetensors")
_VARIABLES = ("MEGALITE_", "NCCL_", "TORCH_", "CUDA_", "OMP_", "GLOO_", "PYTORCH_", "CUBLAS_")


class Events:
    """The file of a run's events, to which this process adds.

    Args:
        path: of the file, made with the first line; None on the ranks that don't write.
        attempt: how often the run has been started again.
    """

    def __init__(self, path: Path | None, attempt: int = 0):
        self._path, self._attempt = path, attempt

    def write(self, event: str, **facts: Any) -> None:
        """Add a line, which has been handed to the system when this returns; if the disk takes
        none, say so.

        Args:
            event: its name.
            facts: plain values.
        """
        if self._path is None:
            return
        line = {"time": round(time.time(), 3), "event": event, "attempt": self._attempt, **facts}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab") as file:
                # A process that was killed may have left half a line.
                begins = "" if file.tell() == 0 or _ends_a_line(self._path) else "\n"
                file.write((begins + json.dumps(line) + "\n").encode())
        except OSError as error:
            # A full disk must not end a run whose next save may find room.
            print(f"megalite: {self._path}: {error.strerror}: no {event}", file=sys.stderr)


def events_file(config: Config) -> Path:
    """Where a run with a name records its events: beside its checkpoints, so that a run that goes
    on from them goes on here too, or in its own folder."""
    save = config.checkpoint.save
    return Path(save) / FILE if save else Path(config.run.runs) / config.run.name / FILE


def read_events(path: Path) -> list[Event]:
    """The events of a file, in order; a line that was cut short by a kill is passed over."""
    found = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def environment() -> dict[str, Any]:
    """What a run's numbers may depend on beside its configuration: host, versions, variables."""
    packages = {"megalite": megalite.__version__}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "packages": packages,
        "variables": {n: v for n, v in sorted(os.environ.items()) if n.startswith(_VARIABLES)},
    }


@dataclass(frozen=True)
class Goodput:
    """What a run's time went into.

    Attributes:
        wall_s: from the first event to the last, without pauses between a run that was stopped and
            the one that went on with it [s].
        step_s: in steps that count: of a step that was done twice, once [s].
        save_s: in which training stood still for checkpoints [s].
        starts: how often ranks were started, the first time included.
        lost_steps: done, but done again after a restart.
    """

    wall_s: float
    step_s: float
    save_s: float
    starts: int
    lost_steps: int

    @property
    def share(self) -> float:
        """Effective training time: that in steps which count, of all."""
        return self.step_s / self.wall_s if self.wall_s > 0 else 0.0

    def __str__(self) -> str:
        return (
            f"effective training time {self.share:.1%}: {self.step_s:.1f} s in steps of "
            f"{self.wall_s:.1f} s; {counted(self.lost_steps, 'step')} lost, "
            f"{counted(self.starts - 1, 'restart')}, {self.save_s:.1f} s standing still for saves"
        )


def goodput(events: Sequence[Event]) -> Goodput:
    """What a run's time went into, from its events.

    Steps behind the one with which a later start went on are lost.
    """
    wall_s = save_s = 0.0
    lost_steps = starts = reached = 0
    spans: list[tuple[int, int, float]] = []
    before: Event | None = None
    for event in events:
        # Between two runs of one name, unless the launcher itself started the next one, nobody ran.
        if before is not None and (event["event"] != "start" or event["attempt"]):
            wall_s += event["time"] - before["time"]
        before = event
        match event["event"]:
            case "start":
                starts += 1
                lost_steps += max(0, reached - event["step"])
                reached = event["step"]
                spans = [_until(span, reached) for span in spans]
            case "steps":
                spans.append((event["first"], event["step"], event["seconds"]))
            case "save":
                save_s += event["seconds"]
        reached = max(reached, event.get("step", 0))
    return Goodput(wall_s, sum(s for _, _, s in spans), save_s, starts, lost_steps)


def _until(span: tuple[int, int, float], step: int) -> tuple[int, int, float]:
    """What is left of the time of steps first .. last if those after `step` do not count."""
    first, last, seconds = span
    kept = min(last, max(step, first - 1))
    return first, kept, seconds * (kept - first + 1) / max(1, last - first + 1)


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
