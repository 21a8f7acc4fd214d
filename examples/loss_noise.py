"""Is one run's loss another's, up to the noise of its precision?

The yardstick is the difference between two one-rank runs that compute the same mathematics but sum
the micro-batches in opposite order: the largest over a few such pairs, because on a GPU no two runs
are alike and one pair is a matter of luck. A run passes if its largest relative loss difference to
the first one-rank run is at most twice the yardstick, and if the differences have no sign: their
mean is within two standard errors of zero, or not larger than the yardstick's own.

The order of micro-batches changes sums of gradients alone. Over a few steps that is less than what
rounding in the forward does, and tensor parallel ranks round their parts of a product, not the
whole: their gradients are as near to fp32's as one rank's, but as far from one rank's. There the
distance of one rank's run to the same run in fp32 is a second yardstick, and the larger one counts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


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
        self.exact = [differences(e, f) for f in forward for e in exact]
        self._by_order, self._by_rounding = _largest(self.pairs), _largest(self.exact)
        self._offset = max(abs(statistics.mean(pair)) for pair in self.pairs + self.exact)

    def judge(self, losses: Sequence[float]) -> Verdict:
        """A run with the same samples in the same steps."""
        found = differences(losses, self.reference)
        signless = abs(statistics.mean(found)) <= max(2 * standard_error(found), self._offset)
        largest, noise = _largest([found]), max(self._by_order, self._by_rounding)
        is_noise = signless and largest <= 2 * noise
        told = f"{describe(found)}, {_ratio(largest, self._by_order)} x the yardstick"
        if self.exact:
            told += f", {_ratio(largest, self._by_rounding)} x fp32's distance"
        return Verdict(f"{told}: {'within noise' if is_noise else 'MORE THAN NOISE'}", is_noise)


def _largest(pairs: Sequence[Sequence[float]]) -> float:
    return max((abs(each) for pair in pairs for each in pair), default=0.0)


def _ratio(largest: float, noise: float) -> str:
    return f"{largest / noise:.2f}" if noise else "0" if not largest else "inf"


class TrainingRun:
    """`python -m megalite.pretrain`, started; it ends with the block that holds this.

    Args:
        flags: of the run.
        processes: environments of the processes to start, each in addition to this one's.
    """

    def __init__(self, flags: Sequence[str], processes: Sequence[Mapping[str, str]] = ({},)):
        self._folder = tempfile.TemporaryDirectory(prefix="loss-noise-")
        self._runs = Path(self._folder.name)
        where = ["--runs", str(self._runs), "--name", "run"]
        self._command = [sys.executable, "-m", "megalite.pretrain", *flags, *where]
        self._said = [open(self._runs / f"{i}.txt", "w+") for i in range(len(processes))]
        self._started = [
            subprocess.Popen(
                self._command, stdout=subprocess.DEVNULL, stderr=said, env={**os.environ, **more}
            )
            for said, more in zip(self._said, processes, strict=True)
        ]

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(self, *_: object) -> None:
        for process, said in zip(self._started, self._said, strict=True):
            process.kill()
            process.wait()
            said.close()
        self._folder.cleanup()

    def losses(self) -> list[float]:
        """Wait; the training losses by step.

        Raises:
            FailedRunError: it failed.
        """
        codes = [process.wait() for process in self._started]
        if any(codes):
            told = [(self._runs / f"{i}.txt").read_text() for i in range(len(codes))]
            raise FailedRunError(f"{' '.join(self._command)}\n{''.join(told)}")
        lines = (self._runs / "run" / "metrics.jsonl").read_text().splitlines()
        return [record["loss"] for line in lines if "loss" in (record := json.loads(line))]


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
