"""Parameters, memory and arithmetic of a run, from its configuration alone. No torch import.

`tests/unit/test_estimate.py` holds the counts against the modules themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megalite.config import Config
from megalite.models.stage import StageSpec, stage_specs
from megalite.optim.filling import BUCKET_ELEMENTS, fill_buckets
from megalite.pipeline.actions import Op, Order
from megalite.precisions import BYTES, precisions
from megalite.run_plan import run_plan, stage_rank
from megalite.tensor_names import EMBEDDING, FINAL_NORM, HEAD, is_norm, layer_of
from megalite.treatment import frozen_names


@dataclass(frozen=True)
class RankEstimate:
    """Memory of the ranks at one place of the pipeline [bytes unless said].

    Attributes:
        parameters: number of parameters held, padding and copies included.
        weights, gradients, optimizer: as far as this rank keeps them; master weights are the
            optimizer's. Frozen parameters have weights alone.
        activations: kept for backward, at the schedule's peak of micro-batches.
        logits: of one micro-batch, with the loss's temporaries; on the last stage.
        host: optimizer states in the host's memory, of which two buckets' visit the GPU at a time.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    host: int = 0

    @property
    def total(self) -> int:
        """All of it; the allocator's and the libraries' own memory is not in it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def whole_parameters(config: Config) -> int:
    """Parameters of the whole model, without padding and copies."""
    model = config.model
    layer = sum(_block_parameters(config, tp=1))
    tables = 1 if model.tie_embeddings else 2
    return (
        model.num_layers * layer + tables * model.vocab_size * model.hidden_size + model.hidden_size
    )


def stage_parameters(config: Config, spec: StageSpec) -> int:
    """Parameters of a stage on each of its ranks, padding and copies included."""
    model, tp = config.model, config.parallel.tp
    of_block = _block_parameters(config, tp)
    count = sum(of_block[block % 2] for block in spec.blocks)
    if spec.has_embedding:
        count += _table(config)
    if spec.has_head:
        count += model.hidden_size + (0 if _tied_here(config, spec) else _table(config))
    return count


def rank_estimates(config: Config) -> tuple[RankEstimate, ...]:
    """Memory of the ranks at each place of the pipeline, for a precision other than `auto`."""
    plan = run_plan(config)
    return tuple(
        _rank_estimate(config, specs, order)
        for specs, order in zip(_specs_of_ranks(config), plan.ranks, strict=True)
    )


def _specs_of_ranks(config: Config) -> list[list[StageSpec]]:
    """The stages at each place of the pipeline."""
    specs, owners = stage_specs(config), stage_rank(config)
    return [[s for s in specs if owners[s.stage] == rank] for rank in range(config.parallel.pp)]


def rank_parameters(config: Config, specs: Sequence[StageSpec]) -> int:
    """Parameters held by each rank that has these stages, padding and copies included."""
    count = sum(stage_parameters(config, spec) for spec in specs)
    apart = any(s.has_embedding for s in specs) and any(
        s.has_head and not s.has_embedding for s in specs
    )
    if config.model.tie_embeddings and apart:
        count -= _table(config)  # two stages of one rank share it
    return count


def _rank_estimate(config: Config, specs: Sequence[StageSpec], order: Order) -> RankEstimate:
    """Memory of each rank that has these stages and works in this order."""
    train = config.train
    parameters = rank_parameters(config, specs)
    trained = parameters - _frozen(config, specs)
    width = _width(config)
    full = max(4, width)
    tokens = train.micro_batch_size * config.model.seq_length
    logits = 0
    if any(spec.has_head for spec in specs):
        columns = config.model.padded_vocab_size(config.parallel.tp) // config.parallel.tp
        # On GPUs the gradient takes the logits' place. Plain torch, on a CPU, keeps both, and in
        # the loss softmax, its gradient and one temporary.
        each = 2 * width + 3 * full if config.parallel.device == "cpu" else width
        logits = tokens * columns * each
    states, host = _state_bytes(config, specs, trained) // config.parallel.shard_size, 0
    if train.offload_optimizer and trained and config.parallel.device != "cpu":
        largest = max(_bucket_sizes(config, specs), default=0)
        states, host = min(states, 2 * states * largest // trained), _pinned(config, trained)
    return RankEstimate(
        parameters=parameters,
        weights=width * _weights(config, specs, parameters),
        gradients=full * _gradients(config, specs, trained)
        + _travelling_bytes(config, specs, trained),
        optimizer=states,
        activations=tokens * _peak_kept(config, specs, order, width),
        logits=logits,
        host=host,
    )


def _weights(config: Config, specs: Sequence[StageSpec], parameters: int) -> int:
    """Weights that each rank keeps: all, or its shard of what is trained and the two largest
    layers, gathered, beside what is frozen."""
    shards = config.parallel.shard_size
    if config.parallel.zero < 3 or shards == 1:
        return parameters
    frozen = _frozen(config, specs)
    gathered = sum(sorted(_bucket_sizes(config, specs))[-2:])
    return frozen + (parameters - frozen) // shards + gathered


def _gradients(config: Config, specs: Sequence[StageSpec], trained: int) -> int:
    """Gradients that each rank keeps: of all that is trained, or its shard and two buckets to fill
    and to sum."""
    shards = config.parallel.shard_size
    if config.parallel.zero < 2 or shards == 1:
        return trained
    return trained // shards + 2 * max(_bucket_sizes(config, specs), default=0)


def _travelling_bytes(config: Config, specs: Sequence[StageSpec], trained: int) -> int:
    """Copies of gradients that travel between data ranks in another precision than their own."""
    of, parallel = precisions(config.train), config.parallel
    if of.reduction == of.gradients or parallel.dp == 1:
        return 0
    if parallel.zero < 2 or parallel.shard_size == 1:
        return BYTES[of.reduction] * trained
    # Buckets under way, and behind them the shard itself, if there are others of it.
    replicated = trained // parallel.shard_size if parallel.shard_size < parallel.dp else 0
    return BYTES[of.reduction] * max(2 * max(_bucket_sizes(config, specs), default=0), replicated)


def _bucket_sizes(config: Config, specs: Sequence[StageSpec]) -> list[int]:
    """Parameters of each bucket of matrices, as `megalite.optim.buckets` makes them."""
    frozen, by_layer = frozen_names(config), config.parallel.zero >= 3
    held: dict[str, tuple[int, int]] = {}
    for spec in specs:
        for name, size in _named_sizes(config, spec):
            # By name: embedding and head that are tied on one rank are there once.
            held.setdefault(name, (spec.stage, size))
    sizes: list[int] = []
    kinds: list[tuple[object, ...]] = []
    for name, (stage, size) in held.items():
        if not is_norm(name) and name not in frozen:
            layer = layer_of(name)
            of = name if layer is None else layer
            sizes.append(size)
            kinds.append((stage, layer is None, of if by_layer else ""))
    full = sum(sizes) if by_layer else BUCKET_ELEMENTS
    return [sum(sizes[i] for i in bucket) for bucket in fill_buckets(sizes, kinds, full)]


def _frozen(config: Config, specs: Sequence[StageSpec]) -> int:
    """Parameters of these stages that are not trained, on each rank."""
    frozen = frozen_names(config)
    # By name: embedding and head that are tied on one rank are there once.
    held = dict(pair for spec in specs for pair in _named_sizes(config, spec))
    return sum(size for name, size in held.items() if name in frozen)


def _named_sizes(config: Config, spec: StageSpec) -> Iterator[tuple[str, int]]:
    """Parameters of a stage, by the first tensor in each, with their elements on each rank."""
    hidden = config.model.hidden_size
    if spec.has_embedding:
        yield EMBEDDING, _table(config)
    for block in spec.blocks:
        prefix = f"model.layers.{block // 2}"
        norm, packed, out = (
            ("post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj")
            if block % 2
            else ("input_layernorm", "self_attn.q_proj", "self_attn.o_proj")
        )
        sizes = (hidden, *_matrices(config)[block % 2])
        for part, size in zip((norm, packed, out), sizes, strict=True):
            yield f"{prefix}.{part}.weight", size
    if spec.has_head:
        yield FINAL_NORM, hidden
        if not _tied_here(config, spec):
            yield EMBEDDING if config.model.tie_embeddings else HEAD, _table(config)


def _tied_here(config: Config, spec: StageSpec) -> bool:
    """Whether the stage's head is its embedding."""
    return config.model.tie_embeddings and spec.has_embedding


