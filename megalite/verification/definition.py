"""What every layout has to equal: LLaMA, its loss and optimizer in plain torch on whole tensors.

Written for reading, without layers, groups, micro-batches or stages, in fp64: one forward over the
whole global batch, autograd, and the textbook update. It shares with the live code only the
counter-based random numbers, the frequencies of RoPE, the order of the samples and the formula of
the learning rate, which have tests of their own.

Legend: S sequence, B samples of the global batch, H hidden, N query heads, K key/value heads, D
head dim, F ffn, V vocabulary (not padded).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megalite.config import Config
from megalite.data.samples import PADDING, Samples
from megalite.layers.rope import rope_amplitude, rope_frequencies
from megalite.optim.lr import learning_rate
from megalite.parallel.rng import keep_mask, make_key, normal_slice
from megalite.precisions import precisions
from megalite.tokenizer.byte import ByteTokenizer
from megalite.verification.defined_rules import DefinedRules, DefinedSpikes
from megalite.verification.defined_update import DefinedOptimizer, DefinedUpdate, Weights

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

Watch = Callable[[str, Tensor], None]
"""Called with the name and value of each activation, in order; `megalite.verification.sites`."""


@dataclass(frozen=True)
class DefinedBatch:
    """A global batch.

    Attributes:
        tokens, labels: int64 [B, S].
        mask: bool [B, S], True where a label counts.
        documents: int64 [B, S], how many documents have ended before a token.
        step: of the run; None without dropout.
    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    documents: Tensor
    step: int | None

    def only(self, rows: Tensor) -> DefinedBatch:
        """The batch with the losses of all samples masked but of `rows` (bool [B])."""
        return replace(self, mask=self.mask & rows[:, None])


@dataclass(frozen=True)
class DefinedStep:
    """One optimizer step.

    Attributes:
        before: weights before the step.
        loss: mean over the counted tokens of the global batch [nats].
        gradients: of the loss, by name; zero where a weight is frozen.
        norm: of all gradients.
        rates: learning rate by name.
        decays: weight decay by name.
        frozen: names of weights that stay.
        weights: after the step.
        update: what moved them; None if the step was skipped.
        activations: of the whole global batch, by site in forward order, if they were watched.
    """

    before: Weights
    loss: float
    gradients: Weights
    norm: float
    rates: dict[str, float]
    decays: dict[str, float]
    frozen: frozenset[str]
    weights: Weights
    update: DefinedUpdate | None
    activations: dict[str, Tensor]


class Definition:
    """A run, step by step.

    Args:
        config: resolved.
        samples: of the training split.
        device: where to compute.
    """

    def __init__(self, config: Config, samples: Samples, device: torch.device):
        self.config, self.samples, self.device = config, samples, device
        self.weights = {name: w.to(device) for name, w in initial_weights(config).items()}
        self.initial = dict(self.weights)
        self._named = DefinedRules(config, self.weights)
        self._spikes = DefinedSpikes(config)
        self._optimizer = DefinedOptimizer(config.train, self.weights)

    def batch(self, step: int) -> DefinedBatch:
        """The global batch of a step, from the formula of the order."""
        sizes = self.config.batch_sizes
        places = sizes.consumed(step) + np.arange(sizes.size(step))
        numbers = self.samples.order(places)
        rows = torch.tensor(np.stack([self.samples.read(int(n)) for n in numbers]))
        mask = rows[:, 1:] != PADDING
        rows = rows.where(rows != PADDING, ByteTokenizer.eod)
        tokens, labels = rows[:, :-1], rows[:, 1:]
        if self.config.data.eod_mask_loss:
            mask = mask & (tokens != ByteTokenizer.eod)
        ends = (tokens == ByteTokenizer.eod).long()
        documents = ends.cumsum(1) - ends
        tokens, labels, mask, documents = (
            part.to(self.device) for part in (tokens, labels, mask, documents)
        )
        return DefinedBatch(tokens, labels, mask, documents, step)

    def step(
        self, step: int, *, skipped: bool = False, factor: float = 1.0, watch: bool = False
    ) -> DefinedStep:
        """Take optimizer step `step`, 0 first.

        Args:
            step: number.
            skipped: the gradient counts as not finite: nothing moves.
            factor: that gradients are multiplied by.
            watch: keep the activations.
        """
        before, batch = dict(self.weights), self.batch(step)
        activations: dict[str, Tensor] = {}

        def keep(site: str, x: Tensor) -> None:
            activations[site] = x.detach()

        seen = keep if watch else None
        loss, gradients = loss_gradients(self.config, before, batch, batch.mask.sum(), seen)
        gradients = {name: g * factor for name, g in gradients.items()}
        gradients |= {name: torch.zeros_like(before[name]) for name in self._named.frozen}
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        lr = learning_rate(self.config.train, step)
        named = self._named
        rates = {name: lr * scale for name, scale in named.lr_scales.items()}
        update = None
        if not skipped and not self._spikes.stands_out(norm, loss):
            trained = {name: g for name, g in gradients.items() if name not in named.frozen}
            update = self._optimizer.update(before, trained, norm, rates, named.decays)
            self.weights = self.weights | update.weights
        after = dict(self.weights)
        return DefinedStep(
            before,
            loss,
            gradients,
            norm,
            rates,
            named.decays,
            named.frozen,
            after,
            update,
            activations,
        )


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Whole tensors by Hugging Face's names, in the order of the forward."""
    model = config.model
    hidden, ffn, d = model.hidden_size, model.ffn_hidden_size, model.head_dim
    heads, kv_heads = model.num_attention_heads, model.num_kv_heads
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, hidden)}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (heads * d, hidden)
        shapes[f"{prefix}.self_attn.k_proj.weight"] = (kv_heads * d, hidden)
        shapes[f"{prefix}.self_attn.v_proj.weight"] = (kv_heads * d, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, heads * d)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, ffn)
    shapes[FINAL_NORM] = (hidden,)
    if not model.tie_embeddings:
        shapes[HEAD] = (model.vocab_size, hidden)
    return shapes


