"""Muon: Newton-Schulz against singular values, steps against their definition in numpy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from commands import run, violations
from torch import Tensor

from megalite.config import Config, resolve
from megalite.estimate import rank_estimates
from megalite.layers.dtypes import weights_dtype
from megalite.layers.shard import Piece, initialize
from megalite.models.llama import LlamaStage
from megalite.models.stage import stage_specs
from megalite.optim.flat import FlatParameters
from megalite.optim.muon import Matrix, dealt, orthogonalized
from megalite.optim.optimizer import Optimizer
from megalite.optim.scaler import LossScale
from megalite.parallel.groups import ParallelGroups
from megalite.treatment import treatments

CPU = torch.device("cpu")
SHAPES = [(40, 40), (64, 24), (24, 64), (1, 30), (30, 1)]


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def five_steps(values: Tensor) -> Tensor:
    """Of Newton and Schulz, on numbers."""
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_near_the_polar_factor(shape: tuple[int, int]) -> None:
    """The same singular vectors, each singular value where the polynomial takes it: near 1."""
    # None of the singular values is so small that five steps leave it behind.
    u, s, vt = torch.linalg.svd(random(shape, 1), full_matrices=False)
    s = torch.linspace(7.0, 0.7, len(s), dtype=torch.float64)
    x = orthogonalized(u @ s.diag() @ vt)
    inner = u.t() @ x @ vt.t()
    want = five_steps(s / (s.norm() + 1e-7)).diag()
    torch.testing.assert_close(inner, want, rtol=0, atol=1e-12)
    # And nothing outside the two spaces.
    torch.testing.assert_close(u @ inner @ vt, x, rtol=0, atol=1e-12)
    distances = torch.linalg.svdvals(x - u @ vt)
    assert 0.0 < distances.max() < 0.33


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_of_its_precision_remains(shape: tuple[int, int]) -> None:
    """fp32 to its rounding, amplified 485 times at most; bf16 to what an update may be off."""
    x = random(shape, 2)
    exact = orthogonalized(x)
    single = orthogonalized(x.float())
    assert single.dtype == torch.float32
    assert (single - exact).norm() / exact.norm() < 485 * 2**-24
    half = orthogonalized(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.linalg.svdvals(half.double()).max() < 1.3
    assert (half - exact).norm() / exact.norm() < 0.3


def test_a_matrix_without_gradients_does_not_move() -> None:
    assert torch.equal(orthogonalized(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_small_singular_values_grow_485_times() -> None:
    u, s, vt = torch.linalg.svd(random((20, 20), 3))
    s[1:] = 1e-9
    grown = torch.linalg.svdvals(orthogonalized(u @ s.diag() @ vt))[1:] * s[0] / 1e-9
    torch.testing.assert_close(grown, torch.full_like(grown, 484.876), rtol=1e-4, atol=0)


class Small:
    """A stage of one rank, its optimizer, and gradients that a test gives."""

    def __init__(self, loss_scale: float = 1.0, **values: Any):
        small = dict(
            **dict(num_layers=2, hidden_size=24, num_attention_heads=4, num_kv_heads=2),
            **dict(ffn_hidden_size=40, vocab_size=50, seq_length=8, device="cpu"),
            **dict(precision="fp64", optimizer="muon"),
        )
        self.config = resolve(Config().replace(**{**small, **values}))
        (spec,) = stage_specs(self.config)
        groups = ParallelGroups.solo()
        dtype = weights_dtype(self.config)
        stage = LlamaStage(self.config, spec, tp=groups.tp, dtype=dtype, device=CPU)
        initialize(stage, 5)
        self.flat = FlatParameters({0: stage}, groups, bucket_elements=3000)
        self.loss_scale = loss_scale
        scaler = LossScale(loss_scale, CPU)
        named = treatments(self.config)
        self.optimizer = Optimizer(self.flat, groups, self.config.train, scaler, named)

    def step(self, lr: float, seed: int, spoilt: float = 0.0) -> None:
        """With random gradients, of which one is `spoilt`."""
        gradients = self.flat.own_gradients
        whole = 0.01 * random((self.flat.length,), seed)
        whole[100] += spoilt
        for part, span in zip(gradients, self.flat.spans, strict=True):
            part.copy_(whole[span.slice] * self.loss_scale)
        self.gradients = self.named(torch.cat(gradients) / self.loss_scale)
        self.optimizer.clip_and_step(lr, *torch.zeros(2, dtype=torch.float64).split(1))

    def named(self, buffer: Tensor) -> dict[str, Tensor]:
        return {
            piece.name: piece.of(slot.of(buffer)).detach().clone()
            for slot in self.flat.slots
            for piece in slot.shard.pieces
        }

    def weights(self) -> dict[str, Tensor]:
        return self.named(torch.cat(self.optimizer.master))

    def state(self) -> list[Tensor]:
        ours = self.optimizer
        kept = (ours.master, ours.exp_avg, ours.exp_avg_sq, self.flat.own_parameters)
        return [part.clone() for parts in kept for part in parts]


def defined_muon(w: Any, m: Any, g: Any, lr: float, config: Config) -> tuple[Any, Any]:
    """One step on numpy's matrices, with the square of the matrix on whichever side."""
    mu = config.train.muon_momentum
    m = mu * m + g
    x = g + mu * m
    x = x / (np.sqrt((x * x).sum()) + 1e-7)
    for _ in range(5):
        x3 = x @ x.T @ x
        x = 3.4445 * x - 4.7750 * x3 + 2.0315 * (x @ x.T @ x3)
    update = 0.2 * math.sqrt(max(w.shape)) * x + config.train.weight_decay * w
    return w - lr * update, m


