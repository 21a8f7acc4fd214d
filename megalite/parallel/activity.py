"""What a rank is doing, kept where another thread can read it. No torch import.

The rank's own thread only sets attributes; it never waits and never talks to anybody. The watchdog
(`megalite.parallel.watchdog`) publishes what it reads here.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from megalite.parallel.step_times import Samples

START_LIMIT_S = 300.0
LIMIT_OF_WAIT = 0.9
"""Limits that nobody gave stay below this share of the longest wait in a collective."""

LATER_STEP_LIMIT_S = 100.0
MEDIANS = 10.0
"""A later step may take so many times the running median, and at least so long [s]."""

REMEMBERED_STEPS = 50
REMEMBERED_CALLS = 16
REMEMBERED_MARKS = 1 << 12


Kind = Literal["start", "step", "checkpoint"]
"""Of a phase: each kind has a limit of its own. What is neither step nor checkpoint is a start."""


class Progress(Protocol):
    """Marks in a GPU's queue; `megalite.parallel.progress.GpuProgress`."""

    def mark(self) -> int:
        """Queue the next mark; returns its number."""
        ...

    def passed_since(self, number: int) -> int:
        """How many marks have been reached after this one; -1 if it has not been itself."""
        ...


@dataclass(frozen=True)
class Mark:
    """What the GPU begins at a mark of its progress; fields as in `Activity`."""

    number: int
    phase: str
    doing: Any
    position: int = -1
    awaits: str = ""
    peer: int = -1


class CallTrace:
    """The collectives that this rank calls in one group, in order.

    Attributes:
        called: how many so far.
        waiting: number of the one that it is waiting for; 0 if for none.
    """

    def __init__(self) -> None:
        self.called = self.waiting = 0
        self._names: deque[str] = deque(maxlen=REMEMBERED_CALLS)

    def call(self, name: str) -> int:
        """One more; returns its number, 1 first."""
        self._names.append(name)
        self.called += 1
        return self.called

    def names(self) -> dict[int, str]:
        """The last ones by number."""
        names = list(self._names)
        return dict(enumerate(names, start=self.called - len(names) + 1))


@dataclass
class Activity:
    """One rank's present.

    Attributes:
        start_limit_s: for the start, the first step, and what is no step [s]; 0: 300, or what the
            longest wait allows.
        step_limit_s: for a later step [s]; 0: from the steps before.
        save_limit_s: for a checkpoint [s]; 0: as for the start, and what its bytes take on the
            slowest of disks.
        phase: `start`, `step 3`, `validation`, ...
        phases: how many have begun so far.
        since: when the phase began [s, monotonic].
        allowance_s: what this phase may take beyond the limit of its kind [s].
        longest_wait_s: of a collective: what the limits have to stay below [s].
        patient: no limit applies: the phase takes as long as it takes.
        doing: what is under way; turned into text by `str` when it is read.
        position: index of the action under way in this rank's program; -1 outside of one.
        awaits: the message that the rank is waiting for, as its program names it; or empty.
        peer: world rank at that message's other end; -1 without one.
        sends: where in the program of each rank each message is sent; see `hang.explain`.
        progress: of this rank's GPU, if it has one and somebody reads this.
        samples: what it was seen doing in its steps, if somebody looks.
    """

    start_limit_s: float = 0.0
    step_limit_s: float = 0.0
    save_limit_s: float = 0.0
    phase: str = "start"
    phases: int = 0
    since: float = field(default_factory=time.monotonic)
    allowance_s: float = 0.0
    longest_wait_s: float = 600.0
    patient: bool = False
    doing: Any = ""
    position: int = -1
    awaits: str = ""
    peer: int = -1
    sends: Callable[[], dict[tuple[int, str], int]] = dict
    progress: Progress | None = None
    samples: Samples = field(default_factory=Samples)
    _durations: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED_STEPS))
    _marks: deque[Mark] = field(default_factory=lambda: deque(maxlen=REMEMBERED_MARKS))
    _kind: Kind = "start"

    def begin(
        self, phase: str, kind: Kind = "start", *, patient: bool = False, allowance_s: float = 0.0
    ) -> None:
        """A new phase; the clock of its limit starts.

        Args:
            phase: its name.
            kind: which limit it has; the duration of a step sets that of those to come.
            patient: no limit applies.
            allowance_s: time beyond the limit that the phase's own work may take [s].
        """
        now = time.monotonic()
        if self._kind == "step":
            if self._durations:
                self.samples.end_step(now - self.since)
            self._durations.append(now - self.since)
        self.phase, self.since, self._kind = phase, now, kind
        self.patient, self.allowance_s = patient, allowance_s
        self.phases += 1
        self.enter("")

    def enter(self, doing: Any, position: int = -1, awaits: str = "", peer: int = -1) -> None:
        """What the host does now, and its GPU when it comes to this point of its queue.

        Args:
            doing, position: see the attributes.
            awaits, peer: of the message that the GPU will wait for; the host does not.
        """
        self.at(doing, position)
        if self.progress is not None:
            number = self.progress.mark()
            self._marks.append(Mark(number, self.phase, doing, position, awaits, peer))

    def at(self, doing: Any, position: int = -1, awaits: str = "", peer: int = -1) -> None:
        """What the host does now; see the attributes."""
        self.doing, self.position, self.awaits, self.peer = doing, position, awaits, peer

    def device(self) -> Mark | None:
        """What the GPU is in; None without one, or if it has come to the end of its queue."""
        marks, progress = self._marks, self.progress
        if progress is None or not marks:
            return None
        passed = progress.passed_since(marks[0].number)
        if passed < 0:
            return Mark(-1, marks[0].phase, "what comes before")
        for _ in range(min(passed, len(marks) - 1)):
            marks.popleft()
        # The last one reached stays, so that the next reading finds it too.
        return marks[0] if len(marks) > 1 else None

    def limit_s(self) -> float:
        """How long the present phase may take [s]."""
        # A collective that fails by itself first would fail without an explanation.
        ceiling_s = LIMIT_OF_WAIT * self.longest_wait_s
        start_s = self.start_limit_s or min(START_LIMIT_S, ceiling_s)
        if self.is_later_step:
            if self.step_limit_s:
                return self.step_limit_s
            return min(max(LATER_STEP_LIMIT_S, MEDIANS * self.step_s), ceiling_s)
        if self._kind == "checkpoint" and self.save_limit_s:
            return self.save_limit_s
        return max(start_s, self.step_limit_s) + self.allowance_s

    def limit_flag(self) -> str:
        """The flag that sets the present limit."""
        if self._kind == "checkpoint":
            return "--save-timeout"
        return "--step-timeout" if self.is_later_step else "--start-timeout"

    @property
    def step_s(self) -> float:
        """Median time of the last steps [s]; 0 before the first one has ended."""
        return statistics.median(self._durations) if self._durations else 0.0

    @property
    def is_later_step(self) -> bool:
        """Whether this is a step, and not the first one."""
        return self._kind == "step" and bool(self._durations)

    def overdue_s(self) -> float:
        """How much longer than it may the present phase takes [s]; below 0 if it may go on."""
        if self.patient:
            return -1.0
        return time.monotonic() - self.since - self.limit_s()
