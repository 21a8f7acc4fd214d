"""Rules about what is kept in which precision. One part of `megalite.check`; no torch import."""

from __future__ import annotations

from collections.abc import Iterator

from megalite.config import Config


def precision(config: Config) -> Iterator[str]:
    """fp64 runs are fp64 throughout, nothing is fp16 without a loss scale, and Muon, which rounds
    nothing at random, keeps fp32."""
    train = config.train
    if train.optimizer == "muon":
        if train.moments_dtype == "bf16":
            yield "--optimizer muon keeps its momentum in fp32: leave out --moments-dtype bf16"
        if train.precision == "bf16-pure":
            yield (
                "--optimizer muon moves weights in fp32, and --precision bf16-pure has none: give "
                "--precision bf16"
            )
    for name in ("moments_dtype", "grad_reduce_dtype"):
        value = getattr(train, name)
        if train.precision == "fp64" and value != "auto":
            yield (
                f"--{name.replace('_', '-')} {value} and --precision fp64: an fp64 run is fp64 "
                "throughout; leave it out, or give --precision fp32"
            )
        elif name == "grad_reduce_dtype" and value == "fp16" and train.precision != "fp16":
            yield (
                "--grad-reduce-dtype fp16 without --precision fp16: fp16 rounds gradients below "
                "3e-8 to zero, and only fp16 runs scale their loss; give --grad-reduce-dtype bf16"
            )
