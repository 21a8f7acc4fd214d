"""Faults planted into the live code: each is a mistake that somebody made, or could make.

A fault is a function that patches the code of the rank it runs on; `FAULTS` says with which flags
it shows, what of it is seen first, and how the verdict has to name it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite import trainer
from megalite.config import Config
from megalite.data import host_batch
from megalite.layers import (
    attention,
    cross_entropy,
    embedding,
    linear,
    norm,
    shard,
    weight_gradients,
)
from megalite.layers.batch import Documents, MicroBatch
from megalite.models import llama
from megalite.optim import copies, flat, gathered, gradients, muon, optimizer, segments
from megalite.optim.buckets import cut
from megalite.parallel import data, pipeline, tensor
from megalite.parallel.group import Pending
from megalite.pipeline import runtime
from megalite.treatment import Treatment

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Fault:
    """A planted fault.

    Attributes:
        plant: patches the code on one rank.
        flags: of a run in which it shows.
        kind, name: of the first difference; the name may be a part of it.
        cause: a part of the sentence that names it.
    """

    plant: Callable[[Patch], None]
    flags: str
    kind: str
    name: str
    cause: str


def norm_gradients_not_reduced(patch: Patch) -> None:
    """Norm weights under sequence parallelism."""
    init = norm.RMSNorm.__init__

    def broken(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.shard = replace(self.shard, pieces=(replace(self.shard.pieces[0], partial=False),))

    patch.setattr(norm.RMSNorm, "__init__", broken)


def tied_twice(patch: Patch) -> None:
    """The pair is summed, and summed again."""
    add = copies.CopySums.sum

    def broken(self: Any) -> None:
        add(self)
        for group, views in self._by_group.items():
            if group.size == 2 and group.process_group is not None and len(views) == 1:
                group.all_reduce(views[0])

    patch.setattr(copies.CopySums, "sum", broken)


def tied_not_at_all(patch: Patch) -> None:
    """Each stage keeps its own half."""
    patch.setattr(copies.CopySums, "sum", lambda self: None)


def mean_of_means(patch: Patch) -> None:
    """Each micro-batch's mean counts alike."""

    def broken(self: Any, micro_batch: MicroBatch, _scale: Tensor) -> Tensor:
        count = self.config.num_micro_batches * self.groups.dp.size
        return micro_batch.mask / (micro_batch.mask.sum() * count).double()

    patch.setattr(trainer.Trainer, "_token_weights", broken)


def padding_in_softmax(patch: Patch) -> None:
    """The padded columns count."""
    right = llama.vocab_parallel_loss_with_grad

    def broken(logits: Tensor, labels: Tensor, weights: Tensor, _vocab: int, tp: Any) -> Any:
        return right(logits, labels, weights, logits.shape[-1] * tp.size, tp)

    patch.setattr(llama, "vocab_parallel_loss_with_grad", broken)


def rope_offset_on_one_rank(patch: Patch) -> None:
    """Queries of tensor rank 1 stand one position later."""
    right = attention.rope_packed
    is_first: list[bool] = []

    core = attention.Attention._core

    def marked(self: Any, *args: Any) -> Tensor:
        is_first[:] = [self.first_head == 0]
        return core(self, *args)

    def broken(qkv: Tensor, cos: Tensor, sin: Tensor, *heads: int, inplace: bool) -> Any:
        q, k, v = right(qkv, cos, sin, *heads)
        if is_first[0]:
            return q, k, v
        longer = torch.arange(1, len(cos) + 1)[:, None, None]
        angle = torch.atan2(sin[1], cos[1])
        later = torch.cos(longer * angle).to(cos), torch.sin(longer * angle).to(sin)
        return right(qkv, *later, *heads)[0], k, v

    patch.setattr(attention.Attention, "_core", marked)
    patch.setattr(attention, "rope_packed", broken)


