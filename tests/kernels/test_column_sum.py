"""The column sum in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from megalite_kernels.fused.column_sum import NARROW, WIDE, Tile, column_sum


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (3, 5), (4, 16), (600, 17), (132, 256), (5, 1000)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_sums_rows_into_the_dtype(rows: int, columns: int, dtype: torch.dtype) -> None:
    partials = torch.randn(rows, columns)
    exact = partials.double().sum(0)
    got = column_sum(partials, dtype)
    assert got.dtype == dtype and got.shape == (columns,)
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * 1.01
    assert (got.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_tiles_change_nothing_but_the_order() -> None:
    partials = torch.randint(-8, 8, (70, 33)).float()
    for tile in (NARROW, WIDE, Tile(16, 32, 4)):
        assert torch.equal(column_sum(partials, torch.float32, tile), partials.sum(0))


def test_it_is_the_same_on_every_run() -> None:
    partials = torch.randn(300, 20)
    assert torch.equal(
        column_sum(partials, torch.float32), column_sum(partials.clone(), torch.float32)
    )
