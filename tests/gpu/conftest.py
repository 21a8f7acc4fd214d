"""These tests are collected only where there is a CUDA device; see tests/README.md."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