def attention_across_documents(patch: Patch) -> None:
    """The second stage forgets where documents end."""
    right = attention.causal_attention

    def broken(q: Tensor, k: Tensor, v: Tensor, documents: Any) -> Tensor:
        return right(q, k, v, None)

    forward = llama.LlamaStage.forward

    def marked(self: Any, *args: Any) -> Tensor:
        with pytest.MonkeyPatch.context() as inner:
            if self.spec.stage == 1:
                inner.setattr(attention, "causal_attention", broken)
            return forward(self, *args)

    patch.setattr(llama.LlamaStage, "forward", marked)


def positions_across_documents(patch: Patch) -> None:
    """Positions count on through the sample."""

    def broken(self: Any) -> Tensor:
        return torch.arange(self.starts.shape[1]).expand(self.starts.shape)

    patch.setattr(Documents, "positions", broken)


def documents_of_the_next_sample(patch: Patch) -> None:
    """Each row of a micro-batch gets the ends of another."""
    right = host_batch.document_starts

    def broken(tokens: Any, eod: int) -> Any:
        return right(tokens[..., ::-1, :], eod)

    patch.setattr(host_batch, "document_starts", broken)


def accumulation_scaled(patch: Patch) -> None:
    """The loss is divided by the micro-batches once more."""
    right = trainer.Trainer._weighted_loss

    def broken(self: Any, logits: Tensor, micro_batch: MicroBatch, scale: Tensor) -> Tensor:
        parts = self.config.num_micro_batches
        loss = right(self, logits, micro_batch, scale / parts)
        # What is reported stays right.
        return loss + (parts - 1) * loss.detach()

    patch.setattr(trainer.Trainer, "_weighted_loss", broken)


def layer_dropped(patch: Patch) -> None:
    """A stage of an uneven split builds one layer less."""
    right = llama.LlamaStage.__init__

    def broken(self: Any, config: Any, spec: Any, **kwargs: Any) -> None:
        if spec.stage == 0 and not spec.has_head:
            spec = replace(spec, num_blocks=spec.num_blocks - 2)
        right(self, config, spec, **kwargs)

    patch.setattr(llama.LlamaStage, "__init__", broken)


def label_shift(patch: Patch) -> None:
    """The last stage has the labels of the position before."""
    right = trainer.Trainer._weighted_loss

    def broken(self: Any, logits: Tensor, micro_batch: MicroBatch, scale: Tensor) -> Tensor:
        shift = 0 if self.groups.pp.is_first else 1
        shifted = replace(micro_batch, labels=micro_batch.labels.roll(shift, 1))
        return right(self, logits, shifted, scale)

    patch.setattr(trainer.Trainer, "_weighted_loss", broken)


def padding_counts(patch: Patch) -> None:
    """Only ends of documents are masked, in whose place padding stands."""
    right = host_batch.BatchReader.read

    def broken(self: Any, *args: Any) -> Any:
        batch = right(self, *args)
        mask = batch.tokens[..., :-1] != self._eod
        return replace(batch, mask=mask, counted_tokens=mask.sum().double())

    patch.setattr(host_batch.BatchReader, "read", broken)


def hidden_dropout_equal_on_tensor_ranks(patch: Patch) -> None:
    """Under sequence parallelism all ranks take the mask of the first positions."""
    patch.setattr(tensor.TensorGroup, "first_position", lambda self, length: 0)


def attention_dropout_equal_on_tensor_ranks(patch: Patch) -> None:
    """All ranks take the masks of the first heads."""
    right = attention.attention_keep

    def broken(drop: float, place: Any, site: str, heads: range, *args: Any) -> Tensor:
        return right(drop, place, site, range(len(heads)), *args)

    patch.setattr(attention, "attention_keep", broken)


def norm_counts_copies(patch: Patch) -> None:
    """Norm weights count once on each tensor rank."""
    right = flat.FlatParameters.counted_gradients

    def broken(self: Any) -> list[Tensor]:
        pieces = [
            view
            for slot in self.slots
            if not slot.shard.decays and slot.shard.pieces[0].replica
            for view in cut(self.spans, self.own_gradients, slot.start, slot.stop)
        ]
        return right(self) + pieces

    patch.setattr(flat.FlatParameters, "counted_gradients", broken)


