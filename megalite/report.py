"""The lines a run opens with: layout, sizes, memory, back ends, data. No torch import."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from megalite.check_sharding import LEVELS
from megalite.config import Config
from megalite.estimate import (
    flops_per_token,
    rank_estimates,
    whole_parameters,
)
from megalite.models.stage import stage_specs
from megalite.parallel.topology import Topology
from megalite.pipeline.costs import Costs
from megalite.pipeline.draw import draw, legend
from megalite.pipeline.picture import planned
from megalite.run_plan import run_plan, stage_rank
from megalite.treatment import treatments, without_rules
from megalite.wording import counted

OPTIMIZERS: Mapping[str, str] = MappingProxyType(
    {"adamw": "AdamW", "muon": "Muon (AdamW for embedding, head and norm weights)"}
)
MOST_RANKS_LISTED = 16
MOST_MICRO_BATCHES_DRAWN = 64
"""Beside four for each stage."""


def opening(
    config: Config,
    *,
    version: str,
    device: str,
    back_ends: Mapping[str, str] | None,
    data: str,
    folder: str,
    notes: Sequence[str] = (),
) -> str:
    """The opening of a run, or of a dry run.

    Args:
        config: resolved; a precision of `auto` is estimated as bf16 and said to be open.
        version: of megalite.
        device: what the ranks run on, and why.
        back_ends: operation to what serves it; None if that is chosen at start.
        data: what the model reads.
        folder: where the run is written.
        notes: sentences about flags.
    """
    model, parallel, train = config.model, config.parallel, config.train
    shape = (
        f"{counted(model.num_layers, 'layer')}, hidden {model.hidden_size}, "
        f"{counted(model.num_attention_heads, 'head')} ({model.num_kv_heads} kv), "
        f"ffn {model.ffn_hidden_size}, vocabulary {model.vocab_size}"
        f" (padded to {model.padded_vocab_size(parallel.tp)})"
    )
    rows = [
        ("model", f"{model.model}: {_si(whole_parameters(config))} parameters; {shape}"),
        ("layout", layout_words(config)),
        ("device", device),
        ("kernels", _kernels(back_ends) if back_ends else "chosen at start"),
        ("batch", _batch(config)),
        (
            "training",
            f"{_length(config)}, "
            f"{OPTIMIZERS[train.optimizer]}, "
            f"lr {train.lr:g} ({train.lr_decay_style}, {train.lr_warmup_steps} warm-up), "
            f"{_precision(config)}, recompute {train.recompute}",
        ),
        *(("by name", text) for text in filter(None, [_by_name(config)])),
        ("arithmetic", f"{_si(flops_per_token(config) * config.tokens_per_step)}FLOP a step"),
        ("data", data),
        ("run", folder),
        *(("note", note) for note in notes),
    ]
    width = max(len(name) for name, _ in rows)
    # A blend has a line for each of its parts.
    below = "\n" + " " * (width + 4)
    lines = [f"megalite {version}"] + [
        f"  {name:<{width}s}  {text.replace(chr(10), below)}" for name, text in rows
    ]
    return "\n".join([*lines, "", rank_table(config)])


def levels(config: Config) -> str:
    """Memory of the rank that needs most under each ZeRO level; nothing to say with one data rank,
    or with `--post-validation` of several pipeline ranks, which shards nothing."""
    parallel = config.parallel
    if parallel.dp == 1 or (config.train.post_validation and parallel.pp > 1):
        return ""
    lines = [
        f"ZeRO over {config.parallel.zero_shard_size or config.parallel.dp} data ranks, memory of "
        "the rank that needs most (* this run):",
        f"  level  {'weights':>9s}  {'gradients':>9s}  {'optimizer':>9s}  {'activations':>11s}  "
        f"{'all':>9s}",
    ]
    for level in LEVELS:
        each = config.replace(zero=level)
        most = max(rank_estimates(_with_precision(each)), key=lambda rank: rank.total)
        mark = "*" if level == config.parallel.zero else " "
        lines.append(
            f"  {mark} {level}    {_gib(most.weights):>9s}  {_gib(most.gradients):>9s}  "
            f"{_gib(most.optimizer):>9s}  {_gib(most.activations + most.logits):>11s}  "
            f"{_gib(most.total):>9s}"
        )
    return "\n".join(lines)


def memory(config: Config, peaks: Sequence[int]) -> str:
    """`memory at its peak: 19.4 GiB (predicted 19.5)`, of each pipeline rank.

    Args:
        config: of a run that has a precision.
        peaks: of the allocator, the most of each pipeline rank's [bytes].
    """
    told = [
        f"{'' if len(peaks) == 1 else f'pp {rank}: '}{peak / 2**30:.2f} GiB "
        f"(predicted {estimate.total / 2**30:.2f})"
        for rank, (peak, estimate) in enumerate(zip(peaks, rank_estimates(config), strict=True))
    ]
    return "memory at its peak: " + ", ".join(told)


def timeline(config: Config) -> str:
    """The pipeline's picture, if forwards take one unit and backwards two."""
    schedule, pp, count = config.parallel.schedule, config.parallel.pp, config.num_micro_batches
    plan = run_plan(config, min(count, 4 * pp + MOST_MICRO_BATCHES_DRAWN))
    shown = plan.num_micro_batches  # all of them, if the plan is a file
    picture = planned(plan, Costs.uniform(plan.num_stages))
    step = picture.timeline
    # Filling and draining the pipeline takes the same time however many micro-batches there are.
    idle, busy = step.bubble() * shown, (1.0 - step.bubble()) * count
    drawn = f"; drawn: {counted(shown, 'micro-batch')}" if shown < count else ""
    return (
        f"pipeline: {schedule}, {counted(count, 'micro-batch')}, "
        f"{100 * idle / (idle + busy):.1f}% idle "
        f"({legend(picture)}{drawn})\n"
        f"{draw(picture)}"
    )