def initial_weights(config: Config) -> Weights:
    """Normal values of the counter-based stream of (seed, name), rounded to the run's precision;
    ones for norms; projections back into the residual stream scaled by 1 / sqrt(2 x layers)."""
    std = config.model.init_method_std
    dtype = {
        "fp64": torch.float64,
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }
    weights = {}
    for name, shape in weight_shapes(config).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape, dtype=torch.float64)
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = std / math.sqrt(2 * config.model.num_layers) if residual else std
        key, rows, columns = make_key(config.train.seed, name), range(shape[0]), range(shape[1])
        values = normal_slice(key, (shape[0], shape[1]), rows, columns) * scale
        weights[name] = values.to(dtype[precisions(config.train).weights]).double()
    return weights


def loss_gradients(
    config: Config,
    weights: Weights,
    batch: DefinedBatch,
    tokens: Tensor | float,
    watch: Watch | None = None,
) -> tuple[float, Weights]:
    """Sum of the counted losses of a batch over `tokens`, and its gradients."""
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    losses = token_losses(config, leaves, batch, watch)
    loss = (losses * batch.mask).sum() / tokens
    found = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), dict(zip(leaves, found, strict=True))


def token_losses(
    config: Config, weights: Weights, batch: DefinedBatch, watch: Watch | None = None
) -> Tensor:
    """Negative log likelihood of each label, [B, S]."""
    logits = forward(config, weights, batch, watch)
    labels = batch.labels.t()[..., None]
    return -logits.log_softmax(-1).gather(-1, labels)[..., 0].t()


