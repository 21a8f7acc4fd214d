"""A vocabulary in parts: the parts' statistics and gradients make the whole's, against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import (
    reference_cross_entropy,
    use_backend,
    vocab_parallel_gradient_,
    vocab_parallel_statistics,
)


@pytest.fixture(params=["triton", "torch"], autouse=True)
def _backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield


def parts_of(logits: Tensor, vocab: int, ranks: int):
    """(columns' copy, first column, columns that exist) of each rank."""
    for rank, part in enumerate(logits.chunk(ranks, dim=1)):
        first = rank * part.shape[1]
        yield part.clone(), first, max(0, min(part.shape[1], vocab - first))


def inputs(rows: int, width: int, vocab: int, scale: float, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(rows + width)
    logits = (torch.randn(rows, width, generator=generator) * scale).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    return logits, targets, torch.randn(rows, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.02)])
@pytest.mark.parametrize(
    ("ranks", "width", "vocab", "scale"),
    [(1, 33, 33, 1.0), (2, 66, 50, 3.0), (4, 1200, 500, 3.0), (2, 2600, 2599, 1000.0)],
)
def test_parts_make_the_whole(
    ranks: int,
    width: int,
    vocab: int,
    scale: float,
    smoothing: float,
    z_loss: float,
    dtype: torch.dtype,
) -> None:
    logits, targets, dloss = inputs(5, width, vocab, scale, dtype)
    logits[:, vocab:] = 6e4  # padding that would dominate if it counted
    z = logits[:, :vocab].double().requires_grad_()
    losses = F.cross_entropy(z, targets, label_smoothing=smoothing, reduction="none")
    losses = losses + z_loss * z.logsumexp(1).square()
    (losses * dloss.double()).sum().backward()
    log_sum = z.detach().logsumexp(1)
    statistics = []
    for part, first, real in parts_of(logits, vocab, ranks):
        got = vocab_parallel_statistics(part, targets, first, real)
        want = reference_cross_entropy.vocab_parallel_statistics(
            part.double(), targets, first, real
        )
        assert got.dtype == torch.float32 and got.shape == (5, 4)
        if real:
            scale_of_sum = part[:, :real].double().abs().sum(1)
            assert torch.equal(got[:, 0].double(), want[:, 0])
            assert torch.equal(got[:, 2].double(), want[:, 2])
            assert ((got[:, 1] - want[:, 1]).abs() <= 1e-5 * want[:, 1]).all()
            assert ((got[:, 3] - want[:, 3]).abs() <= 1e-5 * scale_of_sum).all()
        else:
            assert torch.equal(got.double(), want)
        statistics.append(got.double())
        vocab_parallel_gradient_(
            part, targets, log_sum, dloss, first, real, vocab, smoothing, z_loss
        )
        assert not part[:, real:].any()
        bound = 1e-5 if dtype == torch.float32 else 2e-3
        gradient = z.grad[:, first : first + real]
        row_scale = z.grad.abs().amax(1, keepdim=True)
        assert ((part[:, :real].double() - gradient).abs() <= bound * row_scale).all()
    whole = torch.stack(statistics)
    maximum = whole[..., 0].amax(0)
    got_sum = maximum + (whole[..., 1] * (whole[..., 0] - maximum).exp()).sum(0).log()
    assert ((got_sum - log_sum).abs() <= 1e-5 * log_sum.abs()).all()
    at_target = z.detach().gather(1, targets[:, None])[:, 0]
    assert torch.equal(whole[..., 2].sum(0), at_target)


def test_minus_infinity_and_no_columns() -> None:
    logits, targets, _ = inputs(4, 40, 40, 1.0, torch.float32)
    logits[0] = -torch.inf
    logits[1, ::2] = -torch.inf
    got = vocab_parallel_statistics(logits, targets, 0, 40)
    assert not got[:, :2].isnan().any()
    assert got[0, 1] == 0
    want = logits[1].double().logsumexp(0)
    assert abs(got[1, 0] + got[1, 1].log() - want) < 1e-5
    none = vocab_parallel_statistics(logits, targets, 40, 0)
    assert torch.equal(none, torch.tensor([[-torch.inf, 0.0, 0.0, 0.0]]).expand(4, 4))


def test_the_sum_of_logits_may_be_left_out() -> None:
    logits, targets, _ = inputs(5, 600, 600, 2.0, torch.float32)
    want = vocab_parallel_statistics(logits, targets, 0, 590)
    assert want[:, 3].all()
    want[:, 3] = 0
    assert torch.equal(vocab_parallel_statistics(logits, targets, 0, 590, False), want)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_token_without_a_gradient_gets_zeros_whatever_it_holds(smoothing: float) -> None:
    logits, targets, dloss = inputs(5, 70, 70, 2.0, torch.float32)
    logits[0, ::2], logits[1, 3], dloss[:2] = torch.nan, torch.inf, 0
    log_sum = logits.double().logsumexp(1)
    vocab_parallel_gradient_(logits, targets, log_sum, dloss, 0, 60, 70, smoothing, 0.01)
    assert not logits[:2].any()
    assert logits[2:, :60].all() and logits.isfinite().all()


def test_zero_rows_and_strided_rows() -> None:
    logits, targets, dloss = inputs(6, 70, 70, 2.0, torch.float32)
    empty = vocab_parallel_statistics(logits[:0], targets[:0], 0, 70)
    assert empty.shape == (0, 4)
    log_sum = logits.double().logsumexp(1)
    vocab_parallel_gradient_(logits[:0], targets[:0], log_sum[:0], dloss[:0], 0, 70, 70)
    wide = torch.full((6, 100), 7.0)
    wide[:, :70] = logits
    strided = wide[:, :70]
    want = vocab_parallel_statistics(logits, targets, 0, 70)
    assert torch.equal(vocab_parallel_statistics(strided, targets, 0, 70), want)
    vocab_parallel_gradient_(logits, targets, log_sum, dloss, 0, 70, 70)
    vocab_parallel_gradient_(strided, targets, log_sum, dloss, 0, 70, 70)
    assert torch.equal(strided, logits)
    assert (wide[:, 70:] == 7).all()


def test_a_sum_in_fp32_serves_too() -> None:
    logits, targets, dloss = inputs(6, 70, 70, 2.0, torch.float32)
    log_sum = logits.double().logsumexp(1)
    coarse = logits.clone()
    vocab_parallel_gradient_(logits, targets, log_sum, dloss, 0, 70, 70)
    vocab_parallel_gradient_(coarse, targets, log_sum.float(), dloss, 0, 70, 70)
    assert (logits - coarse).abs().max() < 1e-5