def is_hidden(name: str) -> bool:
    return "_proj" in name


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_steps_equal_their_definition(clip: float) -> None:
    ours = Small(clip_grad=clip, muon_momentum=0.9)
    theirs = {name: w.numpy() for name, w in ours.weights().items() if is_hidden(name)}
    moments = dict.fromkeys(theirs, 0.0)
    assert len(theirs) == 14
    assert len([span for span in ours.flat.spans if span.matrices]) > 2
    for step in range(4):
        ours.step(0.02 / (1 + step), step)
        norm = math.sqrt(sum(g.square().sum().item() for g in ours.gradients.values()))
        scale = clip / (norm + 1e-6) if clip else 1.0
        assert scale <= 1.0 and (scale < 0.5 or not clip)
        for name in theirs:
            g = ours.gradients[name].numpy() * scale
            lr = 0.02 / (1 + step)
            theirs[name], moments[name] = defined_muon(
                theirs[name], moments[name], g, lr, ours.config
            )
    found = ours.weights()
    for name, want in theirs.items():
        np.testing.assert_allclose(found[name].numpy(), want, rtol=0, atol=1e-13, err_msg=name)


def test_packed_matrices_have_rates_and_decays_of_their_own() -> None:
    """What they are made orthogonal by stays each one's own."""
    plain = Small(weight_decay=0.1)
    named = Small(weight_decay=0.1, lr_scale=("*k_proj*=0.25",), weight_decay_for=("*up_proj*=0",))
    before = plain.weights()
    for small in (plain, named):
        small.step(1e-2, 1)
    a, b = plain.weights(), named.weights()
    for name in filter(is_hidden, before):
        kept = 1e-2 * 0.1 * before[name] if "up_proj" in name else 0.0
        share = 0.25 if "k_proj" in name else 1.0
        want = before[name] + share * (a[name] - before[name]) + kept
        torch.testing.assert_close(b[name], want, rtol=0, atol=1e-14)


def test_embedding_head_and_norms_stay_with_adamw() -> None:
    muon, adamw = Small(), Small(optimizer="adamw")
    start = adamw.weights()
    for small in (muon, adamw):
        for step in range(3):
            small.step(1e-2, step)
    a, b = muon.weights(), adamw.weights()
    assert {name for name in a if not torch.equal(a[name], b[name])} == set(filter(is_hidden, a))
    assert not any(torch.equal(a[name], w) for name, w in start.items())


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_updates_are_as_large_as_those_of_adamw(precision: str) -> None:
    """0.2, times the learning rate; of weights without decay."""
    small = Small(precision=precision, weight_decay=0.0)
    before = small.weights()
    small.step(1e-2, 1)
    for name, after in small.weights().items():
        if is_hidden(name):
            size = (after - before[name]).square().mean().sqrt().item() / 1e-2
            assert 0.5 * 0.2 < size < 1.2 * 0.2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spoilt", [math.inf, math.nan])
def test_a_step_that_is_not_finite_moves_nothing(precision: str, spoilt: float) -> None:
    small = Small(precision=precision)
    small.step(1e-2, 1)
    before = small.state()
    small.step(1e-2, 2, spoilt)
    assert all(torch.equal(a, b) for a, b in zip(before, small.state(), strict=True))
    small.step(1e-2, 3)
    assert not any(
        torch.equal(a, b) for a, b in zip(before, small.state(), strict=True) if a.numel()
    )