def forward(
    config: Config, weights: Weights, batch: DefinedBatch, watch: Watch | None = None
) -> Tensor:
    """Logits [S, B, V]."""

    def see(name: str, x: Tensor) -> Tensor:
        if watch is not None:
            watch(name, x)
        return x

    model = config.model
    drop = DefinedDropout(config, batch)
    x = see("embedding", weights[EMBEDDING][batch.tokens.t()])
    x = drop.hidden(x, "embedding")
    for layer in range(model.num_layers):
        prefix, site = f"model.layers.{layer}", f"layers.{layer}"

        def w(name: str, prefix: str = prefix) -> Tensor:
            return weights[f"{prefix}.{name}.weight"]

        see(f"{site}.input", x)
        h = see(f"{site}.attention_norm", _norm(x, w("input_layernorm"), model.norm_epsilon))
        q, k, v = (h @ w(f"self_attn.{part}_proj").t() for part in "qkv")
        see(f"{site}.attention.qkv", torch.cat([q, k, v], -1))
        mixed = attention(config, q, k, v, batch.documents, drop.attention(layer))
        see(f"{site}.attention.mixed", mixed)
        h = see(f"{site}.attention.out", mixed @ w("self_attn.o_proj").t())
        x = see(f"{site}.middle", x + drop.hidden(h, f"layer {layer} o"))
        h = see(f"{site}.mlp_norm", _norm(x, w("post_attention_layernorm"), model.norm_epsilon))
        gate, up = h @ w("mlp.gate_proj").t(), h @ w("mlp.up_proj").t()
        see(f"{site}.mlp.gate_up", torch.cat([gate, up], -1))
        h = see(f"{site}.mlp.activated", gate * gate.sigmoid() * up)
        h = see(f"{site}.mlp.down", h @ w("mlp.down_proj").t())
        x = see(f"{site}.output", x + drop.hidden(h, f"layer {layer} down"))
    x = see("norm", _norm(x, weights[FINAL_NORM], model.norm_epsilon))
    return see("head", x @ weights[EMBEDDING if model.tie_embeddings else HEAD].t())


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def attention(
    config: Config,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    keep: Tensor | None = None,
    *,
    q_shift: int = 0,
    k_shift: int = 0,
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V of all heads.

    Args:
        config: of the run.
        q, k, v: [S, B, N D], [S, B, K D], [S, B, K D].
        documents: [B, S], which document each token is in.
        keep: what attention weights are multiplied by, [B, N, S, S]; None without dropout.
        q_shift, k_shift: added to the positions by which queries and keys are turned.

    Returns:
        [S, B, N D].
    """
    model = config.model
    length, batch, _ = q.shape
    sharing = model.num_attention_heads // model.num_kv_heads

    def heads(x: Tensor) -> Tensor:
        """[S, B, n D] -> [B, n, S, D]."""
        return x.view(length, batch, -1, model.head_dim).permute(1, 2, 0, 3)

    positions = torch.arange(length, device=q.device).expand(batch, length)
    same = documents[:, :, None] == documents[:, None, :]
    if config.data.reset_position_ids:
        # As many as there are tokens of the same document before.
        positions = same.tril(-1).sum(-1)
    q = _turn(config, heads(q), positions + q_shift)
    k, v = _turn(config, heads(k), positions + k_shift), heads(v)
    k, v = k.repeat_interleave(sharing, dim=1), v.repeat_interleave(sharing, dim=1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(model.head_dim)
    seen = torch.ones_like(same).tril()
    if config.data.reset_attention_mask:
        seen = seen & same
    shares = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    mixed = (shares if keep is None else shares * keep) @ v
    return mixed.permute(2, 0, 1, 3).reshape(length, batch, -1)


def _turn(config: Config, x: Tensor, positions: Tensor) -> Tensor:
    """RoPE on [B, n, S, D]: the pair (x_i, x_{i + D/2}) as a complex number times e^(i angle);
    `positions` are [B, S]."""
    frequencies = rope_frequencies(config.model).to(x.device)
    angles = positions[:, None, :, None].to(x.dtype) * frequencies
    real, imaginary = x.chunk(2, -1)
    size = rope_amplitude(config.model)
    turned = torch.complex(real, imaginary) * torch.polar(torch.full_like(angles, size), angles)
    return torch.cat([turned.real, turned.imag], -1)


class DefinedDropout:
    """Masks as functions of (seed, step, site, sample, position, feature or head)."""

    def __init__(self, config: Config, batch: DefinedBatch):
        self._config, self._step = config, batch.step
        self._samples = torch.arange(len(batch.tokens), device=batch.tokens.device)

    def hidden(self, x: Tensor, site: str) -> Tensor:
        """Of hidden states [S, B, H]."""
        place = torch.arange(x.shape[0], device=x.device)[:, None] + (self._samples << 24)
        index = place[..., None] * x.shape[-1] + torch.arange(x.shape[-1], device=x.device)
        keep = self._keep(index, self._config.model.hidden_dropout, site)
        return x if keep is None else x * keep

    def attention(self, layer: int) -> Tensor | None:
        """What the attention weights of a layer are multiplied by, [B, N, S, S]."""
        model = self._config.model
        shape = (model.num_attention_heads, model.seq_length, model.seq_length)
        size = math.prod(shape)
        index = torch.arange(size, device=self._samples.device).view(shape)
        index = index + self._samples[:, None, None, None] * size
        return self._keep(index, model.attention_dropout, f"layer {layer} attention")

    def _keep(self, index: Tensor, drop: float, site: str) -> Tensor | None:
        if not drop or self._step is None:
            return None
        key = make_key(self._config.train.seed, self._step, site)
        return keep_mask(key, index, drop).double() / (1 - drop)
