"""A user's configuration, made small enough for a laptop, with what can go wrong in it kept.

Kept are all relations that parallel code depends on: the layout; heads and key/value heads against
tp, and how many query heads share one; which ranks hold vocabulary, a part of it or padding alone;
which stages have more layers than the smallest; whether tp divides the sequence; micro-batches
against stages; tied embeddings, dropout, recomputation, schedule, RoPE scaling; what is asked of
tensors by name, of layers that stand for others. No torch import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megalite.config import Config, resolve
from megalite.models.stage import stage_specs
from megalite.run_plan import is_file
from megalite.tensor_names import in_layer, layer_of, tensor_names
from megalite.treatment import Treatment, treatments, without_rules

MOST_RANKS = 16
"""Larger layouts get fewer data replicas: two show what many do."""

STEPS = 4
SKIPPED_STEP = 2
"""The step of a verification in which one rank's gradient is not finite."""

SPIKE_STEP = 4
"""The step with --skip-spikes in which all gradients are `SPIKE` times as large."""

SPIKE = 2.0**20

ADAM_EPS = 1e-3
"""AdamW divides a gradient by its own size: of one near zero, which is all rounding, a small
epsilon makes a step of full size. This one is above them and below the others, near 1e-2."""

LOSS_SCALE = 2.0**12
"""Large and small enough for the gradients of these models in fp16."""

_HEAD_DIM = 8
_HIDDEN = 40
_LEAST_VOCABULARY = 260
"""Room for the byte tokenizer's tokens, of which the end of a document is masked in the loss."""


@dataclass(frozen=True)
class Small:
    """A configuration to verify, and what it lost.

    Attributes:
        config: resolved; valid by `megalite.check`.
        changes: one phrase for each part of the layout that is not the user's own.
    """

    config: Config
    changes: tuple[str, ...]


