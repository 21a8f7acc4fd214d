"""`--attention fused-softmax` computes what SDPA does: output and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalite.config import Config, resolve
from megalite.layers.attention import Attention
from megalite.layers.batch import Documents, DropoutPlace
from megalite.layers.rope import rope_tables
from megalite.layers.sdpa import attention_back_end
from megalite.models.llama import LlamaStage
from megalite.models.stage import stage_specs
from megalite.parallel.tensor import TensorGroup

S, B = 24, 2


def config_of(**values: object) -> Config:
    shape = dict(hidden_size=32, num_attention_heads=4, ffn_hidden_size=24, seq_length=S)
    return resolve(Config().replace(**shape, init_method_std=0.2, precision="fp64", **values))


def documents_of(starts: list[list[int]]) -> Documents:
    """Each sample's documents by their first positions."""
    begins = torch.zeros(B, S, dtype=torch.long)
    for row, firsts in zip(begins, starts, strict=True):
        for first in firsts:
            row[first:] = first
    flat = [i * S + first for i, firsts in enumerate(starts) for first in [0, *firsts]]
    bounds = torch.tensor([*flat, B * S], dtype=torch.int32)
    return Documents(begins, bounds, int(bounds.diff().max()))


def outcome(
    config: Config,
    fused_softmax: bool,
    place: DropoutPlace | None,
    documents: Documents | None,
    recompute_core: bool = False,
) -> list[Tensor]:
    """Output and gradients of the input and both weights."""
    attention = Attention(
        config.model,
        0,
        tp=TensorGroup.solo(),
        recompute_core=recompute_core,
        fused_softmax=fused_softmax,
        dtype=torch.float64,
    )
    generator = torch.Generator().manual_seed(5)
    weights = [*attention.parameters()]
    for weight in weights:
        torch.nn.init.normal_(weight, 0.0, 0.3, generator=generator)
    x = torch.randn(S, B, 32, dtype=torch.float64, generator=generator).requires_grad_()
    cos, sin = (t[:, None] for t in rope_tables(config.model, S, torch.float64))
    out = attention(x, cos, sin, place, documents)
    dy = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    return [out, *torch.autograd.grad(out, [x, *weights], dy)]


@pytest.mark.parametrize("recompute_core", [False, True])
@pytest.mark.parametrize("starts", [None, [[5, 6, 20], []]])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_fused_softmax_equals_sdpa(
    kv_heads: int, starts: list[list[int]] | None, recompute_core: bool
) -> None:
    config = config_of(num_kv_heads=kv_heads)
    documents = None if starts is None else documents_of(starts)
    want = outcome(config, False, None, documents)
    ours = outcome(config, True, None, documents, recompute_core)
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_dropout_is_the_same_with_both_and_scaled() -> None:
    config = config_of(attention_dropout=0.3)
    place = DropoutPlace(1, 0, torch.arange(B))
    plain, fused = (outcome(config, softmax, place, None) for softmax in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, fused, strict=True))
    without = outcome(config, True, None, None)
    many = [
        outcome(config, True, DropoutPlace(1, step, torch.arange(B)), None)[0]
        for step in range(200)
    ]
    error = (torch.stack(many).mean(0) - without[0]).abs().mean() / without[0].abs().mean()
    assert error < 0.15, "the mean over masks is what no dropout gives"


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_flag_reaches_every_layer(recompute: str) -> None:
    config = config_of(attention="fused-softmax", recompute=recompute)
    (spec,) = stage_specs(config)
    where = dict(tp=TensorGroup.solo(), dtype=torch.float64, device=torch.device("cpu"))
    assert all(layer.attention.fused_softmax for layer in LlamaStage(config, spec, **where).layers)
    sdpa = LlamaStage(config.replace(attention="sdpa"), spec, **where)
    assert not any(layer.attention.fused_softmax for layer in sdpa.layers)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (dict(), "torch SDPA"),
        (dict(attention="sdpa"), "torch SDPA"),
        (dict(attention="fused-softmax"), "matrix products and softmax"),
        (dict(attention_dropout=0.1), "matrix products and softmax (dropout)"),
    ],
)
def test_the_opening_names_it(values: dict[str, object], name: str) -> None:
    assert attention_back_end(config_of(**values), torch.device("cpu")) == name
