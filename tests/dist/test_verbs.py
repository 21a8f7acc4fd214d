"""Each verb equals its dense definition on the shards of all ranks, forward and backward."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pool import RankPool
from torch import Tensor
from worlds import make_groups, random_like

S, B, H = 8, 3, 5


def total(shards: list[Tensor]) -> Tensor:
    return torch.stack(shards).sum(0)


def part(whole: Tensor, rank: int, size: int) -> Tensor:
    return whole.chunk(size)[rank]


# (inputs of all ranks, rank, size) -> output of the rank
DENSE = {
    "copy": (lambda xs, r, n: xs[r], lambda dys, r, n: total(dys)),
    "reduce": (lambda xs, r, n: total(xs), lambda dys, r, n: dys[r]),
    "gather_sequence": (
        lambda xs, r, n: torch.cat(xs),
        lambda dys, r, n: part(total(dys), r, n),
    ),
    "scatter_sequence": (
        lambda xs, r, n: part(total(xs), r, n),
        lambda dys, r, n: torch.cat(dys),
    ),
    "split_sequence": (
        lambda xs, r, n: part(xs[r], r, n),
        lambda dys, r, n: torch.cat(dys),
    ),
}


def verbs_job() -> None:
    tp = make_groups(tp=4).tp
    for verb, (forward, backward) in DENSE.items():
        for strided in (False, True):
            local = S // tp.size if verb == "gather_sequence" else S
            xs = [random_like((local, B, H), 10 + r, torch.float64) for r in range(tp.size)]
            if strided:
                xs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in xs]
            x = xs[tp.rank].clone().requires_grad_()
            y = getattr(tp, verb)(x)
            torch.testing.assert_close(y, forward(xs, tp.rank, tp.size), rtol=0, atol=1e-14)
            dys = [random_like(tuple(y.shape), 20 + r, torch.float64) for r in range(tp.size)]
            dy = dys[tp.rank]
            if strided:
                dy = dy.transpose(1, 2).contiguous().transpose(1, 2)
            y.backward(dy)
            assert x.grad is not None
            want = backward(dys, tp.rank, tp.size)
            torch.testing.assert_close(x.grad, want, rtol=0, atol=1e-14, msg=verb)
            torch.testing.assert_close(xs[tp.rank], x.detach(), rtol=0, atol=0)


def test_verbs_equal_their_dense_definition(pool: RankPool) -> None:
    pool.run(4, verbs_job)


def gradcheck_job() -> None:
    """Compositions of an f and a g, all ranks perturbing their inputs in lockstep.

    The function between them is elementwise: then no rank's output depends on the perturbation
    that another rank makes at the same moment in another element.
    """
    tp = make_groups(tp=4).tp
    weight = random_like((S, B, H), 30 + tp.rank, torch.float64)
    whole = random_like((S, B, H), 1, torch.float64).requires_grad_()
    own = tp.local_part(whole.detach()).clone().requires_grad_()

    def f_g(x: Tensor) -> Tensor:
        return tp.reduce(torch.tanh(tp.copy(x)) * weight)

    def gather_scatter(x: Tensor) -> Tensor:
        return tp.scatter_sequence(torch.tanh(tp.gather_sequence(x)) * weight)

    assert torch.autograd.gradcheck(f_g, (whole,))
    assert torch.autograd.gradcheck(gather_scatter, (own,))


def test_compositions_pass_gradcheck(pool: RankPool) -> None:
    pool.run(4, gradcheck_job)


def broken_gradcheck_job() -> None:
    tp = make_groups(tp=2).tp
    x = random_like((4,), 1, torch.float64).requires_grad_()
    # g without its f: the gradient of the other rank's part is missing.
    torch.autograd.gradcheck(lambda x: tp.reduce(torch.tanh(x) * (1.0 + tp.rank)), (x,))


def test_a_missing_f_fails_gradcheck(pool: RankPool) -> None:
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        pool.run(2, broken_gradcheck_job)


def data_and_pipeline_job() -> None:
    groups = make_groups(tp=1, pp=2, dp=2, zero=0, tie_embeddings=True)
    dp, pp = groups.dp, groups.pp
    shards = [random_like((6,), r, torch.float64) for r in range(2)]
    summed = dp.start_gradient_sum(shards[dp.rank].clone()).wait()
    torch.testing.assert_close(summed, total(shards), rtol=0, atol=1e-15)
    largest = dp.all_reduce(shards[dp.rank].clone(), maximum=True)
    torch.testing.assert_close(largest, torch.maximum(*shards), rtol=0, atol=0)
    told = pp.broadcast(torch.tensor([float(pp.rank)]), source=1)
    assert told.item() == 1.0
    # The embedding's pair is the first and last stage of the same data replica.
    pair = pp.embedding_group.all_reduce(torch.tensor([float(groups.world_rank)]))
    assert pair.item() == groups.topology.coordinates(groups.world_rank).dp * 2 + 2


def test_data_and_pipeline_verbs(pool: RankPool) -> None:
    pool.run(4, data_and_pipeline_job)


def shard_verbs_job(shard_size: int) -> None:
    """Each rank of a shard group gets its part of all ranks' sum, in place, and passes it on."""
    dp = make_groups(dp=4, zero=1, zero_shard_size=shard_size).dp
    size = shard_size or 4
    assert (dp.shards.size, dp.replicas.size) == (size, 4 // size)
    assert dp.shards.world_ranks[dp.shards.rank] == dp.rank, "neighbours"
    buckets = [random_like((8,), rank, torch.float64) for rank in range(4)]
    bucket = buckets[dp.rank].clone()
    own = dp.start_gradient_sum(bucket).wait()
    expected = torch.stack(buckets).sum(0)
    part = slice(dp.shards.rank * 8 // size, (dp.shards.rank + 1) * 8 // size)
    torch.testing.assert_close(own, expected[part], rtol=0, atol=1e-15)
    assert own.data_ptr() == bucket[part].data_ptr()
    whole = torch.zeros(8, dtype=torch.float64)
    whole[part] = own
    dp.shards.start_all_gather_into(whole, whole[part]).wait()
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shard_size", [0, 2])
def test_shard_verbs(pool: RankPool, shard_size: int) -> None:
    pool.run(4, partial(shard_verbs_job, shard_size))