def _state_bytes(config: Config, specs: Sequence[StageSpec], trained: int) -> int:
    """Optimizer's bytes: moments, and master weights of their own if there are."""
    of = precisions(config.train)
    master, moments = BYTES[of.master], 2 * BYTES[of.moments]
    if config.train.post_validation and config.parallel.pp > 1:
        return 2 * (master + moments) * trained  # all of them, and as they were before the step
    states = (moments + (master if of.master != of.weights else 0)) * trained
    if config.train.optimizer == "muon":  # one moment of matrices of layers
        states -= BYTES[of.moments] * _trained_in_layers(config, specs)
    return states


def _pinned(config: Config, trained: int) -> int:
    """Of the host's memory for optimizer states that are offloaded: torch rounds the block of each
    kind up to a power of two."""
    of, owned = precisions(config.train), trained // config.parallel.shard_size
    masters = [of.master] if of.master != of.weights else []
    blocks = [BYTES[kind] * owned for kind in (of.moments, of.moments, *masters)]
    return sum(1 << (block - 1).bit_length() for block in blocks)


def _trained_in_layers(config: Config, specs: Sequence[StageSpec]) -> int:
    """Parameters of the layers' matrices that are not frozen."""
    frozen = frozen_names(config)
    return sum(
        size
        for spec in specs
        for name, size in _named_sizes(config, spec)
        if layer_of(name) is not None and not is_norm(name) and name not in frozen
    )


