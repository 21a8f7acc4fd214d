"""The rules across the configuration's fields. Every violation is reported at once.

A rule is a small generator over the resolved configuration; it yields one sentence for each
violation: the flag, the value, the rule, the nearest valid choices. Rules run before any process
starts. No torch import.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from math import isfinite
from types import MappingProxyType

from megalite import check_data, check_parameters, check_pipeline, check_precision, check_scaling
from megalite.check_checkpoint import checkpoints
from megalite.check_hf import exported, imported
from megalite.check_memory import memory
from megalite.check_sharding import sharding
from megalite.check_trace import steps_to_trace
from megalite.config import Config, fields, resolve
from megalite.data.source import (
    is_text,
    source_problems,
    token_texts_known,
    train_ingredients,
)
from megalite.effects import without_effect
from megalite.errors import ConfigError
from megalite.near import SEARCHED, near, near_divisors, near_multiples
from megalite.parallel.environment import World
from megalite.tokenizer.choose import open_tokenizer

Violations = Iterator[str]


def check(
    config: Config,
    world: World | None = None,
    problems: Sequence[str] = (),
    unread: Collection[str] = (),
    given: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Check a resolved configuration.

    Args:
        config: after `resolve`.
        world: ranks that a launcher has started, if any.
        problems: what is wrong already, to be reported together with what is found here.
        unread: fields whose values are not what was meant; no rule speaks of them.
        given: fields that flags set, each with the words that did.

    Raises:
        ConfigError: with all violations.
    """
    wrong = dict(_numbers(config))
    silent = {*unread, *wrong}
    # The rules divide by these numbers, so they run with defaults in the place of wrong ones.
    defaults = {spec.name: spec.default for spec in fields() if spec.name in wrong}
    usable = config
    if wrong:
        usable = resolve(config.given().replace(**defaults), world.size if world else None)
    found = [violation for rule in _RULES for violation in rule(usable)]
    if not found and not wrong and not problems:
        # Only of a valid run it is known what it needs.
        found += memory(usable)
    found += _world(usable, world)
    if world and usable.supervision.max_restarts and "max_restarts" in given:
        found.append(
            f"{given['max_restarts']} has no effect under {world.launcher}, which starts the "
            "ranks; leave it out, and have that start them again"
        )
    found += without_effect(usable, {n: typed for n, typed in given.items() if n not in silent})
    names = "|".join(name.replace("_", "-") for name in silent)
    about_them = re.compile(rf"--({names})(?![\w-])")
    found = [v for v in found if not silent or not about_them.search(v)]
    if problems or wrong or found:
        raise ConfigError([*problems, *wrong.values(), *found])