def norm_not_summed_over_stages(patch: Patch) -> None:
    """Each stage clips by its own norm."""
    right = optimizer.Optimizer._squared_norm

    def broken(self: Any) -> Tensor:
        return right(self) if self._groups.pp.is_first else torch.zeros(1, dtype=torch.float64)

    patch.setattr(optimizer.Optimizer, "_squared_norm", broken)


def treated(patch: Patch, change: Callable[[Treatment], Treatment]) -> None:
    """Each tensor otherwise than it should be."""
    right = trainer.treatments
    patch.setattr(trainer, "treatments", lambda c: {n: change(t) for n, t in right(c).items()})


def decay_on_norms(patch: Patch) -> None:
    """Weight decay applies to everything."""
    treated(patch, lambda treatment: replace(treatment, weight_decay=0.1))


def stale_receive_buffer(patch: Patch) -> None:
    """What is received second is what was received first."""
    right = runtime.Executor._take_input

    def broken(self: Any, index: int, step: Any, flight: Any) -> Any:
        taken = right(self, index, step, flight)
        action = step.action
        if taken is not None and action.op is runtime.Op.FORWARD:
            first = flight.__dict__.setdefault("first", {})
            first.setdefault(action.stage, taken.clone())
            taken.copy_(first[action.stage])
        return taken

    patch.setattr(runtime.Executor, "_take_input", broken)


def micro_batches_swapped(patch: Patch) -> None:
    """The first stage reads micro-batch 1 for 0 and 0 for 1; the last one has their labels."""
    right = runtime.Executor.run

    def broken(self: Any, program: Any, batch: Any, head: Any) -> Any:
        if self.pp.is_first and not self.pp.is_last:
            first, second, *others = batch
            batch = [
                replace(first, tokens=second.tokens),
                replace(second, tokens=first.tokens),
                *others,
            ]
        return right(self, program, batch, head)

    patch.setattr(runtime.Executor, "run", broken)


def missing_f(patch: Patch) -> None:
    """The input's gradient of a column-parallel layer is not reduced."""
    right = linear._ColumnParallel.backward

    class Alone:
        def __init__(self, tp: Any):
            self.sequence_parallel = tp.sequence_parallel

        def start_all_reduce(self, x: Tensor) -> Pending:
            return Pending(x)

    def broken(ctx: Any, dy: Tensor) -> Any:
        ctx.tp = Alone(ctx.tp)
        return right(ctx, dy)

    patch.setattr(linear._ColumnParallel, "backward", staticmethod(broken))


def missing_g(patch: Patch) -> None:
    """Row-parallel products are not reduced."""
    right = linear.RowParallelLinear.forward

    def broken(self: Any, x: Tensor) -> Tensor:
        reduce = tensor.TensorGroup.reduce
        tensor.TensorGroup.reduce = lambda tp, x: x  # type: ignore[method-assign]
        try:
            return right(self, x)
        finally:
            tensor.TensorGroup.reduce = reduce  # type: ignore[method-assign]

    patch.setattr(linear.RowParallelLinear, "forward", broken)


def reduced_over_wrong_axis(patch: Patch) -> None:
    """Gradient buckets are summed over the tensor ranks."""
    right = flat.FlatParameters.__init__

    def broken(self: Any, stages: Any, groups: Any, **kwargs: Any) -> None:
        right(self, stages, groups, **kwargs)
        tp = groups.tp
        self._gradients._dp = data.DataGroup(tp.rank, tp.size, tp.process_group)

    patch.setattr(flat.FlatParameters, "__init__", broken)


def not_passed_on(patch: Patch) -> None:
    """What a data rank has updated stays with it."""
    patch.setattr(flat.FlatParameters, "pass_on", lambda self, span: None)


