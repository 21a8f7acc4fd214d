"""LLaMA, the part of it that one pipeline stage owns, written once for any tensor group.

The whole model is the stage that owns everything. Per layer, with norms before each block:

    x = x + dropout(attention(norm(x)))
    x = x + dropout(mlp(norm(x)))

A stage may begin or end between the two, with either half of a layer.

Legend: S sequence, B micro-batch, H hidden, V vocabulary (padded). Hidden states are [S/tp, B, H]
with sequence parallelism and [S, B, H] without.

Source: Touvron et al., "LLaMA", arXiv:2302.13971; Llama 3, arXiv:2407.21783.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalite.config import Config
from megalite.layers.attention import Attention
from megalite.layers.batch import Documents, DropoutPlace
from megalite.layers.cross_entropy import (
    vocab_parallel_cross_entropy,
    vocab_parallel_loss_with_grad,
)
from megalite.layers.dropout import hidden_dropout
from megalite.layers.embedding import VocabParallelEmbedding
from megalite.layers.linear import ColumnParallelLinear, Output
from megalite.layers.mlp import MLP
from megalite.layers.norm import AddRMSNorm, RMSNorm
from megalite.layers.rope import rope_tables
from megalite.layers.shard import hollow
from megalite.layers.weight_gradients import WeightGradients
from megalite.models.stage import LayerPart, StageSpec
from megalite.parallel.tensor import TensorGroup
from megalite.tensor_names import EMBEDDING, FINAL_NORM, HEAD


class DecoderLayer(nn.Module):
    """One transformer layer, or the half of it that a stage owns.

    Args:
        config: the run.
        part: which layer of the whole model, and which halves.
        tp, weight_gradients, dtype, device: as in `ColumnParallelLinear`.
    """

    def __init__(
        self,
        config: Config,
        part: LayerPart,
        *,
        tp: TensorGroup,
        weight_gradients: WeightGradients | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        model, layer = config.model, part.layer
        self.tp, self.part, self.dropout = tp, part, model.hidden_dropout
        where: dict[str, Any] = {"tp": tp, "dtype": dtype, "device": device}
        prefix = f"model.layers.{layer}"
        if part.has_attention:
            self.attention_norm = RMSNorm(
                model.hidden_size,
                model.norm_epsilon,
                name=f"{prefix}.input_layernorm.weight",
                **where,
            )
            self.attention = Attention(
                model,
                layer,
                recompute_core=config.train.recompute == "selective",
                fused_softmax=config.train.attention == "fused-softmax",
                weight_gradients=weight_gradients,
                **where,
            )
        if part.has_mlp:
            norm = AddRMSNorm if part.has_attention else RMSNorm
            self.mlp_norm = norm(
                model.hidden_size,
                model.norm_epsilon,
                name=f"{prefix}.post_attention_layernorm.weight",
                **where,
            )
            self.mlp = MLP(model, layer, weight_gradients=weight_gradients, **where)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        place: DropoutPlace | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Hidden states through the layer; the other arguments are those of `Attention`."""
        if self.part.has_attention:
            mixed = self.attention(self.attention_norm(x), cos, sin, place, documents)
            mixed = self._drop(mixed, place, "o")
            if not self.part.has_mlp:
                return x + mixed
            normed, x = self.mlp_norm(mixed, x)
        else:
            # Another stage has added the attention's output; the sum was rounded there.
            normed = self.mlp_norm(x)
        return x + self._drop(self.mlp(normed), place, "down")

    def _drop(self, x: Tensor, place: DropoutPlace | None, block: str) -> Tensor:
        first = self.tp.first_position(x.shape[0])
        return hidden_dropout(x, self.dropout, place, f"layer {self.part.layer} {block}", first)


def _hollow_layer(*args: Any, **kwargs: Any) -> nn.Module:
    return hollow(DecoderLayer(*args, **kwargs))