def fixed_bytes(config: Config) -> list[int]:
    """What the ranks at each place of the pipeline need beside activations."""
    return [_rank_estimate(config, specs, order=()).total for specs in _specs_of_ranks(config)]


def kept_bytes(config: Config, spec: StageSpec) -> int:
    """What a stage keeps of one micro-batch for its backward."""
    tokens = config.train.micro_batch_size * config.model.seq_length
    return tokens * _stage_activation_bytes(config, spec, _width(config))


def kept_for_weights_bytes(config: Config, spec: StageSpec) -> int:
    """What a stage keeps of one micro-batch after the input gradient, for the weight gradient.

    Counted are the two factors of each linear layer of its blocks, the input x and the gradient dy
    of the output, whatever the forward kept or computed again: a column-parallel layer has x
    [S/tp, B, H] with sequence parallelism ([S, B, H] without) and dy [S, B, O/tp], a row-parallel
    one x [S, B, I/tp] and dy [S, B, H], gathered. The head leaves nothing for later.
    """
    tokens = config.train.micro_batch_size * config.model.seq_length
    return tokens * _stage_factor_bytes(config, spec, _width(config))


def flops_per_token(config: Config) -> float:
    """Floating-point operations of forward and backward per trained token: 6 N + 12 L h s - 2 F.

    N: parameters without the input embedding (a tied head counts); F: those of them that stay as
    they are, without a gradient. Attention is counted as a full square, as the field does, which
    flatters a causal model by up to 10%; recomputation is not counted. Source: Narayanan et al.,
    arXiv:2104.04473, and PaLM's appendix B, arXiv:2204.02311.
    """
    model = config.model
    embedding = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    matrices = whole_parameters(config) - embedding
    attention = model.num_attention_heads * model.head_dim
    counted = config.replace(tp=1, make_vocab_size_divisible_by=1)
    whole = StageSpec(0, 0, 2 * model.num_layers, has_embedding=True, has_head=True)
    frozen = _frozen(counted, [whole])
    if EMBEDDING in frozen_names(config):
        frozen -= embedding
    return 6.0 * matrices - 2.0 * frozen + 12.0 * model.num_layers * attention * model.seq_length


def _width(config: Config) -> int:
    """Bytes of a weight or an activation."""
    return BYTES[precisions(config.train).weights]


def _table(config: Config) -> int:
    """Elements of the embedding's matrix, or the head's, on each tensor rank."""
    model, tp = config.model, config.parallel.tp
    return model.padded_vocab_size(tp) // tp * model.hidden_size


def _block_parameters(config: Config, tp: int) -> tuple[int, int]:
    """Parameters of an attention block and of an MLP, norms included, on each of tp ranks."""
    attention, mlp = _matrices(config, tp)
    return sum(attention) + config.model.hidden_size, sum(mlp) + config.model.hidden_size