def layout_words(config: Config) -> str:
    """`tp 4 x pp 2 x dp 1 = 8 ranks, sequence parallel, 1f1b`."""
    parallel = config.parallel
    text = f"tp {parallel.tp} x pp {parallel.pp} x dp {parallel.dp} = "
    text += counted(config.world_size, "rank")
    if parallel.sequence_parallel and parallel.tp > 1:
        text += ", sequence parallel"
    if parallel.pp > 1:
        text += f", {parallel.schedule}"
    if parallel.dp > 1:
        text += f", ZeRO {parallel.zero}"
        if parallel.shard_size < parallel.dp and parallel.zero:
            text += f" over {parallel.shard_size}"
    return text


def _kernels(back_ends: Mapping[str, str]) -> str:
    """The operations by what serves them."""
    served: dict[str, list[str]] = {}
    for operation, back_end in back_ends.items():
        served.setdefault(back_end, []).append(operation)
    return "; ".join(
        f"{operations[0]}: {back_end}"
        if len(operations) == 1
        else f"{back_end}: {', '.join(operations)}"
        for back_end, operations in served.items()
    )


def _length(config: Config) -> str:
    train = config.train
    if train.num_epochs and not train.steps:
        return f"{counted(train.num_epochs, 'epoch')} of the data"
    tokens = _si(config.num_train_samples * config.model.seq_length).rstrip()
    return f"{counted(train.steps, 'step')}, {tokens} tokens"


def _batch(config: Config) -> str:
    train = config.train
    return (
        f"{counted(train.global_batch_size, 'sample')} of "
        f"{counted(config.model.seq_length, 'token')} a step{_ramp(config)} = "
        f"{counted(config.num_micro_batches, 'micro-batch')} of {train.micro_batch_size} "
        f"on {counted(config.parallel.dp, 'data rank')}; "
        f"{_si(config.tokens_per_step).rstrip()} tokens"
    )


