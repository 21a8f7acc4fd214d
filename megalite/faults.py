"""Faults that are injected on purpose, to see a run survive them. No torch import.

    MEGALITE_FAULT="kill:rank=1,step=3"               rank 1 kills itself in step 3
    MEGALITE_FAULT="slow:rank=2,step=5,seconds=0.5"   rank 2 takes 0.5 s longer from step 5 on
    MEGALITE_FAULT="nan:step=4,steps=3;enospc:at=half-shard"

One of `KINDS`, then where and when, separated by commas; faults are separated by semicolons. Each
fires on one rank (`rank=`, 0 if left out), in steps (`step=`, 1 first; `steps=` so many from there
on, 1 if left out, for `slow` all) or at a point of a save (`at=`, one of `POINTS`; of every save,
or with `step=` of the one after that step). A run that is started again after a fault goes on
without it, unless the fault says `always`.
"""

from __future__ import annotations

import difflib
import errno
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megalite.errors import ConfigError

VARIABLE = "MEGALITE_FAULT"

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "kill": "kills itself",
        "hang": "goes no further",
        "slow": "waits",
        "exc": "raises",
        "enospc": "finds the disk full",
        "nan": "computes gradients that are NaN",
        "bitflip": "flips a bit of its weights when the step is done",
    }
)
"""What each fault does to its rank, in words."""

POINTS = ("before-shard", "half-shard", "before-manifest", "before-rename", "after-rename")
"""Places in a save, in their order."""

_OF_STEPS = frozenset({"nan", "bitflip"})
_OF_SAVES = frozenset({"enospc"})
_NUMBERS = ("rank", "step", "steps", "seconds")
_KEYS = (*_NUMBERS, "at", "always")


class InjectedError(RuntimeError):
    """What `exc` raises."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: of `KINDS`.
        rank: world rank on which it fires.
        step: the first step in which it fires, 1 first; 0: at a point of every save.
        steps: in so many steps from there on; 0: in all.
        at: the point of a save; empty: in the step itself.
        seconds: that `slow` waits.
        always: also when the run has been started again.
    """

    kind: str
    rank: int = 0
    step: int = 0
    steps: int = 1
    at: str = ""
    seconds: float = 1.0
    always: bool = False

    def fires(self, step: int) -> bool:
        """Whether it does in this step, or in the save after it."""
        if not self.step:
            return True
        return self.step <= step and (not self.steps or step < self.step + self.steps)

    def __str__(self) -> str:
        what = KINDS[self.kind] + (f" {self.seconds:g} s" if self.kind == "slow" else "")
        when = f"in step {self.step}"
        if self.steps != 1:
            when = f"from step {self.step} on" + (f", {self.steps} steps" if self.steps else "")
        if self.at:
            when = f"{self.at} of " + (f"the save after step {self.step}" if self.step else "saves")
        return f"rank {self.rank} {what} {when}"


@dataclass(frozen=True)
class Faults:
    """The faults of one rank, all that may fire in this start of the run.

    Attributes:
        planned: those.
    """

    planned: tuple[Fault, ...]

    @classmethod
    def none(cls) -> Faults:
        """Nothing fires."""
        return cls(())

    @classmethod
    def of(cls, env: Mapping[str, str], rank: int, attempt: int) -> Faults:
        """What the environment asks of a rank.

        Args:
            env: environment variables.
            rank: world rank.
            attempt: how often the run has been started again.

        Raises:
            ConfigError: `MEGALITE_FAULT` cannot be read.
        """
        faults = parse(env.get(VARIABLE, ""))
        return cls(tuple(f for f in faults if f.rank == rank and (f.always or not attempt)))

    def in_step(self, step: int) -> None:
        """A place in the middle of step `step`, 1 first: what stops, delays or raises does here."""
        for fault in self.planned:
            if not fault.at and fault.fires(step):
                _strike(fault)

    def at(self, point: str, step: int) -> None:
        """A place in the save after step `step`; `point` is of `POINTS`.

        Raises:
            OSError: of an injected full disk.
            InjectedError: of an injected exception.
        """
        assert point in POINTS, f"{point} is no point of a save"
        for fault in self.planned:
            if fault.at == point and fault.fires(step):
                _strike(fault)

    def spoils_gradients(self, step: int) -> bool:
        """Whether this rank's gradients are to be NaN in step `step`."""
        return any(fault.kind == "nan" and fault.fires(step) for fault in self.planned)

    def flips_a_bit(self, step: int) -> bool:
        """Whether a bit of this rank's weights is to flip at the end of step `step`."""
        return any(fault.kind == "bitflip" and fault.fires(step) for fault in self.planned)


