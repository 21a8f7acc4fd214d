"""Is one run's loss another's, up to the noise of its precision?

The yardstick is the difference between two one-rank runs that compute the same mathematics but sum
the micro-batches in opposite order: the largest over a few such pairs, because on a GPU no two runs
are alike and one pair is a matter of luck. A run passes if its largest relative loss difference to
the first one-rank run is at most twice the yardstick, and if the differences have no sign: their
mean is within two standard errors of zero, or not larger than the yardstick's own.

The order of micro-batches changes sums of gradients alone. Over a few steps that is less than what
rounding in the forward does, and tensor parallel ranks round their parts of a product, not the
whole: their gradients are as near to fp32's as one rank's, but as far from one rank's. So where
there is one, the distance of one rank's run to the same run in fp32 is a second yardstick; a
verdict says by which of them a run passes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class FailedRunError(Exception):
    """A run ended with another code than 0; the text is its command and what it said."""


@dataclass(frozen=True)
class Verdict:
    """On one run.

    Attributes:
        text: its differences, in words, and whether they are noise.
        is_noise: whether they are.
    """

    text: str
    is_noise: bool


class Yardstick:
    """What noise is.

    Args:
        forward, backward: losses of one-rank runs in each order of the micro-batches, by step.
        exact: of one-rank runs in fp32, if the others are in less.
    """

    def __init__(
        self,
        forward: Sequence[Sequence[float]],
        backward: Sequence[Sequence[float]],
        exact: Sequence[Sequence[float]] = (),
    ):
        self.reference = forward[0]
        self.pairs = [differences(b, f) for f in forward for b in backward]
        self._by_order = _largest(self.pairs)
        self._to_exact = _largest([differences(e, f) for f in forward for e in exact])
        self._offset = max(abs(statistics.mean(pair)) for pair in self.pairs)

    def judge(self, losses: Sequence[float]) -> Verdict:
        """A run with the same samples in the same steps."""
        found = differences(losses, self.reference)
        largest = _largest([found])
        signless = abs(statistics.mean(found)) <= max(2 * standard_error(found), self._offset)
        told = f"{describe(found)}, {_ratio(largest, self._by_order)} x the yardstick"
        if self._to_exact:
            told += f", {_ratio(largest, self._to_exact)} x fp32's distance"
        if signless and largest <= 2 * self._by_order:
            return Verdict(f"{told}: within noise", True)
        if signless and largest <= 2 * self._to_exact:
            return Verdict(f"{told}: more than the order's noise, within that of rounding", True)
        return Verdict(f"{told}: MORE THAN NOISE", False)


def _largest(pairs: Sequence[Sequence[float]]) -> float:
    return max((abs(each) for pair in pairs for each in pair), default=0.0)


def _ratio(largest: float, noise: float) -> str:
    return f"{largest / noise:.2f}" if noise else "0" if not largest else "inf"


@contextmanager
def training_run(
    flags: Sequence[str], processes: Sequence[Mapping[str, str]] = ({},)
) -> Iterator[Callable[[], list[float]]]:
    """`python -m megalite.pretrain`, started; it ends with the block.

    Args:
        flags: of the run.
        processes: environments of the processes to start, each in addition to this one's.

    Yields:
        A function that waits for the run and returns its training losses by step. It raises
        FailedRunError if the run failed, whose folder then stays, or if a loss is not finite.
    """
    runs = Path(tempfile.mkdtemp(prefix="training-run-"))
    command = [sys.executable, "-m", "megalite.pretrain", *flags]
    command += ["--runs", str(runs), "--name", "run"]
    started: list[subprocess.Popen[bytes]] = []
    failed = False

    def losses() -> list[float]:
        nonlocal failed
        codes = [process.wait() for process in started]
        failed = any(codes)
        if failed:
            told = [(runs / f"{number}.txt").read_text() for number in range(len(started))]
            raise FailedRunError(f"{' '.join(command)}\nkept in {runs}\n{''.join(told)}")
        lines = (runs / "run" / "metrics.jsonl").read_text().splitlines()
        found = [float(r["loss"]) for line in lines if "loss" in (r := json.loads(line))]
        for step, loss in enumerate(found, start=1):
            if not math.isfinite(loss):
                raise FailedRunError(f"{' '.join(command)}\nthe loss of step {step} is {loss}")
        return found

    try:
        for number, more in enumerate(processes):
            with open(runs / f"{number}.txt", "w") as said:
                how: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": said}
                started.append(subprocess.Popen(command, env={**os.environ, **more}, **how))
        yield losses
    finally:
        for process in started:
            process.kill()
            process.wait()
        if not failed:
            shutil.rmtree(runs)


def differences(ours: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Relative, by step."""
    return [a / b - 1 for a, b in zip(ours, reference, strict=True)]


def standard_error(values: Sequence[float]) -> float:
    """Of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5


def describe(values: Sequence[float]) -> str:
    """Largest and mean with its standard error."""
    mean, error = statistics.mean(values), standard_error(values)
    return f"largest {max(map(abs, values)):.2e}, mean {mean:+.1e} ± {error:.1e}"
