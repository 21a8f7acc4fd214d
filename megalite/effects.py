"""Flags that would have no effect under the other flags. No torch import.

Such a flag is an error: whoever typed it expects something that would not happen. Only a parallel
feature on an axis of one rank is let through, with a note, so that one command line serves every
layout. A value that switches something off (0, `--no-x`) asks for nothing and is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from megalite.config import Config, fields
from megalite.data.source import is_text, token_texts_known, train_ingredients
from megalite.run_plan import num_stages
from megalite.tokenizer.settings import SOMETIMES_READ, read_with


@dataclass(frozen=True)
class Effect:
    """When some fields do something.

    Attributes:
        fields: their names.
        holds: whether they do, under a resolved configuration.
        otherwise: the rest of the sentence `--flag value has no effect ...`.
    """

    fields: tuple[str, ...]
    holds: Callable[[Config], bool]
    otherwise: str


def _is_text(config: Config) -> bool:
    return is_text(config.data)


def _is_cached(config: Config) -> bool:
    data = config.data
    if data.mock_data:
        return False
    indices = data.data_order == "megatron" or data.packing == "best-fit"
    return is_text(data) or indices or len(train_ingredients(data)) > 1


def _read_by(name: str) -> Effect:
    """A setting of some tokenizers."""
    return Effect((name,), lambda c: c.data.reads(name), f"without {read_with(name)}")


_DYNAMIC_SCALE = ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")

_EFFECTS = (
    Effect(
        ("rope_scaling_factor",),
        lambda c: c.model.rope_scaling != "none",
        "without --rope-scaling",
    ),
    Effect(
        ("rope_original_seq_length",),
        lambda c: c.model.rope_scaling in ("llama3", "yarn"),
        "without --rope-scaling llama3 or yarn",
    ),
    Effect(
        ("rope_low_freq_factor", "rope_high_freq_factor"),
        lambda c: c.model.rope_scaling == "llama3",
        "without --rope-scaling llama3",
    ),
    Effect(
        ("rope_yarn_beta_fast", "rope_yarn_beta_slow", "rope_yarn_attention_factor"),
        lambda c: c.model.rope_scaling == "yarn",
        "without --rope-scaling yarn",
    ),
    Effect(
        ("muon_momentum",),
        lambda c: c.train.optimizer == "muon",
        "without --optimizer muon",
    ),
    Effect(
        ("lr_wsd_decay_steps", "lr_wsd_decay_style"),
        lambda c: c.train.lr_decay_style == "WSD",
        "without --lr-decay-style WSD",
    ),
    Effect(
        ("min_lr",),
        lambda c: c.train.lr_decay_style != "constant",
        "with --lr-decay-style constant, which never decays",
    ),
    Effect(
        ("lr_decay_steps",),
        lambda c: (
            c.train.lr_decay_style != "constant"
            or ("lr_warmup_steps" in c.derived and c.train.lr_warmup_fraction > 0)
        ),
        "with --lr-decay-style constant, unless --lr-warmup-fraction is a share of it",
    ),
    Effect(
        ("loss_scale", *_DYNAMIC_SCALE),
        lambda c: c.train.precision == "fp16",
        "without --precision fp16: no other one needs its loss scaled",
    ),
    Effect(
        _DYNAMIC_SCALE,
        lambda c: not c.scaling.loss_scale,
        "with --loss-scale, which never changes",
    ),
    Effect(("spike_window",), lambda c: c.train.skip_spikes > 0, "without --skip-spikes"),
    Effect(
        ("eval_interval",),
        lambda c: c.train.eval_steps > 0,
        "with --eval-steps 0, which validates nothing",
    ),
    Effect(
        ("reverse_micro_batches",),
        lambda c: c.num_micro_batches > 1,
        "with a --global-batch-size of one micro-batch",
    ),
    Effect(
        ("split",),
        lambda c: not c.data.mock_data,
        "with --mock-data, which has no documents to share out",
    ),
    Effect(
        ("split",),
        lambda c: not c.data.train_data_path,
        "with --train-data-path, which is trained on whole",
    ),
    Effect(
        ("valid_data_path",),
        lambda c: bool(c.data.train_data_path),
        "without --train-data-path: a share of --data is held out, of the size of --split",
    ),
    Effect(
        ("valid_data_path",),
        lambda c: c.train.eval_steps > 0,
        "with --eval-steps 0, which validates nothing",
    ),
    Effect(
        ("test_data_path",),
        lambda c: bool(c.data.train_data_path),
        "without --train-data-path: a third share of --split is tested on",
    ),
    Effect(
        ("test_data_path",),
        lambda c: c.train.eval_steps > 0,
        "with --eval-steps 0, which tests nothing",
    ),
    Effect(
        ("data_order",),
        lambda c: not c.data.mock_data,
        "with --mock-data, which is random in any order",
    ),
    Effect(
        ("order_samples",),
        lambda c: c.data.data_order == "megatron",
        "without --data-order megatron: no other order depends on the length of the run",
    ),
    Effect(
        ("data_cache_path",),
        _is_cached,
        "without text, a blend, --packing best-fit or --data-order megatron: nothing else is kept "
        "in a cache",
    ),
    Effect(
        ("packing",),
        lambda c: not c.data.mock_data,
        "with --mock-data, which has no documents to pack",
    ),
    Effect(
        ("fim_spm_rate", "fim_prefix_token", "fim_middle_token", "fim_suffix_token"),
        lambda c: c.data.fim_rate > 0,
        "without --fim-rate",
    ),
    Effect(
        ("sample_length",),
        lambda c: token_texts_known(c.data),
        "without text: of other --data no token has a text that is known here",
    ),
    Effect(
        ("tokenizer_type",),
        lambda c: (
            not c.data.mock_data
            or "vocab_size" in c.derived
            or c.data.tokenizer_type == "NullTokenizer"
        ),
        "with --mock-data and --vocab-size, which leave nothing to ask a tokenizer",
    ),
    Effect(
        ("export_dtype",),
        lambda c: bool(c.checkpoint.export_hf) or c.checkpoint.export_dtype == "auto",
        "without --export-hf",
    ),
    Effect(
        ("zero_shard_size",),
        lambda c: c.parallel.zero != 0 or c.parallel.dp == 1,
        "with --zero 0, which shards nothing",
    ),
    Effect(
        ("save_interval", "keep_last"),
        lambda c: bool(c.checkpoint.save),
        "without --save",
    ),
    Effect(("keep_every",), lambda c: c.checkpoint.keep_last > 0, "without --keep-last"),
    Effect(("finetune",), lambda c: bool(c.checkpoint.load), "without --load"),
    Effect(
        ("allow_change",),
        lambda c: bool(c.checkpoint.save or c.checkpoint.load),
        "without --save or --load: there is nothing to differ from",
    ),
    *map(_read_by, SOMETIMES_READ),
)

_ON_ONE_RANK = (
    Effect(
        ("grad_reduce_dtype",),
        lambda c: c.parallel.dp > 1 or c.train.grad_reduce_dtype == "auto",
        "with dp 1",
    ),
    Effect(("zero", "zero_shard_size"), lambda c: c.parallel.dp > 1, "with dp 1"),
    Effect(("sequence_parallel",), lambda c: c.parallel.tp > 1, "with --tp 1"),
    Effect(("schedule", "pp_layers"), lambda c: num_stages(c) > 1, "with --pp 1"),
    Effect(("post_validation",), lambda c: c.parallel.pp > 1, "with --pp 1"),
    Effect(
        ("distributed_timeout_minutes",),
        lambda c: c.world_size > 1,
        "on one rank, which waits for nobody",
    ),
    Effect(
        ("start_timeout", "step_timeout", "save_timeout"),
        lambda c: c.world_size > 1 or c.supervision.max_restarts > 0,
        "on one rank without --max-restarts: nothing watches it",
    ),
    Effect(("check_replicas",), lambda c: c.parallel.dp > 1, "with dp 1"),
)


def without_effect(config: Config, given: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each flag that does nothing, where that is an error.

    Args:
        config: resolved.
        given: fields set by flags, and what was typed: `--min-lr 0.1`.
    """
    return _sentences(_EFFECTS, config, given, "; leave it out")


