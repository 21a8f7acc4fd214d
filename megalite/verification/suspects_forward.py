"""Known ways in which a forward goes wrong, and what each leaves behind."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megalite.config import Config
from megalite.models.stage import stage_specs
from megalite.tokenizer.byte import ByteTokenizer
from megalite.verification.compare import Difference, activation_part
from megalite.verification.definition import DefinedDropout, attention
from megalite.verification.evidence import (
    Evidence,
    common_factor,
    factor_in_words,
    same,
    same_number,
)
from megalite.verification.sites import stage_of


def activation_suspects(evidence: Evidence, first: Difference) -> Iterator[str]:
    """Of the first activation that differs; everything before it is right."""
    yield from _messages(evidence, first)
    yield from _partial_sums(evidence, first)
    yield from _boundaries(evidence, first)
    yield from _rotation(evidence, first)
    yield from _attention_dropout(evidence, first)
    yield from _hidden_dropout(evidence, first)
    ours, theirs = _seen(evidence, first), _right(evidence, first)
    factor = common_factor([(ours, theirs)])
    if factor is not None:
        yield f"{first.name} is {factor_in_words(factor, evidence)}"


def loss_suspects(evidence: Evidence, first: Difference) -> Iterator[str]:
    """Of a loss that differs though the logits are right."""
    for sentence, value in _other_losses(evidence):
        if same_number(first.ours, value):
            yield sentence
    if first.theirs:
        factor = first.ours / first.theirs
        words = factor_in_words(factor, evidence)
        if "that is" in words:
            yield f"the loss is {words}"


def _seen(evidence: Evidence, at: Difference) -> Tensor:
    return evidence.ranks[at.world_rank].activations[at.name, at.samples]


def _right(evidence: Evidence, at: Difference, samples: tuple[int, ...] | None = None) -> Tensor:
    whole = evidence.defined.activations[at.name]
    return activation_part(
        evidence.config, whole, at.name, at.world_rank, samples or at.samples
    ).cpu()


def _messages(evidence: Evidence, first: Difference) -> Iterator[str]:
    """Right values, but of other samples."""
    seen = evidence.ranks[first.world_rank].activations
    micro_batches = [samples for site, samples in seen if site == first.name]
    holds = {
        due: held
        for due in micro_batches
        for held in micro_batches
        if same(seen[first.name, due], _right(evidence, first, held))
    }
    held = holds.get(first.samples)
    if held is None or held == first.samples:
        return
    stage = stage_of(evidence.config, first.name, evidence.place(first.world_rank).pp)
    what = f"stage {stage} has the {_noun(evidence, first)} of samples {list(held)} for those of"
    if holds.get(held) == first.samples:
        yield f"{what} samples {list(first.samples)} and the other way round: they are swapped"
    else:
        yield (
            f"{what} samples {list(first.samples)}: a stale receive buffer, or mixed up messages"
        )


def _noun(evidence: Evidence, first: Difference) -> str:
    if first.name == "embedding":
        return "tokens"
    parts = [spec.parts[0] for spec in stage_specs(evidence.config)[1:]]
    starts = {f"layers.{p.layer}.{'input' if p.has_attention else 'middle'}" for p in parts}
    return "received activations" if first.name in starts else "activations"


def _partial_sums(evidence: Evidence, first: Difference) -> Iterator[str]:
    """A row-parallel product, or an embedding, whose parts are not added."""
    if not first.name.endswith(("attention.out", "mlp.down", "embedding")):
        return
    group = evidence.neighbours(first.world_rank, "tp")
    parts = [evidence.ranks[r].activations.get((first.name, first.samples)) for r in group]
    theirs = _right(evidence, first)
    held = [part for part in parts if part is not None and part.shape == theirs.shape]
    if len(group) > 1 and len(held) == len(group) and same(torch.stack(held).sum(0), theirs):
        yield (
            f"the tensor ranks hold partial sums of {first.name}: the reduction after a "
            "row-parallel layer (g) is missing"
        )


def _rotation(evidence: Evidence, first: Difference) -> Iterator[str]:
    """Queries or keys turned by the angles of other positions."""
    if not first.name.endswith("attention.mixed"):
        return
    length = evidence.config.model.seq_length
    for shift in (s for distance in range(1, length) for s in (distance, -distance)):
        for who, q_shift, k_shift in (("queries", shift, 0), ("keys", 0, shift)):
            turned = _mixed(evidence, first, q_shift=q_shift, k_shift=k_shift)
            if same(_seen(evidence, first), turned):
                yield (
                    f"RoPE turns the {who} of this rank as if they were {abs(shift)} positions "
                    f"{'later' if shift > 0 else 'earlier'}"
                )
                return


def _boundaries(evidence: Evidence, first: Difference) -> Iterator[str]:
    """Attention or positions that do not stop where a document ends, or stop unasked."""
    if not first.name.endswith("attention.mixed"):
        return
    data = evidence.config.data
    for field, asked, unasked in (
        (
            "reset_attention_mask",
            "attention crosses the ends of documents",
            "attention stops at the ends of documents, which nobody asked for",
        ),
        (
            "reset_position_ids",
            "positions run on through the ends of documents",
            "positions start anew with each document, which nobody asked for",
        ),
    ):
        is_on = getattr(data, field)
        flipped = evidence.config.replace(**{field: not is_on})
        if same(_seen(evidence, first), _mixed(evidence, first, config=flipped)):
            yield asked if is_on else unasked
            return
    if all(_other_documents(evidence, first, row) for row in range(len(first.samples))):
        yield "this rank's samples are mixed as if documents ended where they do in other samples"


def _other_documents(evidence: Evidence, first: Difference, row: int) -> list[int]:
    """Samples whose documents explain the mixed values of a row of the micro-batch."""
    ours, documents = _seen(evidence, first)[:, row], evidence.batch.documents
    return [
        other
        for other in range(len(documents))
        if same(ours, _mixed(evidence, first, documents=documents[other, None])[:, row])
    ]


def _attention_dropout(evidence: Evidence, first: Difference) -> Iterator[str]:
    """Heads of one rank masked as those of another."""
    config, tp = evidence.config, evidence.config.parallel.tp
    if not first.name.endswith("attention.mixed") or not config.model.attention_dropout:
        return
    each, mine = config.model.num_attention_heads // tp, evidence.place(first.world_rank).tp
    for other in range(tp):
        masked = _mixed(evidence, first, rolled_heads=(mine - other) * each)
        if other != mine and same(_seen(evidence, first), masked):
            yield (
                f"attention dropout masks the heads of tensor rank {mine} as those of tensor rank "
                f"{other}"
            )
            return


def _mixed(
    evidence: Evidence,
    first: Difference,
    *,
    config: Config | None = None,
    documents: Tensor | None = None,
    rolled_heads: int = 0,
    q_shift: int = 0,
    k_shift: int = 0,
) -> Tensor:
    """The mixed values that a rank has if attention is computed otherwise.

    Args:
        evidence: of the run.
        first: the mixed values of a layer.
        config: in place of the run's own.
        documents: in place of the samples' own, [1 or B, S].
        rolled_heads: the dropout masks of heads are exchanged by so many.
        q_shift, k_shift: as `attention` takes them.
    """
    layer, samples = int(first.name.split(".")[1]), list(first.samples)
    q, k, v = _projections(evidence, layer, first.samples)
    keep = DefinedDropout(evidence.config, evidence.batch).attention(layer)
    if keep is not None:
        keep = keep[samples].roll(rolled_heads, 1)
    if documents is None:
        documents = evidence.batch.documents[samples]
    documents = documents.expand(len(samples), -1)
    mixed = attention(
        config or evidence.config, q, k, v, documents, keep, q_shift=q_shift, k_shift=k_shift
    )
    rows = range(len(samples))
    return activation_part(evidence.config, mixed, first.name, first.world_rank, rows).cpu()


def _projections(
    evidence: Evidence, layer: int, samples: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Right q, k and v of some samples."""
    model = evidence.config.model
    qkv = evidence.defined.activations[f"layers.{layer}.attention.qkv"][:, list(samples)]
    d, kv_heads = model.head_dim, model.num_kv_heads
    q, k, v = qkv.split([model.num_attention_heads * d, kv_heads * d, kv_heads * d], -1)
    return q, k, v


