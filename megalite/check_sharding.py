"""Rules about what the data ranks shard, and who can take back a step. One part of
`megalite.check`; no torch import."""

from __future__ import annotations

from collections.abc import Iterator

from megalite.config import Config
from megalite.near import near_divisors

LEVELS = (0, 1, 2, 3)


def sharding(config: Config) -> Iterator[str]:
    """The level exists, shard groups are of one size, and nobody guesses what is sharded."""
    parallel = config.parallel
    zero, size, dp = parallel.zero, parallel.zero_shard_size, parallel.dp
    if zero not in LEVELS:
        yield f"--zero {zero}: choose from {', '.join(map(str, LEVELS))}"
    elif size == 1 and dp > 1:
        yield "--zero-shard-size 1 shards over nobody; give --zero 0, or a divisor of dp above 1"
    elif size and dp % size:
        yield (
            f"--zero-shard-size {size} does not divide dp {dp} (shard groups are of one size)"
            f"{near_divisors(dp, size)}"
        )
    if config.train.post_validation and zero > 0 and dp > 1 and parallel.pp > 1:
        yield (
            f"--post-validation and --zero {zero}: a guessed step can be amended only by who holds "
            "all of it; give --zero 0, or leave out --post-validation"
        )
    if config.train.post_validation and config.train.offload_optimizer and parallel.pp > 1:
        yield (
            "--post-validation and --offload-optimizer: a guessed step keeps the state before it "
            "on the device; leave out one of the two"
        )
    if config.train.post_validation and config.train.optimizer == "muon" and parallel.pp > 1:
        yield (
            "--post-validation and --optimizer muon: only AdamW's steps can be amended; give "
            "--optimizer adamw, or leave out --post-validation"
        )