def notes(config: Config, given: Mapping[str, str]) -> tuple[str, ...]:
    """A sentence for each parallel feature that was asked for on an axis of one rank, and for what
    is right but seldom meant."""
    return (
        *_sentences(_ON_ONE_RANK, config, given, ""),
        *_unscaled(config),
        *_offloaded(config),
        *_deterministic(config),
    )


def _offloaded(config: Config) -> Iterator[str]:
    if config.train.offload_optimizer and config.parallel.device == "cpu":
        yield "--offload-optimizer has no use on a CPU, whose memory is the host's"


def _deterministic(config: Config) -> Iterator[str]:
    if config.train.deterministic and config.parallel.device == "cpu":
        yield "--deterministic has no use on a CPU, where every run is"


def _unscaled(config: Config) -> Iterator[str]:
    if config.train.precision == "fp16" and config.scaling.loss_scale == 1:
        yield (
            "--loss-scale 1: the loss is not scaled, so gradients below 3e-8 are zero in fp16, and "
            "those below 6e-5 lose digits"
        )


def _sentences(
    effects: tuple[Effect, ...], config: Config, given: Mapping[str, str], advice: str
) -> Iterator[str]:
    groups = {spec.name: spec.group for spec in fields()}
    for effect in effects:
        for name in effect.fields:
            value = getattr(getattr(config, groups[name]), name)
            if name in given and value and not effect.holds(config):
                yield f"{given[name]} has no effect {effect.otherwise}{advice}"
