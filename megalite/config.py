"""The run's configuration: frozen dataclasses, one field per flag.

Every field carries a doc line with its unit; the command line and its help are generated from
these fields (`megalite.cli`), presets are values of them (`megalite.presets`), and the rules
across them live in `megalite.check`. Field names are unique over all groups, so that a flag, a
line of a TOML file and a preset entry all name a field by itself.

`0`, `""`, `()` and `auto` mean "derived": `resolve` replaces them by the value in use and remembers
which they were, so that a saved configuration with one value changed derives the others anew.
No torch import.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from megalite.batch_sizes import BatchSizes
from megalite.config_checkpoint import CheckpointConfig
from megalite.config_data import DataConfig
from megalite.config_model import ModelConfig
from megalite.config_parallel import ParallelConfig
from megalite.config_parameters import ParametersConfig
from megalite.config_scaling import ScalingConfig
from megalite.config_supervision import SupervisionConfig
from megalite.errors import ConfigError
from megalite.option import option
from megalite.tokenizer.byte import ByteTokenizer
from megalite.tokenizer.choose import open_tokenizer


@dataclass(frozen=True)
class TrainConfig:
    """Batch, length, optimizer, precision."""

    micro_batch_size: int = option(4, "Samples of one forward pass.", metavar="SAMPLES")
    global_batch_size: int = option(
        0, "Samples of one optimizer step. 0: micro-batch size x dp.", metavar="SAMPLES"
    )
    rampup_batch_size: tuple[int, ...] = option(
        (),
        "The batch grows from START by INCREMENT at a time over the first SAMPLES samples.",
        metavar="START,INCREMENT,SAMPLES",
    )
    steps: int = option(0, "Optimizer steps. 0: from --tokens or --num-epochs.", metavar="STEPS")
    tokens: int = option(0, "Tokens to train on, in place of --steps.", metavar="TOKENS")
    num_epochs: int = option(
        0, "Passes over the training data, in place of --steps.", metavar="EPOCHS"
    )
    seed: int = option(1234, "Seed of weights, data order and dropout.", metavar="N")
    lr: float = option(3e-4, "Peak learning rate.", metavar="X")
    min_lr: float = option(0.0, "Learning rate at the end of the decay.", metavar="X")
    lr_decay_style: str = option(
        "cosine",
        "Shape of the decay after warm-up.",
        choices=("cosine", "linear", "constant", "WSD"),
    )
    lr_warmup_fraction: float = option(
        0.1, "Share of the decay's steps that is linear warm-up.", metavar="X"
    )
    lr_warmup_steps: int = option(
        -1, "Steps of linear warm-up. -1: from --lr-warmup-fraction.", metavar="STEPS"
    )
    lr_decay_steps: int = option(
        0, "Steps until the minimum is reached. 0: all steps.", metavar="STEPS"
    )
    lr_wsd_decay_steps: int = option(
        0, "WSD: length of the final decay. 0: a tenth of the steps.", metavar="STEPS"
    )
    lr_wsd_decay_style: str = option(
        "exponential",
        "WSD: shape of the final decay.",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
    )
    optimizer: str = option(
        "adamw",
        "muon: matrices of layers move by their momentum, made orthogonal; embedding, head and "
        "norm weights by AdamW.",
        choices=("adamw", "muon"),
    )
    muon_momentum: float = option(0.95, "Muon: decay of the momentum.", metavar="X")
    offload_optimizer: bool = option(
        False,
        "Keep moments, and master weights that are not the weights themselves, in the host's "
        "pinned memory; each is on the GPU while it is updated.",
    )
    weight_decay: float = option(0.1, "Decoupled weight decay; norm weights get none.", metavar="X")
    adam_beta1: float = option(0.9, "AdamW: decay of the first moment.", metavar="X")
    adam_beta2: float = option(0.95, "AdamW: decay of the second moment.", metavar="X")
    adam_eps: float = option(1e-8, "AdamW: added to the root of the second moment.", metavar="X")
    clip_grad: float = option(1.0, "Largest global gradient norm. 0: no clipping.", metavar="X")
    skip_spikes: float = option(
        0.0,
        "Skip a step whose loss or gradient norm is more than Z standard deviations above its mean "
        "over the last --spike-window steps. 0: none.",
        metavar="Z",
    )
    spike_window: int = option(
        128, "--skip-spikes: steps to compare with; the first so many are taken.", metavar="STEPS"
    )
    post_validation: bool = option(
        False,
        "Begin the next step before all pipeline ranks know the gradient norm, as if nothing were "
        "to clip; a step begun wrongly is done again. Keeps a second copy of master weights and "
        "moments, in fp32 master weights of their own too.",
    )
    precision: str = option(
        "auto",
        "Weights and activations. bf16 and fp16 keep fp32 master weights; bf16-pure keeps none and "
        "moments in bf16, and rounds updates up or down by chance. auto: bf16 on GPUs, else fp32.",
        choices=("auto", "bf16", "fp16", "fp32", "fp64", "bf16-pure"),
    )
    moments_dtype: str = option(
        "auto",
        "Precision of AdamW's moments; to bf16 they are rounded up or down by chance, so that they "
        "are right on average. auto: fp32 (bf16 in bf16-pure, fp64 in fp64).",
        choices=("auto", "fp32", "bf16"),
    )
    grad_reduce_dtype: str = option(
        "auto",
        "Precision in which gradients travel between data ranks; each rank adds them up in fp32. "
        "auto: fp32 (fp64 in fp64).",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    attention: str = option(
        "auto",
        "sdpa: torch's fused attention. fused-softmax: matrix products and a softmax kernel, which "
        "keeps the weights, sequence x sequence, as dropout of them does anyway. auto: sdpa.",
        choices=("auto", "sdpa", "fused-softmax"),
    )
    recompute: str = option(
        "none",
        "Activations computed again in backward: the attention core, or whole layers.",
        choices=("none", "selective", "full"),
    )
    deterministic: bool = option(
        False,
        "The same bits in every run on GPUs, by slower kernels where the fast ones add in any "
        "order. On a CPU they always are.",
    )
    reverse_micro_batches: bool = option(
        False, "Run each step's micro-batches in reverse: equal mathematics, other rounding."
    )
    eval_interval: int = option(0, "Steps between validations. 0: at the end.", metavar="STEPS")
    eval_steps: int = option(4, "Global batches of a validation. 0: none.", metavar="BATCHES")


@dataclass(frozen=True)
class RunConfig:
    """What is written and shown."""

    runs: str = option("runs", "Folder of runs.", metavar="DIR")
    name: str = option("", "Name of this run in it. Default: date, model, layout.", metavar="NAME")
    log_interval: int = option(1, "Steps between progress lines.", metavar="STEPS")
    sample_length: int = option(
        120, "Tokens of text generated at the end. 0: none.", metavar="TOKENS"
    )
    save_weights: bool = option(True, "Without --save: write the final weights.")
    tensorboard: bool | None = option(
        None, "Write TensorBoard scalars. Default: if it is installed."
    )
    trace_steps: int = option(
        0,
        "Record when each action of the pipeline ran in so many steps, from step 4 on; "
        "tools/draw_schedule.py --trace draws them. 0: none.",
        metavar="STEPS",
    )


@dataclass(frozen=True)
class Config:
    """One run. Immutable: `replace` returns a changed copy.

    Attributes:
        model, parallel, train, parameters, scaling, data, checkpoint, supervision, run: the groups
            of fields.
        derived: names of the fields whose values were not given but followed from others.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parameters: ParametersConfig = field(default_factory=ParametersConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    run: RunConfig = field(default_factory=RunConfig)
    derived: frozenset[str] = field(default=frozenset(), compare=False)

    def replace(self, **values: Any) -> Config:
        """A copy with the named fields (of whichever group) given these values.

        Raises:
            KeyError: a name that no group has.
        """
        changed: dict[str, dict[str, Any]] = {}
        owners = {spec.name: spec.group for spec in fields()}
        for name, value in values.items():
            changed.setdefault(owners[name], {})[name] = value
        groups = {
            group: dataclasses.replace(getattr(self, group), **part)
            for group, part in changed.items()
        }
        return dataclasses.replace(self, **groups, derived=self.derived - values.keys())

    def derive(self, **values: Any) -> Config:
        """A copy with fields changed by values that follow from others."""
        changed = self.replace(**values)
        new = {
            spec.name
            for spec in fields()
            if spec.name in values
            and getattr(getattr(changed, spec.group), spec.name)
            != getattr(getattr(self, spec.group), spec.name)
        }
        return dataclasses.replace(changed, derived=self.derived | new)

    def given(self) -> Config:
        """A copy in which what was derived is open again."""
        defaults = _defaults()
        opened = self.replace(**{name: defaults[name] for name in self.derived})
        return dataclasses.replace(opened, derived=frozenset())

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by group."""
        groups = {group: dataclasses.asdict(getattr(self, group)) for group in _groups()}
        return json.loads(json.dumps(groups))

    def to_saved(self) -> dict[str, Any]:
        """What `config.json` and TOML files hold: `derived`, then plain values by group.

        A reader leaves the fields that are named there open again. Megatron-LM's order is not: made
        for another number of samples it would be another one from the first sample on.
        """
        opened = self.derived - {"order_samples"}
        order = [spec.name for spec in fields() if spec.name in opened]
        return {"derived": order, **self.to_dict()}

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step on each data rank, after the batch has grown."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.parallel.dp)

    @property
    def batch_sizes(self) -> BatchSizes:
        """Samples of every step over all ranks."""
        return BatchSizes(self.train.global_batch_size, self.train.rampup_batch_size)

    @property
    def num_train_samples(self) -> int:
        """Samples of the whole run."""
        return self.batch_sizes.consumed(self.train.steps)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks, after the batch has grown."""
        return self.train.global_batch_size * self.model.seq_length

    @property
    def world_size(self) -> int:
        """Ranks of the layout."""
        return self.parallel.tp * self.parallel.pp * self.parallel.dp


@dataclass(frozen=True)
class FieldSpec:
    """One field of one group, as the command line sees it."""

    group: str
    name: str
    type: Any
    default: Any
    doc: str
    metavar: str
    choices: tuple[str, ...]

    @property
    def flag(self) -> str:
        """The command-line spelling."""
        return "--" + self.name.replace("_", "-")


def _groups() -> dict[str, Any]:
    """Class of each group, by its name."""
    hints = get_type_hints(Config)
    return {group: cls for group, cls in hints.items() if dataclasses.is_dataclass(cls)}


def fields() -> Iterator[FieldSpec]:
    """All fields of all groups, in the order of the help."""
    for group, cls in _groups().items():
        hints = get_type_hints(cls)
        for item in dataclasses.fields(cls):
            meta = item.metadata
            yield FieldSpec(
                group,
                item.name,
                hints[item.name],
                item.default,
                meta["doc"],
                meta["metavar"],
                meta["choices"],
            )


def _defaults() -> dict[str, Any]:
    return {spec.name: spec.default for spec in fields()}


def resolve(config: Config, world_size: int | None = None) -> Config:
    """Replace derived values by the ones in use, as far as they follow without a device.

    Args:
        config: as parsed; may still break rules, so nothing here may fail on bad values.
        world_size: ranks that a launcher has already started; None if we start them.

    Returns:
        The configuration with dp, ZeRO level, batch, steps, heads, vocabulary and sequence
        parallelism filled in. `device` and `precision` stay `auto` until `resolve_device`.
    """
    model, parallel, train = config.model, config.parallel, config.train
    dp = parallel.dp
    if not dp:
        dp = max(1, (world_size or 1) // max(1, parallel.tp * parallel.pp))
    values: dict[str, Any] = {"dp": dp}
    if parallel.zero == -1:
        values["zero"] = int(dp > 1 and not train.post_validation)
    if not model.num_kv_heads:
        values["num_kv_heads"] = model.num_attention_heads
    heads = model.num_attention_heads
    if not model.head_dim and heads > 0 and model.hidden_size % heads == 0:
        values["head_dim"] = model.hidden_size // heads
    if not model.vocab_size:
        values["vocab_size"] = _tokenizer_size(config.data)
    if parallel.sequence_parallel is None:
        values["sequence_parallel"] = parallel.tp > 1
    data = config.data
    if data.reset_position_ids is None:
        values["reset_position_ids"] = data.reset_attention_mask
    if data.eod_mask_loss is None:
        # Neighbours that were chosen by their lengths say nothing of each other.
        values["eod_mask_loss"] = data.reset_attention_mask or data.packing == "best-fit"
    batch = train.global_batch_size or train.micro_batch_size * dp
    values["global_batch_size"] = batch
    if not train.steps and train.tokens > 0:
        samples = -(-train.tokens // max(1, model.seq_length))
        values["steps"] = BatchSizes(batch, train.rampup_batch_size).steps_for(samples)
    resolved = config.derive(**values)
    if config.data.data_order == "megatron" and not config.data.order_samples:
        resolved = resolved.derive(order_samples=resolved.num_train_samples)
    return resolved.derive(**_learning_rate_steps(resolved.train))


def _tokenizer_size(data: DataConfig) -> int:
    """Vocabulary of the tokenizer; what is wrong with it is told by `megalite.check`."""
    try:
        return open_tokenizer(data).vocab_size
    except ConfigError:
        return ByteTokenizer.vocab_size


def with_steps(config: Config, steps: int) -> Config:
    """A resolved configuration with steps that follow from the data, and what follows from them."""
    following = {"lr_decay_steps", "lr_warmup_steps", "lr_wsd_decay_steps", "order_samples"}
    defaults = _defaults()
    opened = config.derive(steps=steps)
    opened = opened.replace(**{name: defaults[name] for name in following & config.derived})
    return resolve(opened)


def _learning_rate_steps(train: TrainConfig) -> dict[str, int]:
    """Lengths of the parts of the learning-rate schedule that are not given [steps]."""
    decay = train.lr_decay_steps or max(1, train.steps)
    lengths = {"lr_decay_steps": decay}
    if train.lr_warmup_steps == -1:
        share = train.lr_warmup_fraction
        lengths["lr_warmup_steps"] = int(share * decay) if 0 <= share < 1 else 0
    if train.lr_decay_style == "WSD" and not train.lr_wsd_decay_steps:
        lengths["lr_wsd_decay_steps"] = max(1, decay // 10)
    return lengths


def resolve_device(config: Config, device: str) -> Config:
    """Fix `device` ("cpu" or "cuda") and the precision that follows from it."""
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    return config.derive(device=device, precision=precision)
