"""Whole weights come out of complete folders only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megalite.checkpoint.weights import load_whole_weights
from megalite.errors import DataError


def write(folder: Path, rank: int, start: int, values: list[float], files: int = 2) -> None:
    places = {"w": {"shape": [4], "dim": 0, "start": start}}
    save_file(
        {"w": torch.tensor(values)},
        folder / f"rank-{rank:05d}.safetensors",
        metadata={"megalite": json.dumps({"files": files, "places": places})},
    )


def test_slices_are_put_together(tmp_path: Path) -> None:
    write(tmp_path, 0, 0, [1.0, 2.0, 3.0])
    write(tmp_path, 3, 3, [4.0])
    assert load_whole_weights(tmp_path)["w"].tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (None, "lacks 1 of the run's weight files"),
        ((1, [9.0, 9.0]), "a slice of w ends at 2, the next is at 1"),
        ((3, [9.0]), "a slice of w ends at 2, the next is at 3"),
        ((2, [9.0]), "a slice of w ends at 3, the next is at 4"),
    ],
)
def test_gaps_overlaps_and_missing_files_are_refused(
    tmp_path: Path, second: tuple[int, list[float]] | None, message: str
) -> None:
    write(tmp_path, 0, 0, [1.0, 2.0])
    if second is not None:
        write(tmp_path, 1, *second)
    with pytest.raises(DataError, match=message):
        load_whole_weights(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rank"):
        load_whole_weights(tmp_path)
