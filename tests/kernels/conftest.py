"""These tests run in Triton's interpreter; where there is a GPU, see `tests/gpu`."""

from __future__ import annotations

from interpreted import INTERPRETED

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]