def _matrices(config: Config, tp: int = 0) -> tuple[tuple[int, int], tuple[int, int]]:
    """Parameters of an attention's packed and output matrix, and of an MLP's, on each of tp ranks
    (0: the run's)."""
    model, tp = config.model, tp or config.parallel.tp
    heads = model.num_attention_heads // tp
    kv_heads = max(1, model.num_kv_heads // tp)
    unit = model.head_dim * model.hidden_size
    of_ffn = model.hidden_size * model.ffn_hidden_size // tp
    return ((heads + 2 * kv_heads) * unit, heads * unit), (2 * of_ffn, of_ffn)


def _stage_activation_bytes(config: Config, spec: StageSpec, width: int) -> int:
    """Bytes kept per token of a micro-batch, by the tensors that autograd saves."""
    parallel = config.parallel
    split = parallel.tp if parallel.sequence_parallel else 1
    hidden = config.model.hidden_size / split
    if config.train.recompute == "full":
        kept = len(spec.parts) * hidden
    else:
        of_block = _block_activations(config, hidden, width)
        kept = sum(of_block[block % 2] for block in spec.blocks)
    if spec.has_head:
        kept += 2 * hidden
    return int(kept * width)


def _block_activations(config: Config, hidden: float, width: int) -> tuple[float, float]:
    """Elements kept per token in an attention block and in an MLP, if they are not recomputed.

    In each, the input of the norm and that of the column-parallel layer are `hidden` elements.
    """
    model, tp = config.model, config.parallel.tp
    heads = model.num_attention_heads / tp * model.head_dim
    kv = max(1, model.num_kv_heads / tp) * model.head_dim
    # Packed q, k, v; what attention adds, and its output in [S, B, H] order.
    attention = 2 * hidden + heads + 2 * kv + heads
    if config.train.recompute == "none":
        attention += _attention_core(config, heads, width)
    # Packed gate and up, and the activation.
    mlp = 2 * hidden + 3 * model.ffn_hidden_size / tp
    return attention, mlp


def _stage_factor_bytes(config: Config, spec: StageSpec, width: int) -> int:
    """Bytes per token of a micro-batch of what weight gradients are the products of."""
    model, parallel = config.model, config.parallel
    tp = parallel.tp
    both_sides = model.hidden_size / (tp if parallel.sequence_parallel else 1) + model.hidden_size
    heads = model.num_attention_heads / tp * model.head_dim
    kv = max(1, model.num_kv_heads / tp) * model.head_dim
    # dy of packed q, k, v, and x of the output's; dy of packed gate and up, and x of down's.
    attention = both_sides + heads + 2 * kv + heads
    mlp = both_sides + 3 * model.ffn_hidden_size / tp
    return int(width * sum((attention, mlp)[block % 2] for block in spec.blocks))


def _attention_core(config: Config, heads: float, width: int) -> float:
    """Elements per token that the core keeps beside q, k and v; `heads`: features of its output."""
    model, drops = config.model, config.model.attention_dropout
    if config.train.attention != "fused-softmax" and not drops:
        return heads  # SDPA's output
    # A row of softmax for each head; with dropout also its mask of a byte, and their product.
    weights = heads / model.head_dim * model.seq_length
    return weights * (2 + 1 / width if drops else 1)


def _peak_kept(config: Config, specs: Sequence[StageSpec], order: Order, width: int) -> int:
    """Most bytes per token of a micro-batch that a rank keeps at one time for its backwards.

    That is between actions: what a backward needs while it runs is not counted.
    """
    growth: dict[tuple[int, Op], int] = {}
    for spec in specs:
        stage, kept = spec.stage, _stage_activation_bytes(config, spec, width)
        left = _stage_factor_bytes(config, spec, width)
        growth[stage, Op.FORWARD], growth[stage, Op.BACKWARD] = kept, -kept
        growth[stage, Op.INPUT_GRADIENT], growth[stage, Op.WEIGHT_GRADIENT] = left - kept, -left
    held = peak = 0
    for action in order:
        held += growth[action.stage, action.op]
        peak = max(peak, held)
    return peak