def _hidden_dropout(evidence: Evidence, first: Difference) -> Iterator[str]:
    """Hidden states that are a right sum of right values, masked otherwise."""
    drop = evidence.config.model.hidden_dropout
    before = {"input": None, "middle": ("input", "attention.out"), "output": ("middle", "mlp.down")}
    layer, _, what = first.name.rpartition(".")
    if not drop or what not in before:
        return
    names = before[what]
    base: Tensor | float = 0.0
    if names is None:
        if first.name != "layers.0.input":
            return
        added = _part_of(evidence, first, "embedding")
    else:
        base = _part_of(evidence, first, f"{layer}.{names[0]}")
        added = _part_of(evidence, first, f"{layer}.{names[1]}")
    scale = 1 / (1 - drop)
    rest = _seen(evidence, first) - base
    room = 1e-6 * added.abs().max()
    if bool(((rest.abs() <= room) | ((rest - added * scale).abs() <= room)).all()):
        yield (
            f"the dropout mask of {first.name} on this rank is not its own part of the whole mask"
        )


def _part_of(evidence: Evidence, at: Difference, site: str) -> Tensor:
    whole = evidence.defined.activations[site]
    return activation_part(evidence.config, whole, site, at.world_rank, at.samples).cpu()


def _other_losses(evidence: Evidence) -> Iterator[tuple[str, float]]:
    """What the loss would be if it were computed otherwise."""
    logits = evidence.defined.activations["head"]
    batch, model = evidence.batch, evidence.config.model
    padding = model.padded_vocab_size(evidence.config.parallel.tp) - model.vocab_size
    mask = batch.mask.t()

    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        return -logits.log_softmax(-1).gather(-1, labels.t()[..., None])[..., 0]

    def mean(losses: Tensor) -> float:
        return ((losses * mask).sum() / mask.sum()).item()

    right = losses(logits, batch.labels)
    zeros = logits.new_zeros((*logits.shape[:-1], padding))
    yield (
        "the padding of the vocabulary takes part in the softmax",
        mean(losses(torch.cat([logits, zeros], -1), batch.labels)),
    )
    for shift in (1, -1):
        shifted = batch.labels.roll(shift, 1)
        yield "the labels are shifted by one position", mean(losses(logits, shifted))
    yield "labels are the tokens themselves, not the next ones", mean(losses(logits, batch.tokens))

    def mean_of_means(groups: list[list[int]]) -> float:
        means = [(right * mask)[:, g].sum() / mask[:, g].sum() for g in groups]
        return torch.stack(means).mean().item()

    dp = evidence.config.parallel.dp
    yield (
        "a mean of the micro-batches' means is taken, though they hold different numbers of tokens",
        mean_of_means(evidence.micro_batches()),
    )
    yield (
        "a mean of the data ranks' means is taken, though they hold different numbers of tokens",
        mean_of_means([evidence.data_rank_samples(rank) for rank in range(dp)]),
    )
    if evidence.config.data.packing != "stream":
        before_padding = (batch.tokens != ByteTokenizer.eod).t()
        counted = (right * before_padding).sum() / before_padding.sum()
        yield "the padding of packed samples counts in the loss", counted.item()
    yield "tokens that are masked count too", right.mean().item()
    yield "the loss is divided by all tokens, masked ones too", (right * mask).mean().item()