def gathered_of_the_step_before(patch: Patch) -> None:
    """What is whole when the weights change is used again."""
    patch.setattr(gathered.GatheredWeights, "forget", lambda self, number: None)


def norm_of_one_shard(patch: Patch) -> None:
    """Each data rank clips by the norm of what it owns."""
    right = optimizer.Optimizer._squared_norm

    def broken(self: Any) -> Tensor:
        shards = self._groups.dp.shards
        return right(self) * (shards.rank == 0) * shards.size

    patch.setattr(optimizer.Optimizer, "_squared_norm", broken)


def last_bucket_not_collected(patch: Patch) -> None:
    """The sum that comes last is not added to what the rank keeps."""
    right = gradients.ShardedGradients.finish

    def broken(self: Any) -> None:
        last = self._scattering[-1].number
        before = self.parts[last].clone()
        right(self)
        self.parts[last].copy_(before)

    patch.setattr(gradients.ShardedGradients, "finish", broken)


def not_reduced_over_data_ranks(patch: Patch) -> None:
    """Each data rank goes its own way."""
    patch.setattr(data.DataGroup, "start_gradient_sum", lambda self, bucket: Pending(bucket))


def kv_copies_not_summed(patch: Patch) -> None:
    """Key/value heads that tensor ranks share."""
    right = linear._pack_pieces

    def broken(*args: Any) -> Any:
        return tuple(replace(piece, partial=False) for piece in right(*args))

    patch.setattr(linear, "_pack_pieces", broken)


def rate_a_step_late(patch: Patch) -> None:
    """The schedule is read one step late."""
    right = trainer.learning_rate
    patch.setattr(trainer, "learning_rate", lambda train, step: right(train, max(0, step - 1)))


def skipped_step_moves_moments(patch: Patch) -> None:
    """A step that is skipped updates the moments with zero gradients."""
    right = optimizer.Optimizer.clip_and_step

    def broken(self: Any, lr: float, *sums: Tensor) -> Tensor:
        finite = all(part.isfinite().all() for part in self._flat.own_gradients)
        agreed = torch.tensor([0.0 if finite else 1.0], dtype=torch.float64)
        for group in (self._groups.tp, self._groups.dp, self._groups.pp):
            group.all_reduce(agreed, maximum=True)
        result = right(self, lr, *sums)
        if agreed.item():
            for first, second in zip(self.exp_avg, self.exp_avg_sq, strict=True):
                first.mul_(self._train.adam_beta1)
                second.mul_(self._train.adam_beta2)
            self.steps += 1
        return result

    patch.setattr(optimizer.Optimizer, "clip_and_step", broken)


def skipped_step_moves_weights(patch: Patch) -> None:
    """What is not finite counts as zero."""
    right = optimizer.Optimizer._squared_norm

    def broken(self: Any) -> Tensor:
        for part in self._flat.own_gradients:
            part.nan_to_num_(0.0, 0.0, 0.0)
        return right(self)

    patch.setattr(optimizer.Optimizer, "_squared_norm", broken)


def init_depends_on_layout(patch: Patch) -> None:
    """Each tensor rank draws its slice as if it were the first."""
    right = shard.normal_slice

    def broken(key: int, shape: Any, rows: range, columns: range, *args: Any) -> Tensor:
        return right(key, shape, range(len(rows)), range(len(columns)), *args)

    patch.setattr(shard, "normal_slice", broken)


def loss_averaged_over_dp_only(patch: Patch) -> None:
    """The tokens of the first micro-batch stand for those of all."""
    right = trainer.Trainer._global_tokens

    def broken(self: Any, batch: Any) -> Tensor:
        return right(self, batch) / self.config.num_micro_batches

    patch.setattr(trainer.Trainer, "_global_tokens", broken)


def last_micro_batch_not_reduced(patch: Patch) -> None:
    """Buckets are reduced before the last micro-batch's gradients are added."""

    right = gradients.WholeGradients.begin_last

    def broken(self: Any, stage: int, *, deferred: bool) -> None:
        for number in self._only_of(stage):
            self._launch(number)
            self._closing[number].pending.wait()
        right(self, stage, deferred=deferred)

    patch.setattr(gradients.WholeGradients, "begin_last", broken)


