"""These tests run in Triton's interpreter; where there is a GPU, see `tests/gpu`.

The definitions in plain torch and the choice between both need no interpreter: they are tested on
every machine.
"""

from __future__ import annotations

from pathlib import Path

from interpreted import INTERPRETED

EVERYWHERE = ("test_backend.py", "test_definitions.py")

collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if not INTERPRETED and path.name not in EVERYWHERE
]
