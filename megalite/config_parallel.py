"""The fields that describe the layout. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.option import option


@dataclass(frozen=True)
class ParallelConfig:
    """The layout: how many ranks on each axis, and how they are started."""

    tp: int = option(1, "Tensor-parallel ranks: each holds 1/tp of every matrix.", metavar="RANKS")
    pp: int = option(1, "Pipeline-parallel ranks: each holds some layers.", metavar="RANKS")
    dp: int = option(0, "Data-parallel ranks. 0: world size / (tp x pp), or 1.", metavar="RANKS")
    zero: int = option(
        -1,
        "What the data ranks shard in place of replicating it (ZeRO). 0: nothing; 1: optimizer "
        "states and master weights; 2: gradients too; 3: weights too, gathered layer by layer for "
        "each use. -1: 1 if dp > 1, and 0 with --post-validation.",
        metavar="LEVEL",
    )
    zero_shard_size: int = option(
        0,
        "Data ranks over which --zero shards, neighbours first (those of a machine); across groups "
        "of so many it replicates. 0: all.",
        metavar="RANKS",
    )
    sequence_parallel: bool | None = option(
        None, "Split norms and dropout along the sequence over tp. Default: on if tp > 1."
    )
    pp_layers: tuple[float, ...] = option(
        (),
        "Layers of each pipeline stage, pp x chunks numbers. Halves end after a layer's attention, "
        "as in 8.5,7.5. Default: balanced.",
        metavar="N,N,...",
    )
    schedule: str = option(
        "1f1b",
        "Pipeline schedule: gpipe, 1f1b, interleaved, zb-h1, zb-h2, zb-v, v-half, v-min, "
        "dualpipe-v, auto (the fastest by measured costs), or a file of actions as "
        "tools/draw_schedule.py prints it.",
        metavar="NAME|FILE",
    )
    chunks: int = option(
        0,
        "Stages of each pipeline rank. 0: the schedule's own number, 2 for interleaved and the "
        "V-shaped ones, else 1.",
        metavar="STAGES",
    )
    memory_limit: float = option(
        0.0,
        "Memory that a rank may use; a plan that needs more is refused, and --schedule auto looks "
        "for the fastest that needs no more. 0: what the GPU has.",
        metavar="GIB",
    )
    device: str = option(
        "auto",
        "Where to train. auto: one GPU per rank if there are enough, else the CPU.",
        choices=("auto", "cpu", "cuda"),
    )
    distributed_timeout_minutes: float = option(
        10.0, "Longest wait for other ranks in a collective.", metavar="MINUTES"
    )

    @property
    def shard_size(self) -> int:
        """Data ranks over which optimizer states are sharded; 1: over none."""
        return (self.zero_shard_size or self.dp) if self.zero > 0 else 1
