"""`verify` raises no alarm over random valid configurations, which reach every pair of options."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from commands import run
from pool import RankPool
from worlds import world_groups

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.tensor_names import EMBEDDING
from megalite.verification.run import Verdict, verify
from megalite.verification.shrink import shrink

SEED = 20261125
COUNT = 90
SAMPLED = 6

OPTIONS: dict[str, tuple[str, ...]] = {
    "layout": tuple(
        f"--tp {tp} --pp {pp} --dp {dp}"
        for tp, pp, dp in (
            *((1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 3, 1), (1, 1, 2), (2, 2, 1)),
            *((2, 1, 2), (1, 2, 2), (2, 2, 2), (4, 2, 1)),
        )
    ),
    "heads": (
        "--num-attention-heads 8 --num-kv-heads 8",
        "--num-attention-heads 8 --num-kv-heads 2",
        "--num-attention-heads 12 --num-kv-heads 4",
        "--num-attention-heads 4 --num-kv-heads 1",
    ),
    "layers": ("--num-layers 3", "--num-layers 7", "--num-layers 12"),
    "ffn": ("--ffn-hidden-size 352", "--ffn-hidden-size 44"),
    "vocabulary": ("--vocab-size 257", "--vocab-size 1024", "--vocab-size 1000"),
    "sequence": ("--seq-length 128", "--seq-length 127 --no-sequence-parallel"),
    "micro-batches": tuple(f"--micro-batch-size {m} --global-batch-size 24" for m in (1, 2, 4, 12)),
    "tied": ("", "--tie-embeddings"),
    "schedule": (
        *("", "--schedule gpipe", "--schedule interleaved", "--schedule zb-h1"),
        *("--schedule zb-h2 --post-validation", "--schedule zb-v", "--schedule v-half"),
    ),
    "recompute": ("", "--recompute selective", "--recompute full"),
    "dropout": ("", "--hidden-dropout 0.1", "--attention-dropout 0.2"),
    "optimizer": ("", "--optimizer muon"),
    "clipping": ("", "--clip-grad 0.1", "--clip-grad 0"),
    "rate": ("", "--lr-decay-style linear", "--lr-decay-style WSD", "--lr-decay-style constant"),
    "rates by name": ("", "--lr-scale *.q_proj.*=3,*.mlp.*=0.5 --weight-decay-for *norm*=0.2"),
    "frozen": ("", f"--freeze {EMBEDDING},*.layers.[01].*", "--freeze *.self_attn.*,*norm.*"),
    "spikes": ("", "--skip-spikes 6 --spike-window 9"),
    "rope": ("", "--rope-scaling llama3", "--rope-scaling linear", "--rope-scaling yarn"),
    "growing batch": ("", "--rampup-batch-size 12 12 30"),
    "packing": ("", "--packing best-fit"),
    "numbers": ("", "--grad-reduce-dtype bf16", "--moments-dtype bf16"),
    "documents": ("", "--reset-attention-mask", "--reset-position-ids"),
}


def configuration(choice: dict[str, str]) -> Config | None:
    """None if the choices contradict each other."""
    try:
        return run("--device", "cpu", "--hidden-size", "96", *" ".join(choice.values()).split())
    except ConfigError:
        return None


def pairs(choice: dict[str, str]) -> set[tuple]:
    return set(itertools.combinations(sorted(choice.items()), 2))


def every_pair() -> set[tuple]:
    return {
        ((first, a), (second, b))
        for (first, values), (second, others) in itertools.combinations(sorted(OPTIONS.items()), 2)
        for a, b in itertools.product(values, others)
    }


def completed(pair: tuple, missing: set[tuple], generator: random.Random) -> dict[str, str]:
    """A choice with this pair and, one option after the other, with many pairs that are missing."""
    choice = dict(pair)
    for option in generator.sample(sorted(set(OPTIONS) - set(choice)), len(OPTIONS) - 2):
        values = generator.sample(OPTIONS[option], len(OPTIONS[option]))
        choice[option] = max(values, key=lambda v: len(pairs({**choice, option: v}) & missing))
    return choice


def choices() -> list[dict[str, str]]:
    """Valid choices, each with a pair of options that no other has while there is one."""
    generator = random.Random(SEED)
    missing, impossible, chosen = every_pair(), set(), []
    while len(chosen) < COUNT:
        pair = generator.choice(sorted(missing - impossible) or sorted(every_pair() - impossible))
        for attempt in range(40):
            choice = completed(pair, missing, generator)
            # What others miss may contradict this pair: leave more and more to chance.
            others = sorted(set(choice) - {option for option, _ in pair})
            for option in generator.sample(others, min(attempt // 3, len(others))):
                choice[option] = generator.choice(OPTIONS[option])
            if configuration(choice) is not None:
                chosen.append(choice)
                missing -= pairs(choice)
                break
        else:
            impossible.add(pair)
    return chosen


CHOICES = choices()


def test_they_reach_every_pair_of_options() -> None:
    generator = random.Random(SEED + 1)
    for pair in every_pair() - set().union(*map(pairs, CHOICES)):
        for _ in range(100):
            choice = {k: generator.choice(v) for k, v in OPTIONS.items()} | dict(pair)
            assert configuration(choice) is None, f"{pair} never occurs, but could"


def verify_job(config: Config) -> Verdict:
    return verify(config, world_groups(config), torch.device("cpu"))


def check(pool: RankPool, choice: dict[str, str]) -> None:
    config = configuration(choice)
    assert config is not None
    small = shrink(config).config
    verdict = pool.run(small.world_size, verify_job, small)[0].value
    assert verdict.failed is None, verdict.failed
    assert len(verdict.passes) == (4 if small.world_size > 1 else 2)
    # No alarm, but no sleep either: rounding alone uses a part of each bound.
    worst = max(run.worst.ratio for run in verdict.passes)
    assert 1e-4 < worst < 0.5
    assert all(math.isfinite(loss) for run in verdict.passes for loss in run.losses)


def name(choice: dict[str, str]) -> str:
    return f"seed{SEED}:" + " ".join(" ".join(choice.values()).split())


@pytest.mark.parametrize("choice", CHOICES[:SAMPLED], ids=name)
def test_a_sample_raises_no_alarm(pool: RankPool, choice: dict[str, str]) -> None:
    check(pool, choice)


@pytest.mark.full
@pytest.mark.parametrize("choice", CHOICES, ids=name)
def test_no_alarm(pool: RankPool, choice: dict[str, str]) -> None:
    check(pool, choice)