def parse(text: str) -> tuple[Fault, ...]:
    """The faults that a value of `MEGALITE_FAULT` names; none if it is empty.

    Raises:
        ConfigError: all that is wrong with it.
    """
    faults: list[Fault] = []
    problems: list[str] = []
    for spec in filter(None, (part.strip() for part in text.split(";"))):
        try:
            faults.append(_fault(spec))
        except ValueError as error:
            problems.append(f"{VARIABLE} {spec!r}: {error}")
    if problems:
        raise ConfigError(problems)
    return tuple(faults)


def wrong_faults(env: Mapping[str, str], world_size: int) -> Iterator[str]:
    """What is wrong with `MEGALITE_FAULT` for a run of so many ranks."""
    try:
        faults = parse(env.get(VARIABLE, ""))
    except ConfigError as error:
        yield from error.violations
        return
    for fault in faults:
        if fault.rank >= world_size:
            yield (
                f"{VARIABLE}: rank={fault.rank}, but the ranks of this run are 0 to "
                f"{world_size - 1}"
            )


def banner(env: Mapping[str, str], attempt: int) -> str:
    """What will be injected into this start of the run, for the terminal; empty if nothing is."""
    told = [str(f) for f in parse(env.get(VARIABLE, "")) if f.always or not attempt]
    return f"*** {VARIABLE} injects faults: {'; '.join(told)} ***" if told else ""


def _fault(spec: str) -> Fault:
    kind, _, rest = spec.partition(":")
    kind = kind.strip()
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of fault{_near(kind, tuple(KINDS))}")
    values: dict[str, float | str | bool] = {}
    for word in filter(None, (part.strip() for part in rest.split(","))):
        key, _, value = word.partition("=")
        if key not in _KEYS:
            raise ValueError(f"{key!r} is not known{_near(key, _KEYS)}")
        if key in values:
            raise ValueError(f"{key} is given twice")
        values[key] = _value(key, value, word)
    if kind in _OF_STEPS and "at" in values:
        raise ValueError(f"{kind} happens in a step, not in a save: give step= in place of at=")
    if kind in _OF_SAVES and "at" not in values:
        raise ValueError(f"{kind} happens in a save: give at={'|'.join(POINTS)}")
    if "step" not in values and ("at" not in values or "steps" in values):
        raise ValueError("give step=, the first step in which it fires (1 is the run's first)")
    if "seconds" in values and kind != "slow":
        raise ValueError(f"seconds= is of slow, not of {kind}")
    if kind == "slow":
        values.setdefault("steps", 0)
    return Fault(kind, **values)  # type: ignore[arg-type]


def _value(key: str, text: str, word: str) -> float | str | bool:
    if key == "always":
        if "=" in word:
            raise ValueError("always takes no value")
        return True
    if key == "at":
        if text not in POINTS:
            raise ValueError(f"at={text} is no point of a save{_near(text, POINTS)}")
        return text
    try:
        number = float(text) if key == "seconds" else int(text)
    except ValueError:
        raise ValueError(f"{word}: expected a number, as in {key}=3") from None
    least = 0 if key == "rank" else 1
    if not (0 < number < 1e6 if key == "seconds" else number >= least):
        raise ValueError(f"{word}: must be {'above 0' if least else 'at least 0'}")
    return number


def _near(word: str, choices: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, choices, 1)
    return f"; did you mean {close[0]}?" if close else f"; choose one of {', '.join(choices)}"


def _strike(fault: Fault) -> None:
    match fault.kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            while True:
                time.sleep(1.0)
        case "slow":
            time.sleep(fault.seconds)
        case "exc":
            raise InjectedError(f"injected by {VARIABLE}: {fault}")
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"injected by {VARIABLE}")
