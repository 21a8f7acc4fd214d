"""Attention inside documents on a GPU: the kernel that takes documents, against its definition."""

from __future__ import annotations

import pytest
import torch
from test_programs import start

from megalite.data.documents import document_bounds, document_starts
from megalite.layers.batch import Documents
from megalite.layers.sdpa import causal_attention

B, S, N, K, D = 2, 384, 8, 2, 128
EOD = 0
UNIT = 2.0**-8
"""Of bf16."""


def documents_of(share: float) -> Documents:
    generator = torch.Generator().manual_seed(3)
    ends = torch.rand(B, S, generator=generator) < share
    starts = document_starts(torch.where(ends, EOD, 1).numpy(), EOD)
    bounds, longest = document_bounds(starts)
    return Documents(torch.from_numpy(starts).cuda(), torch.from_numpy(bounds).cuda(), longest)


def defined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(N // K, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) / D**0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # of torch's backward thread
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_attention_inside_documents(dtype: torch.dtype, share: float) -> None:
    documents = documents_of(share)
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(heads: int) -> torch.Tensor:
        # As the layer hands them over: a view of [S, B, heads, D].
        x = torch.randn(S, B, heads, D, device="cuda", dtype=torch.float64, generator=generator)
        return x.to(dtype).permute(1, 2, 0, 3).requires_grad_()

    q, k, v = normal(N), normal(K), normal(K)
    seed = torch.randn(B, N, S, D, device="cuda", dtype=torch.float64, generator=generator)
    out = causal_attention(q, k, v, documents)
    gradients = torch.autograd.grad(out, (q, k, v), seed.to(dtype))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = defined(*exact, documents.mask())
    wanted_gradients = torch.autograd.grad(wanted, exact, seed.to(dtype).double())
    unit = UNIT if dtype == torch.bfloat16 else torch.finfo(dtype).eps
    for ours, theirs in zip((out, *gradients), (wanted, *wanted_gradients), strict=True):
        # Documents of one token leave no gradient to queries and keys.
        error = (ours.double() - theirs).norm() / (theirs.norm() or seed.norm())
        # One rounding of the result, of the weights and of the products that go into sums; those
        # of S terms in the same precision grow an error by less than the root of S.
        assert error < 3 * unit * (1 if dtype == torch.bfloat16 else S**0.5), f"{error}"


@pytest.mark.parametrize("layout", ["--dp 1", "--tp 2", "--pp 2"])
def test_verify(layout: str) -> None:
    flags = ["--model", "llama3-8b", *layout.split(), "--device", "cuda", "--reset-attention-mask"]
    results = start(layout, "-m", "megalite.verify", *flags)
    assert [result.returncode for result in results] == [0] * len(results), results
    last = results[0].stdout.splitlines()[-1]
    assert last.startswith("verified: ") and "fp64: " in last and "bf16: " in last
