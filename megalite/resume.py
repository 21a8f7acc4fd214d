"""What a run goes on from, and whether it is still the same run. No torch import.

A run with another layout, precision, micro-batch size or output goes on as it was: all of them see
the same samples in the same order. What shapes the model can't change at all. Anything else would
make it another run without a word, so it has to be named with --allow-change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.checkpoint.directory import Directory
from megalite.checkpoint.manifest import NAME, Manifest, read_manifest
from megalite.config import Config, FieldSpec, fields
from megalite.errors import ConfigError, DamagedError
from megalite.field_values import suggest

FINGERPRINTS = ("data", "tokenizer")
"""What --allow-change may name beside fields: the corpora with their weights, the tokenizer."""

SHAPES = frozenset(
    {
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_kv_heads"),
        *("head_dim", "vocab_size", "tie_embeddings"),
    }
)
"""Of other values no weight fits."""

_FOLLOWING = frozenset(
    {
        *("steps", "lr_decay_steps", "lr_warmup_steps", "lr_wsd_decay_steps", "order_samples"),
        *("reset_position_ids", "eod_mask_loss"),
    }
)
"""Where they are derived they say nothing that others, which are compared, don't."""

SAMPLES = frozenset({"seq_length", "global_batch_size", "rampup_batch_size"})
"""Which samples a step has follows from them."""

_FREE_GROUPS = frozenset({"parallel", "checkpoint", "supervision", "run"})
_FREE = frozenset(
    {
        *("model", "make_vocab_size_divisible_by", "micro_batch_size", "precision", "attention"),
        *("moments_dtype", "grad_reduce_dtype", "recompute", "reverse_micro_batches"),
        *("eval_interval", "eval_steps", "offload_optimizer", "post_validation"),
        "deterministic",
        # What they lead to is compared by fingerprints.
        *("data", "train_data_path", "valid_data_path", "test_data_path", "data_cache_path"),
        *("tokenizer_model", "tokenizer_type", "vocab_file", "merge_file"),
    }
)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that a run may start from; sizes and headers of its files are right.

    Attributes:
        folder: of it.
        manifest: what is in it.
        anew: its weights alone are taken, and the run begins at step 0.
        with_optimizer: the optimizer's states are taken.
    """

    folder: Path
    manifest: Manifest
    anew: bool = False
    with_optimizer: bool = True

    @property
    def step(self) -> int:
        """Steps that count as taken."""
        return 0 if self.anew else self.manifest.step


@dataclass(frozen=True)
class Found:
    """Checkpoints to start from.

    Attributes:
        candidates: the best one first.
        damaged: a sentence for each that is passed over.
    """

    candidates: tuple[Candidate, ...]
    damaged: tuple[str, ...]


def find(config: Config, attempt: int = 0) -> Found:
    """What the run starts from: none if from initial weights.

    Args:
        config: resolved.
        attempt: how often the run has been started again; what --save holds then is its own.

    Raises:
        ConfigError: --load holds nothing, or --no-resume a folder that does hold something.
        DamagedError: there are checkpoints, but none can be used.
    """
    options = config.checkpoint
    if options.save and Directory(Path(options.save)).steps():
        if not options.resume and not attempt:
            raise ConfigError(
                f"--no-resume: --save {options.save} holds checkpoints; choose another folder, or "
                "leave --no-resume out to go on from them"
            )
        return _newest(Path(options.save), config, anew=False, with_optimizer=True)
    if not options.load:
        return Found((), ())
    path = Path(options.load)
    how = {"anew": options.finetune, "with_optimizer": options.load_optim and not options.finetune}
    if (path / NAME).exists():
        return Found((Candidate(path, read_manifest(path), **how),), ())
    if not Directory(path).steps():
        raise ConfigError(f"--load {path} holds no checkpoint: give a folder with step-NNNNNNNN")
    return _newest(path, config, **how)


def problems(config: Config, facts: Mapping[str, Any], candidate: Candidate) -> list[str]:
    """A sentence for everything that forbids to go on from a checkpoint.

    Args:
        config: resolved.
        facts: fingerprints of this run, `data` and `tokenizer`.
        candidate: the checkpoint.
    """
    then = candidate.manifest.facts
    differing = list(_differences(config, then.get("config", {})))
    shapes = [each for each in differing if each[0].name in SHAPES]
    if shapes:
        rows = [f"      {'':<22s}{'checkpoint':>14s}{'now':>14s}"]
        rows += [
            f"      {spec.name:<22s}{_text(old):>14s}{_text(new):>14s}" for spec, old, new in shapes
        ]
        return ["\n".join([f"{candidate.folder} is of another model:", *rows])]
    if candidate.anew:
        return []
    allowed = set(_allowed(config))
    found = []
    for spec, old, new in differing:
        if spec.name in SAMPLES:
            found.append(
                f"{spec.flag} was {_text(old)}, and is {_text(new)}: restore it; with another one "
                "the samples of every step would be others, so only --load DIR --finetune, which "
                "starts a new run from the weights, takes it"
            )
        elif spec.name not in allowed:
            found.append(
                f"{spec.flag} was {_text(old)}, and is {_text(new)}: restore it, or give "
                f"--allow-change {spec.name}"
            )
    for name in FINGERPRINTS:
        old, new = then.get(name), facts.get(name)
        if old is not None and old != new and name not in allowed:
            found.append(
                f"the {name} of {candidate.folder} had the fingerprint {old}, now it is {new}: "
                f"restore it, or give --allow-change {name}"
            )
    return found


def changes(config: Config, candidate: Candidate) -> dict[str, tuple[Any, Any]]:
    """What differs from the checkpoint's run, free or allowed: value then and now by field."""
    saved = candidate.manifest.facts.get("config", {})
    return {spec.name: (old, new) for spec, old, new in _all_differences(config, saved)}


