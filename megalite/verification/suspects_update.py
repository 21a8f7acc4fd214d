"""Known ways in which the norm and the update go wrong, and what each leaves behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megalite.optim.lr import learning_rate
from megalite.verification.compare import Difference
from megalite.verification.defined_update import Weights, orthogonalized
from megalite.verification.definition import EMBEDDING
from megalite.verification.evidence import Evidence, common_factor, same, same_number
from megalite.verification.record import Part
from megalite.verification.shrink import SKIPPED_STEP, SPIKE_STEP


def norm_suspects(evidence: Evidence, first: Difference) -> Iterator[str]:
    """Of a gradient norm that differs though the gradients are right."""
    if evidence.step == SKIPPED_STEP:
        yield "a gradient that is not finite does not reach the norm of every rank"
        return
    for sentence, square in _other_squares(evidence, first.world_rank):
        if same_number(first.ours, math.sqrt(square)):
            yield sentence


def _other_squares(evidence: Evidence, world_rank: int) -> Iterator[tuple[str, float]]:
    """What the squared norm would be if it were summed otherwise."""
    held = [(rank, part, part.value.square().sum().item()) for rank, part in evidence.gradients()]
    replica = [(r, part, square) for r, part, square in held if evidence.place(r).dp == 0]
    counted = sum(square for _, part, square in replica if part.counts)
    norms = sum(s for _, part, s in replica if part.name.endswith("norm.weight"))
    norms_once = sum(
        s for _, part, s in replica if part.counts and part.name.endswith("norm.weight")
    )
    yield "the norm counts each copy of a norm weight", counted - norms_once + norms
    yield "the norm counts every copy of every weight", sum(s for _, _, s in replica)
    tied = sum(s for _, part, s in replica if part.name == EMBEDDING and not part.counts)
    yield "the norm counts the tied embedding twice", counted + tied
    for axis in ("tp", "pp"):
        mine = evidence.place(world_rank)
        kept = sum(
            s
            for r, part, s in replica
            if part.counts and getattr(evidence.place(r), axis) == getattr(mine, axis)
        )
        yield f"the norm is not summed over the {axis} axis", kept
    dp = evidence.config.parallel.dp
    yield "the norm is summed over the data ranks, which hold equal gradients", counted * dp


def weight_suspects(evidence: Evidence, _: Difference) -> Iterator[str]:
    """Of weights that differ though gradients and norm are right."""
    names = evidence.wrong_names("weight")
    if evidence.step == SKIPPED_STEP:
        yield "a step with a gradient that is not finite moves the weights"
        return
    if evidence.step == SKIPPED_STEP + 1:
        yield (
            "the step before, which was skipped for a gradient that is not finite, has moved the "
            "optimizer's moments or its count of steps"
        )
        return
    if evidence.config.train.skip_spikes and evidence.step == SPIKE_STEP:
        yield "a step that --skip-spikes skips moves the weights"
        return
    if evidence.config.train.skip_spikes and evidence.step == SPIKE_STEP + 1:
        yield (
            "the step before, which --skip-spikes skipped, has moved the optimizer's moments or "
            "its count of steps"
        )
        return
    if names <= evidence.defined.frozen:
        yield "weights that --freeze holds move"
        return
    yield from _treated_alike(evidence, names)
    yield from _other_matrices(evidence, names)
    yield from _decay(evidence, names)
    yield from _other_rate(evidence, names)
    yield from _clipping(evidence, names)


def _treated_alike(evidence: Evidence, names: set[str]) -> Iterator[str]:
    """Tensors that options name are updated as if no option named them."""
    defined, train = evidence.defined, evidence.config.train
    before, after = defined.before, defined.weights
    lr = learning_rate(train, evidence.step)
    plain = {n: 0.0 if n.endswith("norm.weight") else train.weight_decay for n in names}
    moved = {n: (after[n] - before[n]) for n in names}
    scaled = {n: moved[n] * (lr / defined.rates[n]) for n in names}
    decayed = {
        n: moved[n] + defined.rates[n] * (defined.decays[n] - plain[n]) * before[n] for n in names
    }
    parts = [p for rank in evidence.ranks for p in rank.weights if p.name in names]
    for flag, moves, applies in (
        ("--lr-scale", scaled, any(defined.rates[n] != lr for n in names)),
        ("--weight-decay-for", decayed, any(defined.decays[n] != plain[n] for n in names)),
    ):
        if applies and all(
            same(p.value - p.of(before[p.name]).cpu(), p.of(moves[p.name])) for p in parts
        ):
            yield f"{flag} is not applied"


def _decay(evidence: Evidence, names: set[str]) -> Iterator[str]:
    """Weight decay where there is none, or none where there is."""
    defined, train = evidence.defined, evidence.config.train
    before, after = defined.before, defined.weights
    norms = {name for name in after if name.endswith("norm.weight")}

    def all_are(sign: float) -> bool:
        amounts = {n: defined.rates[n] * (defined.decays[n] or train.weight_decay) for n in names}
        return all(
            same(
                p.value - p.of(before[p.name]),
                p.of(after[p.name] - (1 + sign * amounts[p.name]) * before[p.name]),
            )
            for rank in evidence.ranks
            for p in rank.weights
            if p.name in names
        )

    if names <= norms and all_are(1.0):
        yield "weight decay is applied to norm weights"
    if not names & norms and all_are(-1.0):
        yield "weight decay is not applied"


def _other_matrices(evidence: Evidence, names: set[str]) -> Iterator[str]:
    """Muon, with other matrices made orthogonal than those of the whole model."""
    defined = evidence.defined
    directions = defined.update.directions if defined.update else {}
    if not names <= directions.keys():
        return

    def all_are(move_of: Callable[[Part], Tensor]) -> bool:
        """Whether all weights moved in these directions, however far."""
        for part in (p for rank in evidence.ranks for p in rank.weights if p.name in names):
            amount = defined.rates[part.name] * defined.decays[part.name]
            kept = (1 - amount) * part.of(defined.before[part.name])
            ours, theirs = kept.cpu() - part.value, move_of(part).cpu()
            if not same(ours / ours.norm(), theirs / theirs.norm()):
                return False
        return True

    if all_are(lambda part: _of_packed(directions, part)):
        yield "packed matrices are orthogonalised, not each by its name"
    if all_are(lambda part: orthogonalized(part.of(directions[part.name]))):
        yield "each tensor rank orthogonalises the slice that it holds, not the whole matrix"


def _of_packed(directions: Weights, part: Part) -> Tensor:
    """The part's rows of all that its matrix is packed with, made orthogonal together."""
    prefix, _, ending = part.name.removesuffix(".weight").rpartition(".")
    packs = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    pack = next((names for names in packs if ending in names), (ending,))
    matrices = [directions[f"{prefix}.{name}.weight"] for name in pack]
    rows = [len(matrix) for matrix in matrices]
    return part.of(orthogonalized(torch.cat(matrices)).split(rows)[pack.index(ending)])


def _other_rate(evidence: Evidence, names: set[str]) -> Iterator[str]:
    """Every weight moved by the same share of what it should."""
    before, after = evidence.defined.before, evidence.defined.weights
    pairs = [
        (p.value - p.of(before[p.name]), p.of(after[p.name] - before[p.name]))
        for rank in evidence.ranks
        for p in rank.weights
        if p.name in names
    ]
    factor = common_factor(pairs)
    if factor is None:
        return
    train = evidence.config.train
    lr = learning_rate(train, evidence.step)
    for step in (*range(evidence.step - 2, evidence.step), *range(evidence.step + 1, train.steps)):
        if step >= 0 and same_number(factor, learning_rate(train, step) / lr):
            yield f"the learning rate is that of step {step}, not of step {evidence.step}"
            return
    yield f"every weight moves by {factor:.6g} times what it should"


def _clipping(evidence: Evidence, names: set[str]) -> Iterator[str]:
    """Moments grow from clipped gradients; AdamW hides a constant factor but not its change."""
    clip = evidence.config.train.clip_grad
    if clip and evidence.defined.norm > clip and len(names) == len(evidence.defined.weights):
        yield "the gradients are clipped by another norm than the reported one, or not at all"