def test_the_loss_scale_changes_no_bit() -> None:
    plain, scaled = Small(precision="fp32"), Small(precision="fp32", loss_scale=1024.0)
    for small in (plain, scaled):
        for step in range(3):
            small.step(1e-2, step)
    assert all(torch.equal(a, b) for a, b in zip(plain.state(), scaled.state(), strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_estimate_counts_what_is_kept(optimizer: str, precision: str) -> None:
    small = Small(precision=precision, optimizer=optimizer)
    kept = [*small.optimizer.exp_avg, *small.optimizer.exp_avg_sq]
    if precision == "bf16":
        kept += small.optimizer.master
        model = torch.cat([part.bfloat16() for part in small.optimizer.master])
        assert torch.equal(model, torch.cat(small.flat.own_parameters))
    (memory,) = rank_estimates(small.config)
    assert memory.optimizer == sum(part.nbytes for part in kept)
    hidden = sum(w.numel() for name, w in small.weights().items() if is_hidden(name))
    width = 8 if precision == "fp64" else 4
    adamw = rank_estimates(small.config.replace(optimizer="adamw"))[0].optimizer
    assert adamw - memory.optimizer == (width * hidden if optimizer == "muon" else 0)


def matrix(rows: int, columns: int) -> Matrix:
    small = Small()
    slot = small.flat.slots[0]
    return Matrix(slot, Piece("w", (rows, columns), 0, 0, rows))


def test_matrices_are_dealt_out_whole_and_evenly() -> None:
    matrices = [matrix(*shape) for shape in ((8, 8), (64, 8), (8, 8), (32, 8), (32, 8), (8, 16))]
    for workers in (1, 2, 3, 5, 8):
        hands = dealt(matrices, workers)
        assert len(hands) == workers
        assert sorted(index for hand in hands for index in hand) == list(range(6))
    work = [min(m.piece.shape) * math.prod(m.piece.shape) for m in matrices]
    one, other = dealt(matrices, 2)
    assert sum(work[i] for i in one) == sum(work[i] for i in other)
    assert max(map(len, dealt(matrices, 8))) == 1


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_matrix_of_four_tensor_ranks(dim: int, replicas: int) -> None:
    """Its slices come together in order, copies once, and go back to every rank."""
    small = Small()
    parameter = torch.nn.Parameter(torch.empty(6, 4))
    slot = replace(small.flat.slots[0], parameter=parameter, start=5)
    length = 2
    shape = [6, 4]
    shape[dim] = length * 4 // replicas
    piece = Piece("w", (shape[0], shape[1]), dim, 0, length, local_start=1, replicas=replicas)
    whole = random((shape[0], shape[1]), 1)
    buckets = torch.zeros(4, 40, dtype=torch.float64)
    Matrix(slot, piece).put(whole, buckets)
    cut = whole.split(length, dim)
    for rank, bucket in enumerate(buckets):
        held = bucket[5:29].view(6, 4)
        assert torch.equal(held.narrow(dim, 1, length), cut[rank // replicas])
        assert held.count_nonzero() == bucket.count_nonzero() == cut[0].numel()
    assert torch.equal(Matrix(slot, piece).whole(buckets), whole)


def test_flags() -> None:
    assert run("--optimizer", "adam").train.optimizer == "adamw"
    assert run("--optimizer", "muon", "--muon-momentum", "0.9").train.muon_momentum == 0.9
    (wrong,) = violations("--optimizer", "sgd")
    assert wrong == "--optimizer sgd: expected one of adamw, muon"
    (wrong,) = violations(*"--optimizer muon --muon-momentum 1".split())
    assert wrong == "--muon-momentum 1.0 must be at least 0 and below 1"
    (wrong,) = violations("--muon-momentum", "0.9")
    assert wrong == "--muon-momentum 0.9 has no effect without --optimizer muon; leave it out"


def test_no_guess_is_amended() -> None:
    flags = "--optimizer muon --post-validation --schedule zb-h1".split()
    (wrong,) = violations("--pp", "2", *flags)
    assert wrong == (
        "--post-validation and --optimizer muon: only AdamW's steps can be amended; give "
        "--optimizer adamw, or leave out --post-validation"
    )
    assert run(*flags[:3], "--pp", "1").train.post_validation