def unknown_changes(config: Config) -> Iterator[str]:
    """A sentence for each name of --allow-change that is none, or that can't be allowed."""
    free = {spec.name for spec in fields() if _is_free(spec)}.difference(FINGERPRINTS)
    known = {spec.name for spec in fields()} - free - SHAPES - SAMPLES | {*FINGERPRINTS}
    for name in _allowed(config):
        if name in free:
            yield f"--allow-change {name}: it may change anyway; leave it out"
        elif name in SHAPES | SAMPLES:
            yield f"--allow-change {name}: no checkpoint fits another one"
        elif name not in known:
            yield f"--allow-change {name}: no such field{suggest(name, known)}"


def _newest(path: Path, config: Config, *, anew: bool, with_optimizer: bool) -> Found:
    """The valid checkpoints of a folder, newest first; without --fallback only the newest."""
    directory = Directory(path)
    candidates, damaged = [], []
    for step, wrong in directory.valid_steps():
        if wrong:
            damaged.append(wrong)
            if not config.checkpoint.fallback:
                break
            continue
        folder = directory.folder(step)
        candidates.append(Candidate(folder, read_manifest(folder), anew, with_optimizer))
        if not config.checkpoint.fallback:
            break
    if not candidates:
        raise DamagedError([f"no checkpoint of {path} can be used", *damaged])
    return Found(tuple(candidates), tuple(damaged))


def _allowed(config: Config) -> Iterator[str]:
    """Names of --allow-change, which may be separated by commas too."""
    for words in config.checkpoint.allow_change:
        yield from filter(None, words.split(","))


def _is_free(spec: FieldSpec) -> bool:
    return spec.group in _FREE_GROUPS or spec.name in _FREE


def _differences(config: Config, saved: Mapping[str, Any]) -> Iterator[tuple[FieldSpec, Any, Any]]:
    """Fields that are not free and have other values: the field, then, now."""
    derived = _FOLLOWING.intersection(saved.get("derived", ())) & config.derived
    for spec, old, new in _all_differences(config, saved):
        if not _is_free(spec) and spec.name not in derived:
            yield spec, old, new


def _all_differences(
    config: Config, saved: Mapping[str, Any]
) -> Iterator[tuple[FieldSpec, Any, Any]]:
    now = config.to_dict()
    for spec in fields():
        group = saved.get(spec.group, {})
        if spec.name in group and group[spec.name] != now[spec.group][spec.name]:
            yield spec, group[spec.name], now[spec.group][spec.name]


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value)) or "none"
    return str(value)
