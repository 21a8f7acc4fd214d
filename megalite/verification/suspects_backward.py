"""Known ways in which gradients go wrong, and what each leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megalite.run_plan import num_stages
from megalite.verification.compare import Difference
from megalite.verification.definition import EMBEDDING, HEAD, Weights, loss_gradients
from megalite.verification.evidence import Evidence, common_factor, factor_in_words, same
from megalite.verification.record import Part
from megalite.verification.sites import stage_of


def gradient_suspects(evidence: Evidence, first: Difference) -> Iterator[str]:
    """Of gradients that differ though the loss is right."""
    names = evidence.wrong_names("gradient")
    if names <= evidence.defined.frozen:
        yield "--freeze is not applied"
    yield from _tied_embedding(evidence, names)
    yield from _copies_over_tensor_ranks(evidence, names, first)
    yield from _data_ranks(evidence, names)
    yield from _left_out(evidence, names)
    yield from _shared_factor(evidence, names)


def _tied_embedding(evidence: Evidence, names: set[str]) -> Iterator[str]:
    """The two uses of one matrix."""
    if not evidence.config.model.tie_embeddings or names != {EMBEDDING}:
        return
    where = "the tied embedding's gradient"
    lookup, head = _uses_of_embedding(evidence)
    if _is(evidence, names, {EMBEDDING: lookup + head + head}) or _is(
        evidence, names, {EMBEDDING: 2 * (lookup + head)}
    ):
        yield f"{where} is counted twice"
    uses = [
        [same(part.value, part.of(use)) for use in (lookup, head)]
        for _, part in evidence.gradients(names)
    ]
    if all(map(any, uses)) and all(any(found) for found in zip(*uses, strict=True)):
        yield f"{where} is not summed over the first and the last stage"
    for part, text in ((lookup, "lookup"), (head, "head")):
        if _is(evidence, names, {EMBEDDING: part}):
            yield f"{where} is that of its use as {text} alone"


def _uses_of_embedding(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Gradients of the tied matrix as lookup and as head."""
    config = evidence.config.replace(tie_embeddings=False)
    weights = {**evidence.defined.before, HEAD: evidence.defined.before[EMBEDDING]}
    tokens = evidence.batch.mask.sum()
    gradients = loss_gradients(config, weights, evidence.batch, tokens)[1]
    return gradients[EMBEDDING].cpu(), gradients[HEAD].cpu()


def _copies_over_tensor_ranks(
    evidence: Evidence, names: set[str], first: Difference
) -> Iterator[str]:
    """Copies of a weight on several tensor ranks, each with a part of the gradient."""
    if evidence.config.parallel.tp == 1:
        return
    norms = all(name.endswith("norm.weight") for name in names)
    heads = all(name.endswith(("k_proj.weight", "v_proj.weight")) for name in names)

    def summed(over: set[str]) -> bool:
        """Whether the copies' gradients add up to the right ones."""
        return all(
            same(_sum_of_copies(evidence, r, p), p.of(evidence.defined.gradients[p.name]))
            for r, p in evidence.gradients(over)
        )

    if norms and summed(names):
        yield (
            "the gradients of norm weights are parts of a sum over the tensor ranks, which see "
            "different parts of the sequence, and are not added"
        )
    if heads and summed(names):
        yield "the gradients of key/value heads that several tensor ranks share are not added"
    if not norms and not heads and summed({first.name}) and first.name.endswith("norm.weight"):
        yield (
            "the gradient that flows out of a column-parallel layer is not added over the tensor "
            "ranks: the reduction in its backward (f) is missing"
        )


def _sum_of_copies(evidence: Evidence, world_rank: int, part: Part) -> Tensor:
    """Sum over the tensor ranks that hold the same slice."""
    return evidence.sum_over(evidence.neighbours(world_rank, "tp"), part)


