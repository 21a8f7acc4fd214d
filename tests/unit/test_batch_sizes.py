"""How the batch grows: by Megatron-LM's rule, and the same samples as ever in the same order."""

from __future__ import annotations

import random

import numpy as np
import pytest
from commands import run, violations

from megalite.batch_sizes import BatchSizes


def by_hand(full: int, start: int, increment: int, samples: int, steps: int) -> list[int]:
    """Megatron-LM's `RampupBatchsizeNumMicroBatchesCalculator`, step by step, in fractions."""
    from fractions import Fraction

    share = Fraction(samples, (full - start) // increment)
    consumed, sizes = 0, []
    for _ in range(steps):
        if consumed >= samples:
            size = full
        else:
            size = min(full, start + int(consumed / share) * increment)
        sizes.append(size)
        consumed += size
    return sizes


def cases(count: int) -> list[tuple[int, int, int, int]]:
    generator = random.Random(5)
    found = []
    for _ in range(count):
        start, increment = generator.randint(1, 9), generator.randint(1, 9)
        full = start + increment * generator.randint(1, 12)
        found.append((full, start, increment, generator.randint(1, 900)))
    return found


@pytest.mark.parametrize("case", cases(200), ids=str)
def test_sizes_are_megatron_s(case: tuple[int, int, int, int]) -> None:
    full, *ramp = case
    sizes = BatchSizes(full, tuple(ramp))
    steps = sizes.phases[-1].first_step + 3
    wanted = by_hand(*case, steps)
    assert [sizes.size(step) for step in range(steps)] == wanted
    assert [sizes.consumed(step) for step in range(steps + 1)] == [0, *np.cumsum(wanted).tolist()]
    for samples in range(sizes.consumed(steps) + 1):
        needed = sizes.steps_for(samples)
        assert sizes.consumed(needed) >= samples
        assert not needed or sizes.consumed(needed - 1) < samples


def test_without_a_ramp_it_is_constant() -> None:
    sizes = BatchSizes(6)
    assert [sizes.size(s) for s in (0, 5)] == [6, 6]
    assert (sizes.consumed(7), sizes.steps_for(13)) == (42, 3)


def test_both_spellings() -> None:
    for words in (["8,8,100"], ["8", "8", "100"]):
        config = run("--global-batch-size", "32", "--rampup-batch-size", *words)
        assert config.train.rampup_batch_size == (8, 8, 100)


def test_tokens_are_counted_over_the_ramp() -> None:
    flags = "--global-batch-size 32 --rampup-batch-size 8 8 96 --seq-length 100 --tokens 20000"
    config = run(*flags.split())
    assert config.num_train_samples >= 200
    assert config.batch_sizes.consumed(config.train.steps - 1) < 200


@pytest.mark.parametrize(
    ("ramp", "words"),
    [
        ("8", "expected START,INCREMENT,SAMPLES, all above 0, as in 4,4,1000"),
        ("8 0 100", "expected START,INCREMENT,SAMPLES, all above 0, as in 4,4,1000"),
        ("6 8 100", "START is not a multiple of --micro-batch-size 4 x dp 1 = 4; try 4 or 8"),
        ("8 7 100", "INCREMENT is not a multiple of --micro-batch-size 4 x dp 1 = 4"),
        ("32 4 100", "does not lead to --global-batch-size 32"),
        ("8 16 100", "does not lead to --global-batch-size 32"),
    ],
)
def test_what_leads_nowhere_is_refused(ramp: str, words: str) -> None:
    flags = f"--micro-batch-size 4 --global-batch-size 32 --rampup-batch-size {ramp}"
    found = violations(*flags.split())
    assert any(words in sentence for sentence in found), found
