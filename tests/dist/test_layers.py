"""Each parallel layer equals the unsharded layer: output and every gradient, at tp 1, 2, 4."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pool import RankPool
from torch import Tensor, nn
from worlds import make_groups, random_like

from megalite.config import Config, resolve
from megalite.layers.attention import Attention
from megalite.layers.cross_entropy import (
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_loss_with_grad,
    vocab_parallel_loss_with_grad,
)
from megalite.layers.embedding import VocabParallelEmbedding
from megalite.layers.linear import ColumnParallelLinear, Output, RowParallelLinear
from megalite.layers.mlp import MLP
from megalite.layers.norm import RMSNorm
from megalite.layers.rope import rope_tables
from megalite.layers.shard import initialize, named_shards
from megalite.models.llama import DecoderLayer
from megalite.models.stage import LayerPart
from megalite.parallel.tensor import TensorGroup

S, B = 16, 2
BOUND = 1e-6
"""Of the largest element, in fp32."""


def config_of(kv_heads: int = 4) -> Config:
    return resolve(
        Config().replace(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            num_kv_heads=kv_heads,
            ffn_hidden_size=24,
            seq_length=S,
            init_method_std=0.2,
        )
    )


class Case:
    """A layer, its whole input, and how its output is cut."""

    def __init__(
        self,
        build: Callable[[TensorGroup], nn.Module],
        call: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x),
        features: int = 32,
        out_is_columns: bool = False,
        in_is_columns: bool = False,
        elementwise: bool = False,
    ):
        self.build, self.call, self.features = build, call, features
        self.out_is_columns, self.in_is_columns = out_is_columns, in_is_columns
        self.elementwise = elementwise


def _attention(kv_heads: int) -> Case:
    model = config_of(kv_heads).model
    cos, sin = rope_tables(model, S, torch.float32)
    return Case(
        lambda tp: Attention(model, 0, tp=tp), lambda layer, x: layer(x, cos[:, None], sin[:, None])
    )


def _decoder_layer() -> Case:
    config = config_of(2)
    cos, sin = rope_tables(config.model, S, torch.float32)
    return Case(
        lambda tp: DecoderLayer(
            config, LayerPart(0), tp=tp, dtype=torch.float32, device=torch.device("cpu")
        ),
        lambda layer, x: layer(x, cos[:, None], sin[:, None]),
    )


CASES: dict[str, Callable[[], Case]] = {
    "column": lambda: Case(
        lambda tp: ColumnParallelLinear(32, [Output("w", 24)], tp=tp), out_is_columns=True
    ),
    "row": lambda: Case(
        lambda tp: RowParallelLinear(24, 32, name="w", tp=tp), features=24, in_is_columns=True
    ),
    "mlp": lambda: Case(lambda tp: MLP(config_of().model, 0, tp=tp)),
    "attention-kv4": lambda: _attention(4),
    "attention-kv2": lambda: _attention(2),
    "attention-kv1": lambda: _attention(1),
    "decoder-layer": _decoder_layer,
    "norm": lambda: Case(lambda tp: RMSNorm(32, 1e-5, name="w", tp=tp), elementwise=True),
}


def close(ours: Tensor, whole: Tensor, what: str) -> None:
    error = (ours - whole).abs().max().item() / whole.abs().max().item()
    assert error <= BOUND, f"{what} differs by {error} of its largest element"


def layer_job(name: str, tp_size: int, sequence_parallel: bool) -> None:
    tp = make_groups(tp=tp_size, sequence_parallel=sequence_parallel, num_kv_heads=_kv(name)).tp
    case = CASES[name]()
    whole, local = case.build(TensorGroup.solo()), case.build(tp)
    for layer in (whole, local):
        initialize(layer, 7)
    with torch.no_grad():
        for parameter, shard in named_shards(whole):
            if shard.init_std is None:
                parameter.copy_(random_like(tuple(parameter.shape), 3, torch.float32))
                if name == "norm":
                    next(local.parameters()).copy_(parameter)

    def cut(x: Tensor, columns: bool) -> Tensor:
        if columns:
            return x.chunk(tp.size, dim=-1)[tp.rank]
        return tp.local_part(x) if tp.sequence_parallel else x

    if name == "decoder-layer":
        whole_weights = {s.pieces[0].name: p for p, s in named_shards(whole)}
        with torch.no_grad():
            for parameter, shard in named_shards(local):
                if shard.init_std is None:
                    parameter.copy_(whole_weights[shard.pieces[0].name])

    x_whole = random_like((S, B, case.features), 1, torch.float32).requires_grad_()
    x = cut(x_whole.detach(), case.in_is_columns).clone().requires_grad_()
    y_whole, y = case.call(whole, x_whole), case.call(local, x)
    close(y, cut(y_whole, case.out_is_columns), "the output")
    dy = random_like(tuple(y_whole.shape), 2, torch.float32)
    y_whole.backward(dy)
    y.backward(cut(dy, case.out_is_columns).contiguous())
    assert x.grad is not None and x_whole.grad is not None
    close(x.grad, cut(x_whole.grad, case.in_is_columns), "the input's gradient")
    gradients = whole_gradients(whole)
    for parameter, shard in named_shards(local):
        for piece in shard.pieces:
            assert parameter.grad is not None
            ours = piece.of(parameter.grad).contiguous()
            if piece.partial:
                tp.replica_group(piece.replicas).all_reduce(ours)
            want = gradients[piece.name].narrow(piece.dim, piece.start, piece.length)
            close(ours, want, f"the gradient of {piece.name}")


def whole_gradients(module: nn.Module) -> dict[str, Tensor]:
    return {
        piece.name: piece.of(parameter.grad)
        for parameter, shard in named_shards(module)
        if parameter.grad is not None
        for piece in shard.pieces
    }


def _kv(name: str) -> int:
    return {"attention-kv2": 2, "attention-kv1": 1, "decoder-layer": 2}.get(name, 4)


GROUPS = [(1, False), (2, False), (2, True), (4, False), (4, True)]
"""(tp, sequence parallel)"""


@pytest.mark.parametrize(("tp_size", "sequence_parallel"), GROUPS)
@pytest.mark.parametrize("name", CASES)
def test_layer(pool: RankPool, name: str, tp_size: int, sequence_parallel: bool) -> None:
    pool.run(tp_size, layer_job, name, tp_size, sequence_parallel)


def embedding_job(tp_size: int, sequence_parallel: bool) -> None:
    tp = make_groups(tp=tp_size, sequence_parallel=sequence_parallel).tp
    vocab, padded = 13, 24  # at tp 4 the last ranks hold padding only
    build = lambda group: VocabParallelEmbedding(vocab, padded, 32, name="w", tp=group)  # noqa: E731
    whole, local = build(TensorGroup.solo()), build(tp)
    for layer in (whole, local):
        initialize(layer, 7)
    tokens = torch.randint(0, vocab, (B, S), generator=torch.Generator().manual_seed(1))
    y_whole, y = whole(tokens), local(tokens)
    cut = tp.local_part if tp.sequence_parallel else lambda x: x
    close(y, cut(y_whole), "the output")
    dy = random_like(tuple(y_whole.shape), 2, torch.float32)
    y_whole.backward(dy)
    y.backward(cut(dy))
    assert whole.weight.grad is not None and local.weight.grad is not None
    piece = local.shard.pieces[0]
    if piece.length:
        close(local.weight.grad, whole.weight.grad.chunk(tp.size)[tp.rank], "the gradient")
    assert not local.weight.detach()[piece.length :].any(), "padding rows are zero"
    assert not local.weight.grad[piece.length :].any(), "padding rows get no gradient"


@pytest.mark.parametrize(("tp_size", "sequence_parallel"), GROUPS)
def test_embedding(pool: RankPool, tp_size: int, sequence_parallel: bool) -> None:
    pool.run(tp_size, embedding_job, tp_size, sequence_parallel)


def cross_entropy_job(tp_size: int) -> None:
    tp = make_groups(tp=tp_size).tp
    vocab, padded = 13, 24
    logits = random_like((S, B, padded), 1, torch.float32) * 4
    logits[..., vocab:] = 50.0  # padding that would dominate if it counted
    labels = torch.randint(0, vocab, (S, B), generator=torch.Generator().manual_seed(2))
    weights = random_like((S, B), 3, torch.float32)
    weights[::3] = 0
    whole = logits.double().requires_grad_()
    want = nn.functional.cross_entropy(
        whole[..., :vocab].reshape(-1, vocab), labels.reshape(-1), reduction="none"
    ).view(S, B)
    (want * weights).sum().backward()
    assert whole.grad is not None
    want_gradient = whole.grad.float().chunk(tp.size, dim=-1)[tp.rank]
    largest = whole.grad.abs().max().item()
    local = logits.chunk(tp.size, dim=-1)[tp.rank]
    real = max(0, min(local.shape[-1], vocab - tp.rank * local.shape[-1]))

    def right_gradient(gradient: Tensor) -> None:
        error = (gradient - want_gradient).abs().max().item()
        assert error <= BOUND * largest
        assert not gradient[..., real:].any(), "padding gets no gradient"

    for overwrite in (False, True):
        leaf = local.clone().requires_grad_()
        given = leaf * 1
        loss = vocab_parallel_cross_entropy(given, labels, vocab, tp, overwrite=overwrite)
        close(loss, want.float(), "the loss")
        (gradient,) = torch.autograd.grad((loss * weights).sum(), given)
        right_gradient(gradient)
        assert (gradient.data_ptr() == given.data_ptr()) == overwrite
        assert overwrite or torch.equal(given, leaf)

    given = leaf * 1
    total, losses = vocab_parallel_loss_with_grad(given, labels, weights, vocab, tp)
    close(losses, want.float(), "the losses")
    close(total, (want * weights).sum().float(), "their weighted sum")
    assert not losses.requires_grad
    (gradient,) = torch.autograd.grad(total, given)
    right_gradient(gradient)
    assert gradient.data_ptr() == given.data_ptr()
    with torch.no_grad():
        again, _ = vocab_parallel_loss_with_grad(leaf, labels, weights, vocab, tp)
    close(again, total, "the sum without gradients")
    assert torch.equal(leaf, local)


def loss_options_job(tp_size: int) -> None:
    """Ignored labels, smoothing and z-loss, of the three forms of the loss, on parts of a row."""
    tp = make_groups(tp=tp_size, sequence_parallel=False).tp
    vocab, padded, features = 13, 24, 8
    x = random_like((S, B, features), 1, torch.float32)
    w = random_like((padded, features), 2, torch.float32)
    labels = torch.randint(0, vocab, (S, B), generator=torch.Generator().manual_seed(3))
    weights = random_like((S, B), 4, torch.float32)
    weights[::3] = 0
    for ignored in (-100, 7):
        labels[1::4] = ignored
        for smoothing, z_loss in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.05), (0.2, 0.02)):
            whole_x, whole_w = (t.double().requires_grad_() for t in (x, w))
            logits = whole_x @ whole_w.t()
            logits.retain_grad()
            z = logits[..., :vocab].reshape(-1, vocab)
            want = nn.functional.cross_entropy(
                *(z, labels.reshape(-1)),
                ignore_index=ignored,
                label_smoothing=smoothing,
                reduction="none",
            ).view(S, B)
            square = z.logsumexp(1).square().view(S, B)
            want = want + z_loss * square.masked_fill(labels == ignored, 0)
            (want * weights).sum().backward()

            def near(got: Tensor | None, want: Tensor | None) -> None:
                assert got is not None and want is not None
                assert (got - want).abs().max() <= BOUND * want.abs().max()

            options = {"ignore_index": ignored, "label_smoothing": smoothing, "z_loss": z_loss}
            assert logits.grad is not None and whole_w.grad is not None
            want_dz = logits.grad.chunk(tp.size, dim=-1)[tp.rank]
            local = logits.detach().float().chunk(tp.size, dim=-1)[tp.rank]
            local = local.clone().requires_grad_()
            losses = vocab_parallel_cross_entropy(local, labels, vocab, tp, **options)
            near(losses, want)
            (gradient,) = torch.autograd.grad((losses * weights).sum(), local)
            assert (gradient - want_dz).abs().max() <= BOUND * logits.grad.abs().max()
            assert not losses[labels == ignored].any() and not gradient[labels == ignored].any()
            with torch.no_grad():
                total, losses = vocab_parallel_loss_with_grad(
                    local, labels, weights, vocab, tp, **options
                )
            near(total, (want * weights).sum())
            near(losses, want)
            total, losses = vocab_parallel_loss_with_grad(
                local, labels, weights, vocab, tp, **options
            )
            near(losses, want)
            (gradient,) = torch.autograd.grad(total, local)
            assert (gradient - want_dz).abs().max() <= BOUND * logits.grad.abs().max()
            local_x = x.clone().requires_grad_()
            local_w = w.chunk(tp.size)[tp.rank].clone().requires_grad_()
            total, losses = vocab_parallel_linear_loss_with_grad(
                local_x, local_w, labels, weights, vocab, tp, chunk_rows=7, **options
            )
            near(losses, want)
            total.backward()
            near(local_x.grad, whole_x.grad)
            got = local_w.grad - whole_w.grad.chunk(tp.size)[tp.rank]
            assert got.abs().max() <= BOUND * whole_w.grad.abs().max()


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_cross_entropy_options(pool: RankPool, tp_size: int) -> None:
    pool.run(tp_size, loss_options_job, tp_size)


def bad_labels_job(tp_size: int) -> None:
    tp = make_groups(tp=tp_size).tp
    logits = random_like((6, 1, 8), 1, torch.float32).chunk(tp.size, dim=-1)[tp.rank].clone()
    labels = torch.tensor([[3], [-1], [-100], [7], [8], [2**40]])
    weights = torch.ones(6, 1)
    missing = [False, True, False, True, True, True]
    for losses in (
        vocab_parallel_cross_entropy(logits, labels, 7, tp),
        vocab_parallel_loss_with_grad(logits, labels, weights, 7, tp)[1],
    ):
        assert losses[:, 0].isnan().tolist() == missing
        assert losses[2] == 0


@pytest.mark.parametrize("tp_size", [1, 2])
def test_cross_entropy_of_a_label_that_does_not_exist_is_nan(pool: RankPool, tp_size: int) -> None:
    pool.run(tp_size, bad_labels_job, tp_size)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_cross_entropy(pool: RankPool, tp_size: int) -> None:
    pool.run(tp_size, cross_entropy_job, tp_size)


def linear_cross_entropy_job(tp_size: int, sequence_parallel: bool, chunk_rows: int) -> None:
    tp = make_groups(tp=tp_size, sequence_parallel=sequence_parallel).tp
    vocab, padded, features = 13, 24, 8
    x = random_like((S, B, features), 1, torch.float32)
    w = random_like((padded, features), 2, torch.float32)
    labels = torch.randint(0, vocab, (S, B), generator=torch.Generator().manual_seed(3))
    weights = random_like((S, B), 4, torch.float32)
    whole_x, whole_w = x.clone().requires_grad_(), w.clone().requires_grad_()
    want_total, want = vocab_parallel_loss_with_grad(
        whole_x @ whole_w.t(), labels, weights, vocab, TensorGroup.solo()
    )
    want_total.backward()
    assert whole_x.grad is not None and whole_w.grad is not None
    want_dw = whole_w.grad.chunk(tp.size)[tp.rank]
    for main_grad in (None, torch.ones_like(want_dw)):
        local_x = tp.local_part(x) if tp.sequence_parallel else x
        local_x = local_x.clone().requires_grad_()
        local_w = w.chunk(tp.size)[tp.rank].clone().requires_grad_()
        total, losses = vocab_parallel_linear_loss_with_grad(
            local_x, local_w, labels, weights, vocab, tp, main_grad, chunk_rows
        )
        total.backward()
        close(total, want_total, "the sum")
        close(losses, want, "the losses")
        want_dx = tp.local_part(whole_x.grad) if tp.sequence_parallel else whole_x.grad
        close(local_x.grad, want_dx, "the gradient of the hidden states")
        if main_grad is None:
            got = local_w.grad
        else:
            assert local_w.grad is None
            got = main_grad - 1
        assert (got - want_dw).abs().max() <= BOUND * whole_w.grad.abs().max()
    for frozen in ("hidden", "weight"):
        local_x = local_x.detach().requires_grad_(frozen != "hidden")
        local_w = local_w.detach().requires_grad_(frozen != "weight")
        for main_grad in (None, torch.zeros_like(want_dw)):
            local_x.grad = local_w.grad = None
            total, _ = vocab_parallel_linear_loss_with_grad(
                local_x, local_w, labels, weights, vocab, tp, main_grad, chunk_rows
            )
            total.backward()
            if frozen == "weight":
                assert local_w.grad is None and (main_grad is None or not main_grad.any())
                close(local_x.grad, want_dx, "the gradient of the hidden states alone")
            else:
                assert local_x.grad is None
                got = local_w.grad if main_grad is None else main_grad
                assert (got - want_dw).abs().max() <= BOUND * whole_w.grad.abs().max()
    with torch.no_grad():
        total, _ = vocab_parallel_linear_loss_with_grad(
            local_x, local_w, labels, weights, vocab, tp, None, chunk_rows
        )
    close(total, want_total, "the sum without gradients")


@pytest.mark.parametrize("chunk_rows", [7, 100])
@pytest.mark.parametrize(("tp_size", "sequence_parallel"), GROUPS)
def test_linear_cross_entropy(
    pool: RankPool, tp_size: int, sequence_parallel: bool, chunk_rows: int
) -> None:
    pool.run(tp_size, linear_cross_entropy_job, tp_size, sequence_parallel, chunk_rows)