def shrink(config: Config, most_ranks: int = MOST_RANKS) -> Small:
    """The smallest configuration with the structure of this one.

    Args:
        config: resolved and checked.
        most_ranks: more than these lose data replicas.
    """
    model, parallel, train = config.model, config.parallel, config.train
    tp, pp = parallel.tp, parallel.pp
    changes: list[str] = []
    dp = parallel.dp
    if config.world_size > most_ranks and dp > 2:
        dp = 2
        changes.append(f"dp {parallel.dp} -> 2")
    heads, kv_heads = _heads(model.num_attention_heads, model.num_kv_heads, tp)
    layers = _layers(config)
    vocab_size, multiple = _vocabulary(config)
    micro_batches = config.num_micro_batches
    if not is_file(parallel.schedule):  # a plan in a file is for so many
        micro_batches = _micro_batches(micro_batches, pp)
    # The spike, and one step behind it.
    steps = STEPS + 2 * (train.skip_spikes > 0)
    micro_batch_size = min(2, train.micro_batch_size)
    unit = micro_batch_size * dp
    small = config.given().replace(
        num_layers=round(sum(layers)),
        pp_layers=layers if len(layers) > 1 else (),
        hidden_size=_HIDDEN,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_HEAD_DIM,
        # Odd and even widths per rank stay odd and even.
        ffn_hidden_size=tp * (12 + model.ffn_hidden_size // tp % 2),
        vocab_size=vocab_size,
        make_vocab_size_divisible_by=multiple,
        seq_length=_sequence(model.seq_length, tp),
        # So that low, high and medium frequencies occur among the few there are.
        rope_original_seq_length=64,
        rope_theta=100.0,
        init_method_std=0.1,
        dp=dp,
        micro_batch_size=micro_batch_size,
        global_batch_size=micro_batches * unit,
        rampup_batch_size=_ramp(config, micro_batches, unit),
        steps=steps,
        tokens=0,
        # Comparing takes longer than a step, and what runs here says little of the run itself.
        start_timeout=0.0,
        step_timeout=0.0,
        save_timeout=0.0,
        max_restarts=0,
        check_replicas=0,
        # Warm-up, decay and clipping are all active.
        lr=1e-3,
        min_lr=1e-4,
        lr_warmup_steps=2,
        lr_decay_steps=steps + 1,
        lr_wsd_decay_steps=2 if train.lr_decay_style == "WSD" else 0,
        weight_decay=train.weight_decay or 0.1,
        adam_eps=ADAM_EPS,
        **_named(config, round(sum(layers))),
        # Those before the planted spike that are finite; nothing else stands out so far.
        skip_spikes=100.0 if train.skip_spikes else 0.0,
        spike_window=3,
        # A loss scale that changes does so in every step.
        loss_scale=LOSS_SCALE if config.scaling.loss_scale else 0.0,
        initial_loss_scale=LOSS_SCALE,
        min_loss_scale=1.0,
        loss_scale_window=1,
        hysteresis=1,
        reverse_micro_batches=False,
        num_epochs=0,
        data=(),
        train_data_path=(),
        valid_data_path=(),
        test_data_path=(),
        data_order="epoch",
        order_samples=0,
        mock_data=False,
        tokenizer_type="auto",
        tokenizer_model="",
        vocab_file="",
        merge_file="",
        tiktoken_pattern="",
        eod_mask_loss=True,
        fim_rate=0.0,
        eval_steps=0,
    )
    return Small(resolve(small), tuple(changes))


def _heads(heads: int, kv_heads: int, tp: int) -> tuple[int, int]:
    """Few heads in the relation of many: (query heads, key/value heads)."""
    sharing = heads // kv_heads
    if kv_heads % tp == 0:
        small_kv = tp * min(2, kv_heads // tp)
        return small_kv * min(4, sharing), small_kv
    # Each key/value head is copied on several ranks, which share its query heads.
    copies = tp // kv_heads
    return kv_heads * copies * min(2, sharing // copies), kv_heads


def _layers(config: Config) -> tuple[float, ...]:
    """Layers of each stage: the smallest stage's are few, longer ones have one more.

    A stage that begins or ends inside a layer does so here too.
    """
    counts = [divmod(spec.num_blocks, 2) for spec in stage_specs(config)]
    least = min(whole for whole, _ in counts)
    few = min(least, 2 if len(counts) <= 2 else 1)
    return tuple(few + min(1, whole - least) + (0.5 if half else 0) for whole, half in counts)


def _named(config: Config, num_layers: int) -> dict[str, tuple[str, ...]]:
    """The options that name tensors, for a model of so many layers, name by name."""
    given, plain = treatments(config), treatments(without_rules(config))
    stands_for = _stands_for(given, config.model.num_layers, num_layers)
    scales, decays, frozen = [], [], []
    for name in tensor_names(config.replace(num_layers=num_layers, pp_layers=())):
        layer = layer_of(name)
        theirs = name if layer is None else in_layer(name, stands_for[layer])
        if given[theirs].lr_scale != plain[theirs].lr_scale:
            scales.append(f"{name}={given[theirs].lr_scale}")
        if given[theirs].weight_decay != plain[theirs].weight_decay:
            decays.append(f"{name}={given[theirs].weight_decay}")
        if given[theirs].frozen:
            frozen.append(name)
    return {
        "lr_scale": tuple(scales),
        "weight_decay_for": tuple(decays),
        "freeze": tuple(frozen),
    }


def _stands_for(given: Mapping[str, Treatment], num_layers: int, few: int) -> list[int]:
    """The layer that each of a few stands for: of its share of all layers the first that is
    treated otherwise than the one before it, so that exceptions are among them."""
    by_layer: list[dict[str, Treatment]] = [{} for _ in range(num_layers)]
    for name, treatment in given.items():
        layer = layer_of(name)
        if layer is not None:
            by_layer[layer][in_layer(name, 0)] = treatment
    common = max(by_layer, key=by_layer.count)
    chosen: list[int] = []
    before = common
    for turn in range(few):
        share = range(turn * num_layers // few, (turn + 1) * num_layers // few)
        chosen.append(next((n for n in share if by_layer[n] != before), share[0]))
        before = by_layer[chosen[-1]]
    return chosen


def _vocabulary(config: Config) -> tuple[int, int]:
    """(vocabulary, multiple): the same last rank holds the last token, and as full or not."""
    model, tp = config.model, config.parallel.tp
    rows = model.padded_vocab_size(tp) // tp
    last_rank, on_last = divmod(model.vocab_size - 1, rows)
    is_full = on_last == rows - 1
    small_rows = -(-_LEAST_VOCABULARY // (last_rank + 1)) + 3
    return last_rank * small_rows + (small_rows if is_full else small_rows - 3), small_rows


def _sequence(length: int, tp: int) -> int:
    """A few positions per tensor rank; divisible by tp if the length is."""
    short = tp * max(3, -(-24 // tp))
    return short if length % tp == 0 else short + 1


def _ramp(config: Config, micro_batches: int, unit: int) -> tuple[int, ...]:
    """One micro-batch first, all of them after two steps, if the batch grows."""
    if not config.train.rampup_batch_size or micro_batches == 1:
        return ()
    return (unit, (micro_batches - 1) * unit, 2 * unit)


def _micro_batches(count: int, pp: int) -> int:
    """As many as fill a pipeline, twice at most; fewer than stages stay fewer."""
    return count if count <= 2 * pp else 2 * pp + min(1, count % pp)