def _data_ranks(evidence: Evidence, names: set[str]) -> Iterator[str]:
    """The sum over the data ranks."""
    dp, count = evidence.config.parallel.dp, evidence.num_micro_batches
    if dp == 1:
        return
    own = [evidence.gradients_of(evidence.data_rank_samples(rank)) for rank in range(dp)]

    def all_are(of_rank: Callable[[int], Weights]) -> bool:
        wanted = {rank: of_rank(rank) for rank in range(dp)}
        return all(
            same(p.value, p.of(wanted[evidence.place(r).dp][p.name].cpu()))
            for r, p in evidence.gradients(names)
        )

    if all_are(lambda rank: own[rank]):
        yield "gradients are not summed over the data ranks"
    if all_are(lambda rank: {n: own[rank][n] / dp for n in own[rank]}):
        yield "gradients are divided by dp, but not summed over the data ranks"
    last = [
        evidence.gradients_of(evidence.micro_batches()[rank * count + count - 1])
        for rank in range(dp)
    ]

    def without_last_of_others(rank: int) -> Weights:
        right = evidence.defined.gradients
        return {
            name: right[name] - sum(last[other][name] for other in range(dp) if other != rank)
            for name in right
        }

    if all_are(without_last_of_others):
        yield "the last micro-batch's gradients are not summed over the data ranks"
    yield from _wrong_axis(evidence, names, own)


def _wrong_axis(evidence: Evidence, names: set[str], own: Sequence[Weights]) -> Iterator[str]:
    """Sums over another axis in place of the data axis."""
    for axis, size in (("tp", evidence.config.parallel.tp), ("pp", evidence.config.parallel.pp)):
        if size > 1 and _summed_over(evidence, names, own, axis):
            yield f"gradients are summed over the {axis} axis in place of the data axis"


def _summed_over(evidence: Evidence, names: set[str], own: Sequence[Weights], axis: str) -> bool:
    """Whether whole buffers were added along the axis: other slices, other layers.

    Seen on matrices whose slices are of one shape on all ranks of the axis, by their position in
    each rank's list.
    """
    checked = False
    for world_rank, rank in enumerate(evidence.ranks):
        group = evidence.neighbours(world_rank, axis)
        for position, part in enumerate(rank.gradients):
            others = [evidence.ranks[r].gradients for r in group]
            if part.name not in names or any(
                position >= len(o) or o[position].value.shape != part.value.shape for o in others
            ):
                continue
            added = torch.stack(
                [
                    o[position].of(own[evidence.place(r).dp][o[position].name].cpu())
                    for r, o in zip(group, others, strict=True)
                ]
            ).sum(0)
            if not same(part.value, added):
                return False
            checked = True
    return checked


def _left_out(evidence: Evidence, names: set[str]) -> Iterator[str]:
    """One micro-batch's gradients, on all data ranks alike."""
    right, count = evidence.defined.gradients, evidence.num_micro_batches
    for number in range(count):
        samples = evidence.micro_batches()[number::count]
        own = [evidence.gradients_of(each) for each in samples]
        without = {name: right[name] - sum(each[name] for each in own) for name in names}
        if _is(evidence, names, without):
            yield f"micro-batch {number} is missing from {_which(evidence, names)}"


def _shared_factor(evidence: Evidence, names: set[str]) -> Iterator[str]:
    """One number that all of them are off by."""
    right = evidence.defined.gradients
    pairs = [(part.value, part.of(right[part.name])) for _, part in evidence.gradients(names)]
    factor = common_factor(pairs)
    if factor is None:
        return
    which = "every gradient" if names == set(right) else _which(evidence, names)
    yield f"{which} is {factor_in_words(factor, evidence)}"


def _which(evidence: Evidence, names: set[str]) -> str:
    """A phrase for a set of tensors."""
    if names == {EMBEDDING}:
        return "the embedding's gradient"
    if all(name.endswith("norm.weight") for name in names):
        return "every norm weight's gradient"
    config = evidence.config
    stages = {
        stage_of(config, part.name, evidence.place(r).pp) for r, part in evidence.gradients(names)
    }
    if len(stages) == 1 and num_stages(config) > 1:
        return f"every gradient of stage {stages.pop()}"
    return f"the gradient of {', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}"


def _is(evidence: Evidence, names: set[str], wanted: Mapping[str, Tensor]) -> bool:
    """Whether all ranks hold these gradients in place of the right ones."""
    return all(
        same(part.value, part.of(wanted[part.name])) for _, part in evidence.gradients(names)
    )
