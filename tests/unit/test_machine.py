"""Each rank finds the ranks of its machine and a GPU of its own, however they are shown."""

from __future__ import annotations

import pytest

from megalite.parallel.machine import Machine, Seen, place

A, B = "a/0", "b/1"


def places(*everyone: Seen) -> list[tuple[int, int, int, int | None]]:
    machines = [place(everyone, rank) for rank in range(len(everyone))]
    return [(m.local_rank, m.local_size, m.gpus, m.gpu) for m in machines]


@pytest.mark.parametrize(
    ("everyone", "want"),
    [
        # torchrun: all see all, on two machines
        ([Seen(A, ("x", "y"))] * 2 + [Seen(B, ("z", "w"))] * 2, [(0, 2, 2, 0), (1, 2, 2, 1)] * 2),
        # srun with a cyclic distribution
        (
            [Seen(A, ("x", "y")), Seen(B, ("z", "w"))] * 2,
            [(0, 2, 2, 0), (0, 2, 2, 0), (1, 2, 2, 1), (1, 2, 2, 1)],
        ),
        # srun --gpus-per-task=1: each is shown its own, as number 0
        ([Seen(A, ("x",)), Seen(A, ("y",))], [(0, 2, 2, 0), (1, 2, 2, 0)]),
        # two ranks, one GPU
        ([Seen(A, ("x",))] * 2, [(0, 2, 1, 0), (1, 2, 1, None)]),
        # more GPUs than ranks
        ([Seen(A, ("x", "y", "z"))] * 2, [(0, 2, 2, 0), (1, 2, 2, 1)]),
        # overlapping views
        ([Seen(A, ("x", "y")), Seen(A, ("y", "x"))], [(0, 2, 2, 0), (1, 2, 2, 0)]),
        ([Seen(A, ())] * 2, [(0, 2, 0, None), (1, 2, 0, None)]),
        ([Seen(A, ("x",))], [(0, 1, 1, 0)]),
    ],
)
def test_place(everyone: list[Seen], want: list[tuple[int, int, int, int | None]]) -> None:
    assert places(*everyone) == want


def test_machines_without_gpus_do_not_borrow() -> None:
    assert place([Seen(A, ("x",)), Seen(B, ())], 1) == Machine(0, 1, 0, None)
