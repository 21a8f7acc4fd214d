"""Hangs planted into a run of four ranks: `python hangs.py NAME FOLDER [DEVICE]`.

The run is a real one; from its third step on one rank does something that keeps the others waiting.
`HANGS` says for each with which layout, and what the explanation has to name.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from megalite.config import Config, resolve, resolve_device
from megalite.data.mixture import prepare_mixture
from megalite.data.splits import open_samples
from megalite.layers.attention import Attention
from megalite.optim import flat
from megalite.parallel.environment import detect_world
from megalite.parallel.launch import Prepared, Rank, join, launch, leave
from megalite.parallel.pipeline import PipelineGroup
from megalite.pipeline.actions import Action, Op
from megalite.pipeline.runtime import Executor
from megalite.saving import Saves
from megalite.trainer import Trainer

FOREVER_S = 10_000.0
PLANTED_STEP = 2
"""0 first: the third."""

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Hang:
    """A planted hang.

    Attributes:
        plant: patches the code of the guilty rank.
        guilty: its world rank.
        flags: layout of the four ranks.
        words: parts of the one sentence that has to name rank and action.
    """

    plant: Callable[[Patch, Rank], None]
    guilty: int
    flags: dict[str, Any]
    words: tuple[str, ...]


def now(rank: Rank) -> bool:
    """Whether the planted step is under way."""
    return rank.groups.activity.phase == f"step {PLANTED_STEP + 1}"


def missing_send(patch: Patch, rank: Rank) -> None:
    right = Executor._start

    def broken(self: Any, step: Any, *args: Any) -> None:
        if str(step.action) != "0SEND_F1" or not now(rank):
            right(self, step, *args)

    patch.setattr(Executor, "_start", broken)


def wrong_peer(patch: Patch, rank: Rank) -> None:
    right = PipelineGroup.start

    def broken(self: Any, message: Any) -> Any:
        if now(rank) and message.is_send and message.peer == 2:
            message = replace(message, peer=3)
        return right(self, message)

    patch.setattr(PipelineGroup, "start", broken)


def asleep_in_forward(patch: Patch, rank: Rank) -> None:
    right = Attention.forward

    def broken(self: Any, *args: Any) -> Any:
        if now(rank):
            time.sleep(FOREVER_S)
        return right(self, *args)

    patch.setattr(Attention, "forward", broken)


def exits_early(patch: Patch, rank: Rank) -> None:
    right = Executor._backward

    def broken(self: Any, *args: Any) -> None:
        if now(rank):
            time.sleep(1.0)
            os._exit(0)
        right(self, *args)

    patch.setattr(Executor, "_backward", broken)


def stopped(patch: Patch, rank: Rank) -> None:
    right = Executor._forward

    def broken(self: Any, *args: Any) -> None:
        if now(rank):
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGSTOP)
        right(self, *args)

    patch.setattr(Executor, "_forward", broken)


def data_never_comes(patch: Patch, rank: Rank) -> None:
    from megalite.data.loader import Loader

    right = Loader.train_batch

    def broken(self: Any, step: int) -> Any:
        if step == PLANTED_STEP:
            time.sleep(FOREVER_S)
        return right(self, step)

    patch.setattr(Loader, "train_batch", broken)


def never_starts(patch: Patch, rank: Rank) -> None:
    right = Trainer.__init__

    def broken(self: Any, *args: Any) -> None:
        time.sleep(FOREVER_S)
        right(self, *args)

    patch.setattr(Trainer, "__init__", broken)


def extra_collective(patch: Patch, rank: Rank) -> None:
    right = flat.FlatParameters.zero_gradients

    def broken(self: Any) -> None:
        if now(rank):
            rank.groups.dp.broadcast(torch.zeros(1), 1)
        right(self)

    patch.setattr(flat.FlatParameters, "zero_gradients", broken)


def never_saved(patch: Patch, rank: Rank) -> None:
    def broken(*_: Any) -> None:
        time.sleep(FOREVER_S)

    patch.setattr(Saves, "start", broken)


def wrong_order(patch: Patch, rank: Rank) -> None:
    """Rank 0 wants the gradient of micro-batch 0 before it sends the activations of 1."""
    right = Executor.run

    def broken(self: Any, program: Any, batch: Any, head: Any) -> Any:
        if not now(rank):
            return right(self, program, batch, head)
        early = [Action(0, Op.RECV_BACKWARD, 0), Action(0, Op.BACKWARD, 0)]
        steps = [step for step in program.ranks[0] if step not in early]
        first = steps.index(Action(0, Op.FORWARD, 1))
        steps[first:first] = early
        return right(self, replace(program, ranks=(tuple(steps), *program.ranks[1:])), batch, head)

    patch.setattr(Executor, "run", broken)


def generation_stuck(patch: Patch, rank: Rank) -> None:
    from megalite import sampling

    def broken(trainer: Trainer, tokens: list[int]) -> Any:
        trainer.groups.activity.begin("generating text")
        time.sleep(FOREVER_S)

    patch.setattr(sampling, "next_token_logits", broken)


def slow(patch: Patch, rank: Rank) -> None:
    """No hang: a step takes longer than it may, but goes on."""
    right = Executor._forward

    def broken(self: Any, *args: Any) -> None:
        if now(rank):
            time.sleep(0.8)
        right(self, *args)

    patch.setattr(Executor, "_forward", broken)


TP_PP, PP4 = dict(tp=2, pp=2), dict(pp=4)

SLOW = Hang(slow, 1, TP_PP, ())

HANGS: dict[str, Hang] = {
    "missing send": Hang(
        missing_send, 0, TP_PP, ("rank 0 is past the action that sends what rank 2", "1RECV_F1")
    ),
    "wrong peer": Hang(
        wrong_peer, 1, PP4, ("rank 1 is past the action that sends what rank 2", "2RECV_F0")
    ),
    "asleep in forward": Hang(
        asleep_in_forward,
        1,
        TP_PP,
        ("rank 1 never arrived", "step 3, stage 0, micro-batch 0, forward"),
    ),
    "exits early": Hang(exits_early, 3, TP_PP, ("rank 3 is dead or stopped", "step 3", "backward")),
    "stopped": Hang(stopped, 2, TP_PP, ("rank 2 is dead or stopped", "step 3", "forward")),
    "data never comes": Hang(
        data_never_comes, 2, TP_PP, ("rank 2 never arrived", "step 3, reading samples")
    ),
    "never starts": Hang(
        never_starts, 3, TP_PP, ("rank 3 never arrived", "start: building the model")
    ),
    "extra collective": Hang(
        extra_collective,
        0,
        dict(dp=2, tp=2),
        (
            "ranks wait for each other: rank 0 for rank 2 in broadcast",
            "rank 2 for rank 0 in reduce_",
        ),
    ),
    "never saved": Hang(never_saved, 2, TP_PP, ("rank 2 is behind all others", "starting to save")),
    "wrong order": Hang(
        wrong_order,
        0,
        dict(tp=2, pp=2, schedule="gpipe"),
        ("ranks wait for each other", "rank 0 for rank 2", "rank 2 for rank 0"),
    ),
    "generation stuck": Hang(
        generation_stuck, 3, TP_PP, ("rank 3 never arrived", "generating text")
    ),
}


def hanging(rank: Rank, name: str) -> int:
    """A short run in which the guilty rank does what it should not."""
    hang = SLOW if name == "slow" else HANGS[name]
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if rank.groups.world_rank == hang.guilty:
            hang.plant(patch, rank)
        samples = open_samples(rank.config, prepare_mixture(rank.config.data))
        trainer = Trainer(rank.config, samples, rank.groups, rank.device)
        trainer.fit(None)
        from megalite.sampling import generate

        generate(trainer, [1, 2, 3], 4)
        from pathlib import Path

        folder = Path(rank.config.run.runs) / "weights"
        where = rank.groups, rank.store, rank.device
        saves = Saves(folder, rank.config, {}, *where, weights_only=True)
        trainer.save(saves)
        saves.close()
    return 0


if __name__ == "__main__":
    # Under its own name, so that the ranks can import the job.
    from functools import partial

    import hangs

    small = dict(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=48,
        seq_length=16,
        vocab_size=64,
        micro_batch_size=1,
        global_batch_size=8,
        steps=5,
        eval_steps=0,
        mock_data=True,
        start_timeout=15.0,
        step_timeout=4.0,
        save_timeout=8.0,
        runs=sys.argv[2],
    )
    hang = hangs.SLOW if sys.argv[1] == "slow" else hangs.HANGS[sys.argv[1]]
    device = sys.argv[3] if len(sys.argv) > 3 else "cpu"
    config = resolve_device(resolve(Config().replace(**small, **hang.flags)), device)
    prepared = Prepared(config, partial(hangs.hanging, name=sys.argv[1]), {})
    world = detect_world(os.environ)
    leave(join(world, lambda _: prepared) if world else launch(prepared))
