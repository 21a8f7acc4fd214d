"""Ranks that never meet."""

from __future__ import annotations

from datetime import timedelta

import pytest
from pool import free_port

from megalite.parallel import launch
from megalite.parallel.environment import World


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_never_meet_get_one_line(
    rank: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "RENDEZVOUS_LIMIT", timedelta(seconds=1))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    port = free_port()
    world = World(rank, 2, "", "127.0.0.1", port, "", "torchrun")
    assert launch.join(world, lambda _: pytest.fail("it starts alone")) == 1
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megalite: ")]
    assert len(told) == 1
    assert told[0].startswith(
        f"megalite: rank {rank} of 2: the ranks did not all meet at 127.0.0.1:{port}: "
    )