def deferred_gradient_forgotten(patch: Patch) -> None:
    """What is computed later leaves out the first micro-batch."""
    right = weight_gradients.WeightGradients.compute

    def broken(self: Any, micro_batch: int) -> Any:
        for parameter, a, b in right(self, micro_batch):
            yield parameter, a * (micro_batch > 0), b

    patch.setattr(weight_gradients.WeightGradients, "compute", broken)


def deferred_gradients_not_reduced(patch: Patch) -> None:
    """Buckets are full before the last weight gradients, that are computed later, have come."""
    right = gradients.WholeGradients.begin_last

    def broken(self: Any, stage: int, *, deferred: bool) -> None:
        right(self, stage, deferred=deferred)
        for number in self._only_of(stage) if deferred else ():
            self._launch(number)
            self._closing[number].pending.wait()

    patch.setattr(gradients.WholeGradients, "begin_last", broken)


def tied_on_one_rank_apart(patch: Patch) -> None:
    """Embedding and head of one rank are tied by their initial values alone."""

    def broken(self: Any, first: Any) -> None:
        for layer in (first.embedding, self.head):
            layer.shard = replace(layer.shard, tied_copy=None)

    patch.setattr(llama.LlamaStage, "share_embedding", broken)


def embedding_not_reduced(patch: Patch) -> None:
    """The vocabulary's parts of the lookup are not added."""
    patch.setattr(embedding.VocabParallelEmbedding, "forward", _lookup_alone)


def _lookup_alone(self: Any, tokens: Tensor) -> Tensor:
    local = tokens.t() - self.first_token
    elsewhere = (local < 0) | (local >= self.weight.shape[0])
    rows = torch.nn.functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
    return rows.masked_fill(elsewhere[..., None], 0.0)


def masked_tokens_count(patch: Patch) -> None:
    """The mask is forgotten in the sum, and in the count."""

    def broken(self: Any, micro_batch: MicroBatch, scale: Tensor) -> Tensor:
        return torch.ones_like(micro_batch.mask) * scale

    right = trainer.Trainer._global_tokens

    def counted(self: Any, batch: Any) -> Tensor:
        tokens = sum(m.mask.numel() for m in batch.micro_batches)
        counted_tokens = torch.full_like(batch.counted_tokens, tokens)
        return right(self, replace(batch, counted_tokens=counted_tokens))

    patch.setattr(trainer.Trainer, "_token_weights", broken)
    patch.setattr(trainer.Trainer, "_global_tokens", counted)


def not_clipped(patch: Patch) -> None:
    """The norm is reported, but nothing is clipped by it."""
    right = optimizer.Optimizer.__init__

    def broken(self: Any, flat: Any, groups: Any, train: Any, *others: Any) -> None:
        right(self, flat, groups, replace(train, clip_grad=0.0), *others)

    patch.setattr(optimizer.Optimizer, "__init__", broken)