_ABOVE_ZERO = frozenset(
    {"num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "vocab_size"}
    | {"make_vocab_size_divisible_by", "seq_length", "rope_theta", "rope_scaling_factor"}
    | {"rope_original_seq_length", "rope_yarn_beta_fast", "rope_yarn_beta_slow"}
    | {"norm_epsilon", "tp", "pp", "micro_batch_size", "lr"}
    | {"distributed_timeout_minutes", "adam_eps", "log_interval"}
    | {"initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"}
)
_ABOVE_ZERO_IF_GIVEN = frozenset(
    {"num_kv_heads", "head_dim", "dp", "global_batch_size", "rope_yarn_attention_factor"}
    | {"loss_scale"}
)
"""0 asks for the value that follows from others."""

_SHARES = frozenset(
    {"hidden_dropout", "attention_dropout", "adam_beta1", "adam_beta2", "lr_warmup_fraction"}
    | {"muon_momentum"}
)
_RATES = frozenset({"fim_rate", "fim_spm_rate"})

_LARGEST = 2**63
MOST_SPIKE_WINDOW = 100_000
"""Steps whose figures are looked at in every step."""
"""Numbers that no computer word holds begin here."""


def _numbers(config: Config) -> Iterator[tuple[str, str]]:
    """Sign and size of the numbers that were given: (field, sentence)."""
    for name, value in _values(config):
        text = f"--{name.replace('_', '-')} {value}"
        if name in config.derived:
            continue
        if name in _SHARES:
            if not 0 <= value < 1:
                yield name, f"{text} must be at least 0 and below 1"
        elif name in _RATES:
            if not 0 <= value <= 1:
                yield name, f"{text} must be from 0 to 1"
        elif abs(value) >= _LARGEST:
            yield name, f"{text} is too large"
        elif (name in _ABOVE_ZERO and not value > 0) or (
            name in _ABOVE_ZERO_IF_GIVEN and value < 0
        ):
            yield name, f"{text} must be above 0"
        elif name == "lr_warmup_steps" and value == -1:
            continue
        elif name not in _ABOVE_ZERO and not value >= 0:
            yield name, f"{text} must not be negative"


def _values(config: Config) -> Iterator[tuple[str, float]]:
    for group in config.to_dict().values():
        for name, value in group.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield name, value


def _heads(config: Config) -> Violations:
    model, tp = config.model, config.parallel.tp
    heads, kv_heads = model.num_attention_heads, model.num_kv_heads
    if heads % kv_heads:
        yield (
            f"--num-kv-heads {kv_heads} does not divide --num-attention-heads {heads}"
            f"{near_divisors(heads, kv_heads)}"
        )
    if heads % tp:
        yield (
            f"--tp {tp} does not divide --num-attention-heads {heads} "
            f"(each tensor rank owns whole heads){near_divisors(heads, tp)}"
        )
    elif kv_heads % tp and tp % kv_heads:
        choices = [
            n
            for n in range(1, min(heads, SEARCHED) + 1)
            if heads % n == 0 and not (kv_heads % n and n % kv_heads)
        ]
        yield (
            f"--tp {tp} and --num-kv-heads {kv_heads}: one must divide the other (a key/value "
            f"head is whole on a rank, or copied on equally many){near(choices, tp)}"
        )
    if not model.head_dim:
        yield (
            f"--num-attention-heads {heads} does not divide --hidden-size {model.hidden_size}"
            f"{near_divisors(model.hidden_size, heads)}, or give --head-dim"
        )
    elif model.head_dim % 2:
        yield f"--head-dim {model.head_dim} must be even: RoPE turns pairs of features"


def _widths(config: Config) -> Violations:
    model, parallel = config.model, config.parallel
    if model.ffn_hidden_size % parallel.tp:
        yield (
            f"--tp {parallel.tp} does not divide --ffn-hidden-size {model.ffn_hidden_size}"
            f"{near_divisors(model.ffn_hidden_size, parallel.tp)}"
        )
    if parallel.sequence_parallel and model.seq_length % parallel.tp:
        yield (
            f"--seq-length {model.seq_length} is not a multiple of --tp {parallel.tp}, as "
            f"sequence parallelism needs{near_multiples(model.seq_length, parallel.tp)}, or "
            "give --no-sequence-parallel"
        )
    if model.rope_scaling == "llama3" and (
        model.rope_high_freq_factor <= model.rope_low_freq_factor
    ):
        yield (
            f"--rope-high-freq-factor {model.rope_high_freq_factor} must be above "
            f"--rope-low-freq-factor {model.rope_low_freq_factor}"
        )
    if model.rope_scaling == "yarn" and model.rope_theta <= 1:
        yield f"--rope-theta {model.rope_theta} must be above 1 with --rope-scaling yarn"
    if model.rope_scaling == "yarn" and model.rope_yarn_beta_fast <= model.rope_yarn_beta_slow:
        yield (
            f"--rope-yarn-beta-fast {model.rope_yarn_beta_fast} must be above "
            f"--rope-yarn-beta-slow {model.rope_yarn_beta_slow}"
        )


def _batch(config: Config) -> Violations:
    train, dp = config.train, config.parallel.dp
    unit = train.micro_batch_size * dp
    if train.global_batch_size % unit:
        yield (
            f"--global-batch-size {train.global_batch_size} is not a multiple of "
            f"--micro-batch-size {train.micro_batch_size} x dp {dp} = {unit}"
            f"{near_multiples(train.global_batch_size, unit)}"
        )
    yield from _ramp(config, unit)


def _ramp(config: Config, unit: int) -> Violations:
    """Rules of --rampup-batch-size; `unit` is the smallest possible batch."""
    full, ramp = config.train.global_batch_size, config.train.rampup_batch_size
    given = f"--rampup-batch-size {_join(ramp)}"
    if not ramp:
        return
    if len(ramp) != 3 or min(ramp) < 1:
        yield f"{given}: expected START,INCREMENT,SAMPLES, all above 0, as in {unit},{unit},1000"
        return
    start, increment, _ = ramp
    for what, size in (("START", start), ("INCREMENT", increment)):
        if size % unit:
            yield (
                f"{given}: {what} is not a multiple of --micro-batch-size "
                f"{config.train.micro_batch_size} x dp {config.parallel.dp} = {unit}"
                f"{near_multiples(size, unit)}"
            )
    if start >= full or (full - start) % increment:
        yield (
            f"{given} does not lead to --global-batch-size {full}: the batch grows from START by "
            "whole INCREMENTs"
        )


def _length(config: Config) -> Violations:
    train = config.train
    if not train.steps and not train.num_epochs:
        yield "--steps 0 trains nothing: give --steps, --tokens or --num-epochs"
    if train.steps and train.lr_warmup_steps >= train.lr_decay_steps:
        yield (
            f"--lr-warmup-steps {train.lr_warmup_steps} must be below the "
            f"{train.lr_decay_steps} steps of the learning-rate schedule"
        )
    if train.min_lr > train.lr:
        yield f"--min-lr {train.min_lr} is above --lr {train.lr}"
    if train.skip_spikes and train.spike_window < 2:
        yield f"--spike-window {train.spike_window} must be at least 2: one step has no deviation"
    elif train.skip_spikes and train.spike_window > MOST_SPIKE_WINDOW:
        yield f"--spike-window {train.spike_window} is above {MOST_SPIKE_WINDOW:,}"
    elif train.skip_spikes and 0 < train.steps <= train.spike_window:
        yield (
            f"--spike-window {train.spike_window} is not below the {train.steps} steps of the run, "
            "so none would be skipped; give a shorter one, or leave out --skip-spikes"
        )
    after_warm_up = train.lr_decay_steps - train.lr_warmup_steps
    if train.lr_decay_style == "WSD" and 0 < after_warm_up < train.lr_wsd_decay_steps:
        yield (
            f"--lr-wsd-decay-steps {train.lr_wsd_decay_steps} is longer than the "
            f"{after_warm_up} steps after warm-up"
        )


def _data(config: Config) -> Violations:
    data = config.data
    parts = data.split.split(",")
    if not (
        2 <= len(parts) <= 3
        and all(re.fullmatch(r"\d+(\.\d*)?", part.strip()) for part in parts)
        and float(parts[0]) > 0
        and all(isfinite(float(part)) for part in parts)
    ):
        yield (
            f"--split {data.split}: expected two or three shares separated by commas, the first "
            "above 0, as in 95,5 or 969,30,1"
        )
    yield from source_problems(data)
    if data.train_data_path and not data.valid_data_path and config.train.eval_steps:
        yield (
            "--train-data-path leaves nothing to validate on: give --valid-data-path, or "
            "--eval-steps 0"
        )
    if not token_texts_known(data):
        why = (
            "the random tokens of --mock-data have no documents"
            if data.mock_data
            else "which token ends a document of a .bin is not known; give its --tokenizer-type"
        )
        for name in ("reset_attention_mask", "reset_position_ids", "eod_mask_loss"):
            if getattr(data, name) and name not in config.derived:
                yield f"--{name.replace('_', '-')} needs text: {why}"
    if is_text(data) or data.tokenizer_type != "auto":
        yield from _tokenizer(config)


def _tokenizer(config: Config) -> Violations:
    kind, given = config.data.tokenizer, config.model.vocab_size
    try:
        tokenizer = open_tokenizer(config.data, 0 if "vocab_size" in config.derived else given)
    except ConfigError as error:
        about = f"--tokenizer-type {kind}"
        for problem in error.violations:
            yield problem if problem.startswith("--") else f"{about}: {problem}"
        return
    if given < tokenizer.vocab_size:
        yield f"--vocab-size {given} is below the {tokenizer.vocab_size} tokens of {kind}"


def _order(config: Config) -> Violations:
    data, epochs = config.data, config.train.num_epochs
    if data.data_order == "megatron" and data.order_samples < config.num_train_samples:
        yield (
            f"--order-samples {data.order_samples} is below the {config.num_train_samples} samples "
            "of the run: give fewer steps, or --order-samples 0 for an order of this length, which "
            "is another one from its first sample on"
        )
    if epochs and data.mock_data:
        yield f"--num-epochs {epochs}: the random tokens of --mock-data never end; give --steps"
    elif epochs and any(part.weight is not None for part in train_ingredients(data)):
        yield (
            f"--num-epochs {epochs}: datasets with weights end at different times; give --steps or "
            "--tokens, or leave the weights out"
        )


def _waits(config: Config) -> Violations:
    minutes = config.parallel.distributed_timeout_minutes
    longest_s = 60 * minutes
    for name in ("start_timeout", "step_timeout", "save_timeout"):
        limit_s = getattr(config.supervision, name)
        if limit_s > longest_s:
            yield (
                f"--{name.replace('_', '-')} {limit_s:g} is longer than a collective waits, "
                f"{longest_s:g} s: raise --distributed-timeout-minutes {minutes:g} too"
            )


def _run(config: Config) -> Violations:
    name = config.run.name
    if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        yield (
            f"--name {name!r} must be one folder name: letters, digits, '.', '_', '+', '-', "
            "starting with a letter or digit"
        )
    if config.run.tensorboard and find_spec("tensorboard") is None:
        yield "--tensorboard: TensorBoard is not installed; pip install tensorboard"


_RULES: tuple[Callable[[Config], Violations], ...] = (
    _heads,
    _widths,
    check_pipeline.schedule,
    check_pipeline.stages,
    sharding,
    _batch,
    _length,
    check_parameters.rates,
    check_parameters.freezing,
    check_scaling.loss_scale,
    check_precision.precision,
    _data,
    _order,
    check_data.packing,
    check_data.fill_in_the_middle,
    checkpoints,
    _waits,
    steps_to_trace,
    imported,
    exported,
    _run,
)


def _world(config: Config, world: World | None) -> Violations:
    if world is None:
        return
    parallel = config.parallel
    if world.size != config.world_size:
        model_ranks = parallel.tp * parallel.pp
        hint = (
            f"give --dp {world.size // model_ranks} or leave it out"
            if world.size % model_ranks == 0
            else f"--tp x --pp = {model_ranks} must divide {world.size}"
        )
        yield (
            f"{world.launcher} started {world.size} ranks, but --tp {parallel.tp} x "
            f"--pp {parallel.pp} x --dp {parallel.dp} = {config.world_size}: {hint}"
        )


def _join(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