class LlamaStage(nn.Module):
    """The embedding, layers, norm and head that one pipeline stage owns.

    Args:
        config: the run.
        spec: what the stage owns.
        tp, dtype, device: as in `Attention`.
        without_values: parameters have no memory yet, as `hollow` leaves them; no more than a layer
            is allocated at a time.

    Attributes:
        weight_gradients: of its layers, where a schedule computes them later.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: Config,
        spec: StageSpec,
        *,
        tp: TensorGroup,
        dtype: torch.dtype,
        device: torch.device,
        without_values: bool = False,
    ):
        super().__init__()
        model = config.model
        self.config, self.spec, self.tp = config, spec, tp
        self.dtype, self.device = dtype, device
        self.recompute = config.train.recompute == "full"
        self.weight_gradients = WeightGradients()
        where: dict[str, Any] = {"tp": tp, "dtype": dtype, "device": device}
        padded = model.padded_vocab_size(tp.size)
        if spec.has_embedding:
            self.embedding = VocabParallelEmbedding(
                model.vocab_size,
                padded,
                model.hidden_size,
                name=EMBEDDING,
                init_std=model.init_method_std,
                **where,
            )
        layer = _hollow_layer if without_values else DecoderLayer
        self.layers = nn.ModuleList(
            layer(config, part, weight_gradients=self.weight_gradients, **where)
            for part in spec.parts
        )
        if spec.has_head:
            self.norm = RMSNorm(model.hidden_size, model.norm_epsilon, name=FINAL_NORM, **where)
            self.head = ColumnParallelLinear(
                model.hidden_size,
                [
                    Output(
                        EMBEDDING if model.tie_embeddings else HEAD,
                        units=padded,
                        real_units=model.vocab_size,
                    )
                ],
                init_std=model.init_method_std,
                # Never later: that would keep the logits' gradients of several micro-batches.
                **where,
            )
        if model.tie_embeddings:
            self._tie()
        if without_values:
            hollow(self)
        cos, sin = rope_tables(model, model.seq_length, dtype, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def share_embedding(self, first: LlamaStage) -> None:
        """Make the tied head the very parameter of the embedding's stage, on the same rank."""
        shard = replace(first.embedding.shard, tied_copy=None)
        first.embedding.shard = self.head.shard = shard
        self.head.weight = first.embedding.weight

    def _tie(self) -> None:
        """One matrix for embedding and head: one parameter, or a copy on each end's stage."""
        if self.spec.has_embedding and self.spec.has_head:
            self.head.weight = self.embedding.weight
        elif self.spec.has_embedding:
            self.embedding.shard = replace(self.embedding.shard, tied_copy=0)
        elif self.spec.has_head:
            self.head.shard = replace(self.head.shard, tied_copy=1)

    def hidden_shape(self, length: int, batch: int) -> tuple[int, int, int]:
        """Shape of the hidden states between stages for sequences of `length` tokens."""
        local = length // self.tp.size if self.tp.sequence_parallel else length
        return local, batch, self.config.model.hidden_size

    def forward(
        self, x: Tensor, place: DropoutPlace | None = None, documents: Documents | None = None
    ) -> Tensor:
        """The stage's part of the model.

        Args:
            x: token ids, int64 [B, S], on the stage with the embedding; else hidden states.
            place: of the forward pass in the run, for dropout; None in evaluation.
            documents: of the samples; None if the configuration does not ask for their ends.

        Returns:
            Logits [S, B, V/tp] on the stage with the head; else hidden states.
        """
        if self.spec.has_embedding:
            x = self.embedding(x)
            first = self.tp.first_position(x.shape[0])
            x = hidden_dropout(x, self.config.model.hidden_dropout, place, "embedding", first)
        length = x.shape[0] * (self.tp.size if self.tp.sequence_parallel else 1)
        cos, sin = self._angles(length, documents)
        within = documents if self.config.data.reset_attention_mask else None
        for layer in self.layers:
            arguments = (x, cos, sin, place, within)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*arguments)
        if self.spec.has_head:
            x = self.head(self.norm(x))
        return x

    def _angles(self, length: int, documents: Documents | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of each position, [S, 1 or B, D/2]."""
        if documents is None or not self.config.data.reset_position_ids:
            return self.cos[:length, None], self.sin[:length, None]
        positions = documents.positions().t()
        return self.cos[positions], self.sin[positions]

    def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Negative log likelihood of each label.

        Args:
            logits: [S, B, V/tp].
            labels: int64 [B, S].

        Returns:
            [S, B], at least fp32, equal on all tensor ranks.
        """
        vocab_size = self.config.model.vocab_size
        return vocab_parallel_cross_entropy(logits, labels.t(), vocab_size, self.tp)

    def weighted_loss(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Sum of each label's negative log likelihood times its weight.

        The weights are known before the loss, so the gradient is made with it, in the logits'
        place: this function takes them over, and the gradient of its result has to be 1.

        Args:
            logits: [S, B, V/tp].
            labels: int64 [B, S].
            weights: [B, S].

        Returns:
            [], at least fp32, equal on all tensor ranks.
        """
        vocab_size = self.config.model.vocab_size
        total, _ = vocab_parallel_loss_with_grad(
            logits, labels.t(), weights.t(), vocab_size, self.tp
        )
        return total
