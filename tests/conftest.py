"""Fixtures: the pool of ranks, and runs of the public entry point."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from interpreted import define_interpreted_kernels
from pool import RankPool

FULL = "full"


def pytest_configure(config: pytest.Config) -> None:
    # In the background of a script SIGINT is ignored, also in all that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    define_interpreted_kernels()
    config.addinivalue_line("markers", "full: every figure, not a sample; run with -m full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Plain `pytest` leaves the full tier out; `-m full` runs it alone."""
    if config.option.markexpr:
        return
    full = [item for item in items if item.get_closest_marker(FULL)]
    config.hook.pytest_deselected(items=full)
    items[:] = [item for item in items if item not in full]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fork the pool before any test has started a thread in this process."""
    if any("pool" in getattr(item, "fixturenames", ()) for item in session.items):
        import megalite.trainer  # noqa: F401  (imported once here, not in each rank)

        session.config.stash[_POOL] = RankPool()


def pytest_unconfigure(config: pytest.Config) -> None:
    rank_pool = config.stash.get(_POOL, None)
    if rank_pool is not None:
        rank_pool.close()


_POOL = pytest.StashKey[RankPool]()


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest) -> RankPool:
    """Eight forked ranks."""
    return request.config.stash[_POOL]


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokenized corpora of this test run, away from the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