def _by_name(config: Config) -> str:
    """What is asked of tensors by name, and of how many."""
    given = treatments(config)
    plain = treatments(without_rules(config))
    asked = Counter(
        phrase
        for name, treatment in given.items()
        for phrase, is_asked in (
            ("frozen", treatment.frozen),
            (
                f"lr x {treatment.lr_scale:g}",
                not treatment.frozen and treatment.lr_scale != plain[name].lr_scale,
            ),
            (
                f"weight decay {treatment.weight_decay:g}",
                not treatment.frozen and treatment.weight_decay != plain[name].weight_decay,
            ),
        )
        if is_asked
    )
    return "; ".join(f"{phrase}: {counted(number, 'tensor')}" for phrase, number in asked.items())


def _ramp(config: Config) -> str:
    sizes = config.batch_sizes
    if not sizes.is_ramp:
        return ""
    start, increment, samples = sizes.ramp
    step = sizes.phases[-1].first_step + 1
    over = counted(samples, "sample")
    return f" (from {start} by {increment} over {over}, all from step {step} on)"


def _precision(config: Config) -> str:
    """`bf16, moments in bf16, gradients summed over dp in bf16`."""
    text = _weights(config)
    if config.train.moments_dtype != "auto":
        text += f", moments in {config.train.moments_dtype}"
    if config.train.grad_reduce_dtype != "auto" and config.parallel.dp > 1:
        text += f", gradients summed over dp in {config.train.grad_reduce_dtype}"
    return text


def _weights(config: Config) -> str:
    if config.train.precision == "auto":
        return "bf16 on GPUs, fp32 on a CPU"
    if config.train.precision == "fp16":
        constant, first = config.scaling.loss_scale, config.scaling.initial_loss_scale
        return (
            f"fp16 (loss scale {constant:.10g})"
            if constant
            else f"fp16 (loss scale from {first:.10g})"
        )
    return config.train.precision


def rank_table(config: Config) -> str:
    """Coordinates, blocks, parameters and memory of each rank; of many, of each pipeline rank."""
    rows = list(_rank_rows(config))
    width = max(len(owned) for _, _, owned, _ in rows)
    lines = [f"  {'ranks':>9s}  {'pp dp tp':>12s}  {'owns':<{width}s} parameters  memory per rank"]
    lines += [
        f"  {ranks:>9s}  {place:>12s}  {owned:<{width}s} {detail}"
        for ranks, place, owned, detail in rows
    ]
    if config.train.precision == "auto":
        lines.append(
            "  memory as on GPUs, in bf16; it leaves out what the libraries themselves need"
        )
    return "\n".join(lines)


def _rank_rows(config: Config) -> Iterator[tuple[str, str, str, str]]:
    """Ranks, their coordinates, what they own, parameters and memory."""
    topology = Topology(tp=config.parallel.tp, pp=config.parallel.pp, dp=config.parallel.dp)
    owners, specs = stage_rank(config), stage_specs(config)
    for pp_rank, memory in enumerate(rank_estimates(_with_precision(config))):
        owned = " + ".join(spec.words() for spec in specs if owners[spec.stage] == pp_rank)
        detail = (
            f"{_si(memory.parameters):>10s}  {_gib(memory.total)} "
            f"(weights {_gib(memory.weights)}, gradients {_gib(memory.gradients)}, "
            f"optimizer {_gib(memory.optimizer)}, activations "
            f"{_gib(memory.activations + memory.logits)})"
            + (f", and {_gib(memory.host)} of the host's" if memory.host else "")
        )
        here = [r for r in range(topology.world_size) if topology.coordinates(r).pp == pp_rank]
        if topology.world_size > MOST_RANKS_LISTED:
            yield f"{here[0]}-{here[-1]}", f"{pp_rank} all all", owned, detail
            continue
        for rank in here:
            at = topology.coordinates(rank)
            place = f"{at.pp:>2d} {at.dp:>2d} {at.tp:>2d}"
            yield str(rank), place, owned, detail if rank == here[0] else '         "'


def _with_precision(config: Config) -> Config:
    """The run as it is on a GPU, if it is open where it runs."""
    return config if config.train.precision != "auto" else config.replace(precision="bf16")


def _si(number: float) -> str:
    for limit, suffix in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.0f} "


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**28 else f"{count / 2**20:.3g} MiB"