def maximum_not_shared(patch: Patch) -> None:
    """The vocabulary-parallel softmax takes each rank's sum for one below the same maximum."""
    right = cross_entropy._combine

    def broken(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts[..., 0] = parts[0, :, 0]
        return right(parts)

    patch.setattr(cross_entropy, "_combine", broken)


def pipeline_gradient_scaled(patch: Patch) -> None:
    """What flows back to the first stage is divided by the stages."""
    right = pipeline.PipelineGroup.start

    def broken(self: Any, message: Any) -> Any:
        if message.is_send and not message.later:
            message.tensor.div_(self.size)
        return right(self, message)

    patch.setattr(pipeline.PipelineGroup, "start", broken)


def dropout_not_scaled(patch: Patch) -> None:
    """What dropout keeps is not scaled up."""
    right = llama.hidden_dropout

    def broken(x: Tensor, drop: float, *args: Any) -> Tensor:
        return right(x, drop, *args) * (1 - drop) if drop else x

    patch.setattr(llama, "hidden_dropout", broken)


def packed_orthogonalised(patch: Patch) -> None:
    """Muon takes a packed parameter for one matrix."""

    def broken(slots: Any) -> Any:
        for matrix in right(slots):
            weight, piece = matrix.slot.parameter, matrix.piece
            if piece.local_start == 0:
                shape = [*weight.shape]
                shape[piece.dim] *= 1 if piece.length == piece.shape[piece.dim] else 2
                whole = replace(piece, shape=tuple(shape), length=weight.shape[piece.dim])
                yield replace(matrix, piece=whole)

    right = muon._matrices
    patch.setattr(muon, "_matrices", broken)


def slices_orthogonalised(patch: Patch) -> None:
    """Muon takes a tensor rank's slice for the whole matrix."""
    init, right = muon.Muon.__init__, muon._matrices

    def alone(self: Any, train: Any, groups: Any, precision: Any) -> None:
        init(self, train, replace(groups, tp=tensor.TensorGroup.solo()), precision)

    def broken(slots: Any) -> Any:
        for matrix in right(slots):
            shape = matrix.piece.of(matrix.slot.parameter).shape
            yield replace(matrix, piece=replace(matrix.piece, shape=tuple(shape), replicas=1))

    patch.setattr(muon.Muon, "__init__", alone)
    patch.setattr(muon, "_matrices", broken)


ALL = "--tp 2 --pp 2 --dp 2"
NAMED = "--lr-scale *.q_proj.*=3 --weight-decay-for *norm*=0.2,*.mlp.*=0"
FROZEN = "--freeze model.embed_tokens.*,model.layers.0.*"
TIED = "--tie-embeddings"
DROPOUT = "--hidden-dropout 0.2 --attention-dropout 0.2"
NORM, Q = "post_attention_layernorm.weight", "q_proj.weight"


def scale_ignored(patch: Patch) -> None:
    treated(patch, lambda treatment: replace(treatment, lr_scale=1.0))


def decay_for_ignored(patch: Patch) -> None:
    plain = trainer.treatments

    def broken(config: Config) -> Any:
        return plain(config.replace(weight_decay_for=()))

    patch.setattr(trainer, "treatments", broken)


def nothing_frozen(patch: Patch) -> None:
    patch.setattr(trainer, "freeze", lambda _stage, _names: None)


def frozen_decays(patch: Patch) -> None:
    """Weights that have no gradient lose a share of themselves."""
    right = trainer.Trainer.update

    def broken(self: Any, *args: Any) -> Tensor:
        for stage in self.stages.values():
            for parameter in stage.parameters():
                if not parameter.requires_grad:
                    parameter.data.mul_(1 - 1e-4)
        return right(self, *args)

    patch.setattr(trainer.Trainer, "update", broken)


def packed_treated_alike(patch: Patch) -> None:
    """As the first of the tensors in one matrix."""
    right = segments._marks

    def broken(slots: Any, *rest: Any) -> Any:
        starts = {slot.start for slot in slots}
        return (mark for mark in right(slots, *rest) if mark.start in starts)

    patch.setattr(segments, "_marks", broken)


FAULTS: dict[str, Fault] = {
    "norm gradients not reduced": Fault(
        norm_gradients_not_reduced, "--tp 2", "gradient", "norm.weight", "norm weights are parts"
    ),
    "tied embedding twice": Fault(
        tied_twice, f"--pp 2 {TIED}", "gradient", "embed_tokens", "counted twice"
    ),
    "tied embedding not at all": Fault(
        tied_not_at_all, f"--pp 2 {TIED}", "gradient", "embed_tokens", "not summed over the first"
    ),
    "mean of means": Fault(mean_of_means, "--dp 2", "loss", "loss", "mean of the micro-batches"),
    "padding in the softmax": Fault(
        padding_in_softmax, "--tp 2", "loss", "loss", "padding of the vocabulary"
    ),
    "RoPE offset": Fault(
        rope_offset_on_one_rank,
        "--tp 2",
        "activation",
        "layers.0.attention.mixed",
        "RoPE turns the queries of this rank as if they were 1 positions later",
    ),
    "attention across documents": Fault(
        attention_across_documents,
        "--pp 2 --reset-attention-mask",
        "activation",
        "layers.2.attention.mixed",
        "attention crosses the ends of documents",
    ),
    "positions across documents": Fault(
        positions_across_documents,
        "--tp 2 --reset-position-ids",
        "activation",
        "layers.0.attention.mixed",
        "positions run on through the ends of documents",
    ),
    "documents of another sample": Fault(
        documents_of_the_next_sample,
        "--dp 2 --micro-batch-size 2 --reset-attention-mask",
        "activation",
        "layers.0.attention.mixed",
        "as if documents ended where they do in other samples",
    ),
    "accumulation scaled": Fault(
        accumulation_scaled, "--pp 2", "gradient", "lm_head", "1 / the number of micro-batches"
    ),
    "layer dropped": Fault(
        layer_dropped, "--pp 2 --pp-layers 3,1", "missing", "model.layers.1.mlp", "on no rank"
    ),
    "label shift": Fault(label_shift, "--pp 2", "loss", "loss", "labels are shifted"),
    "padding counts": Fault(
        padding_counts,
        "--dp 2 --packing best-fit",
        "loss",
        "loss",
        "the padding of packed samples counts in the loss",
    ),
    "hidden dropout alike": Fault(
        hidden_dropout_equal_on_tensor_ranks,
        f"--tp 2 {DROPOUT}",
        "activation",
        "layers.0.input",
        "dropout mask",
    ),
    "attention dropout alike": Fault(
        attention_dropout_equal_on_tensor_ranks,
        f"--tp 2 {DROPOUT}",
        "activation",
        "layers.0.attention.mixed",
        "heads of tensor rank 1 as those of tensor rank 0",
    ),
    "norm counts copies": Fault(
        norm_counts_copies, "--tp 2", "norm", "norm", "counts each copy of a norm weight"
    ),
    "norm of one stage": Fault(
        norm_not_summed_over_stages, "--pp 2", "norm", "norm", "not summed over the pp axis"
    ),
    "decay on norms": Fault(
        decay_on_norms, "--tp 2", "weight", "norm.weight", "decay is applied to norm weights"
    ),
    "not passed on": Fault(
        not_passed_on, "--dp 2", "activation", "embedding", "look at what data ranks shard"
    ),
    "gathered of the step before": Fault(
        gathered_of_the_step_before,
        "--dp 2 --pp 2 --zero 3",
        "activation",
        "layers.2",
        "look at what data ranks shard",
    ),
    "norm of one shard": Fault(
        norm_of_one_shard, "--dp 2 --tp 2", "norm", "", "look at what data ranks shard"
    ),
    "last bucket not collected": Fault(
        last_bucket_not_collected,
        "--dp 2 --zero 2",
        "gradient",
        "",
        "look at what data ranks shard",
    ),
    "stale receive buffer": Fault(
        stale_receive_buffer, "--pp 2", "activation", "layers.2.input", "stale receive buffer"
    ),
    "micro-batches swapped": Fault(
        micro_batches_swapped, "--pp 2", "activation", "embedding", "are swapped"
    ),
    "missing f": Fault(
        missing_f, "--tp 2 --no-sequence-parallel", "gradient", "model.norm", "(f) is missing"
    ),
    "missing g": Fault(
        missing_g, "--tp 2 --no-sequence-parallel", "activation", "attention.out", "(g) is missing"
    ),
    "wrong axis": Fault(
        reduced_over_wrong_axis, "--tp 2 --dp 2", "gradient", "lm_head", "over the tp axis"
    ),
    "not reduced over data ranks": Fault(
        not_reduced_over_data_ranks, ALL, "gradient", "lm_head", "not summed over the data ranks"
    ),
    "kv copies not summed": Fault(
        kv_copies_not_summed,
        "--tp 4 --num-kv-heads 2",
        "gradient",
        "v_proj",
        "key/value heads that several tensor ranks share",
    ),
    "rate a step late": Fault(
        rate_a_step_late, "--tp 2", "weight", "", "learning rate is that of step 0, not of step 1"
    ),
    "skipped step moves moments": Fault(
        skipped_step_moves_moments, ALL, "weight", "", "moved the optimizer's moments"
    ),
    "skipped step moves weights": Fault(
        skipped_step_moves_weights, ALL, "norm", "norm", "not finite does not reach the norm"
    ),
    "init depends on layout": Fault(
        init_depends_on_layout, "--tp 2", "initial weight", "", "depend on the layout"
    ),
    "loss averaged over dp only": Fault(
        loss_averaged_over_dp_only, ALL, "loss", "loss", "the number of micro-batches"
    ),
    "last micro-batch not reduced": Fault(
        last_micro_batch_not_reduced, "--dp 2", "gradient", "lm_head", "the last micro-batch"
    ),
    "deferred gradient forgotten": Fault(
        deferred_gradient_forgotten,
        "--pp 2 --schedule zb-h1",
        "gradient",
        "layers",
        "micro-batch 0 is missing",
    ),
    "deferred gradients not reduced": Fault(
        deferred_gradients_not_reduced,
        "--pp 2 --dp 2 --schedule zb-h1",
        "gradient",
        "",
        "last micro-batch",
    ),
    "tied on one rank, apart": Fault(
        tied_on_one_rank_apart,
        f"--pp 2 --schedule zb-v {TIED}",
        "missing",
        "embed_tokens",
        "counts twice",
    ),
    "lookup not reduced": Fault(
        embedding_not_reduced,
        "--tp 2 --no-sequence-parallel",
        "activation",
        "embedding",
        "(g) is missing",
    ),
    "masked tokens count": Fault(
        masked_tokens_count, "--dp 2", "loss", "loss", "tokens that are masked count too"
    ),
    "not clipped": Fault(not_clipped, "--tp 2", "weight", "", "clipped by another norm"),
    "maximum not shared": Fault(
        maximum_not_shared, "--tp 2", "loss", "loss", "the logits are right, the loss"
    ),
    "pipeline gradient scaled": Fault(
        pipeline_gradient_scaled, "--pp 2", "gradient", "layers.1", "every gradient of stage 0"
    ),
    "scale ignored": Fault(
        scale_ignored, f"--dp 2 {NAMED}", "weight", "q_proj", "--lr-scale is not applied"
    ),
    "decay by name ignored": Fault(
        decay_for_ignored, f"--tp 2 {NAMED}", "weight", "", "--weight-decay-for is not applied"
    ),
    "packed treated alike": Fault(
        packed_treated_alike, f"--dp 2 {NAMED}", "weight", "k_proj", "moves by 3 times"
    ),
    "nothing frozen": Fault(
        nothing_frozen, f"--pp 2 {FROZEN}", "gradient", "layers.0", "--freeze is not applied"
    ),
    "frozen weights decay": Fault(
        frozen_decays, f"--dp 2 {FROZEN}", "weight", "embed_tokens", "--freeze holds move"
    ),
    "packed matrices orthogonalised": Fault(
        packed_orthogonalised,
        "--tp 2 --optimizer muon",
        "weight",
        "_proj",
        "packed matrices are orthogonalised",
    ),
    "slices orthogonalised": Fault(
        slices_orthogonalised,
        "--tp 2 --dp 2 --optimizer muon",
        "weight",
        "_proj",
        "each tensor rank orthogonalises the slice",
    ),
    "dropout not scaled": Fault(
        dropout_not_scaled, f"--tp 2 {DROPOUT}", "activation", "layers.0.input", "0.8 times"
    ),
}
