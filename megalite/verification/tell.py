"""A verdict in words."""

from __future__ import annotations

from collections.abc import Sequence

from megalite.config import Config
from megalite.models.stage import stage_specs
from megalite.parallel.topology import Topology
from megalite.run_plan import num_stages
from megalite.verification.compare import Difference
from megalite.verification.run import Pass, Verdict
from megalite.verification.shrink import SKIPPED_STEP
from megalite.verification.sites import stage_of


def what(config: Config, name: str, changes: Sequence[str], precisions: Sequence[str]) -> str:
    """What is about to run."""
    model, train = config.model, config.train
    split = ",".join(f"{spec.num_layers:g}" for spec in stage_specs(config))
    options = [
        config.parallel.schedule if num_stages(config) > 1 else "",
        "sequence parallel" if config.parallel.sequence_parallel else "",
        "tied embeddings" if model.tie_embeddings else "",
        f"recompute {train.recompute}" if train.recompute != "none" else "",
        "dropout" if model.hidden_dropout or model.attention_dropout else "",
        f"moments in {train.moments_dtype}" if train.moments_dtype != "auto" else "",
    ]
    if train.grad_reduce_dtype != "auto" and config.parallel.dp > 1:
        options.append(f"gradients summed over dp in {train.grad_reduce_dtype}")
    text = (
        f"verify {_layout(config)} on {config.parallel.device}, {name} shrunk to layers {split}, "
        f"{model.num_attention_heads} heads ({model.num_kv_heads} kv), vocabulary "
        f"{model.vocab_size} of {model.padded_vocab_size(config.parallel.tp)}, sequence "
        f"{model.seq_length}, {config.num_micro_batches} micro-batches of {train.micro_batch_size}"
    )
    text += "".join(f", {option}" for option in options if option)
    if changes:
        text += f"; for this machine {', '.join(changes)}"
    return f"{text}; {train.steps} steps in {' and '.join(precisions)}"


def success(verdict: Verdict) -> str:
    """One line with the worst difference beside its bound."""
    compared = sum(run.compared for run in verdict.passes)
    worst: dict[str, Pass] = {}
    for run in verdict.passes:
        precision = run.config.train.precision
        if precision not in worst or run.worst.ratio > worst[precision].worst.ratio:
            worst[precision] = run
    parts = [
        f"{precision}: {run.worst.error:.1e} beside a bound of {run.worst.bound:.1e} "
        f"({_subject(run.config, run.worst)})"
        for precision, run in worst.items()
    ]
    return f"verified: {compared:,} comparisons, worst in {'; in '.join(parts)}"


def failure(run: Pass) -> str:
    """What differs first, where, by how much, and why probably."""
    assert run.failure is not None
    failure, config = run.failure, run.config
    who = "one rank" if config.world_size == 1 else _layout(config)
    lines = [f"FAILED in {config.train.precision}: {who} differs from the definition"]
    if failure.first is None:
        lines.append(f"  on no rank, or not once: {', '.join(failure.missing)}")
    else:
        first = failure.first
        lines.append(f"  first: {_subject(config, first)}")
        place = f" at {list(first.index)}" if first.index else ""
        lines.append(
            f"  it is {first.ours:.17g}{place} instead of {first.theirs:.17g}: off by "
            f"{first.error:.1e}, rounding explains {first.bound:.1e}"
        )
        lines.append(
            f"  of {failure.compared} tensors compared in that step, {failure.different} differ"
        )
    lines.append(f"  likely cause: {failure.cause}")
    return "\n".join(lines)


def _layout(config: Config) -> str:
    layout = config.parallel
    return f"tp {layout.tp} x pp {layout.pp} x dp {layout.dp}"


def _subject(config: Config, difference: Difference) -> str:
    """`gradient of X in step 0 on rank 3 (tp 1, pp 1, dp 0), stage 1, layer 2`."""
    layout = config.parallel
    place = Topology(tp=layout.tp, pp=layout.pp, dp=layout.dp).coordinates(difference.world_rank)
    named = difference.kind not in ("loss", "norm")
    text = f"{difference.kind} of {difference.name}" if named else difference.kind
    if difference.kind == "norm":
        text = "gradient norm"
    text += f" in step {difference.step}" if difference.step >= 0 else ""
    text += " (which has to be skipped)" if difference.step == SKIPPED_STEP else ""
    text += f", samples {list(difference.samples)}" if difference.samples else ""
    if config.world_size > 1:
        text += f", on rank {difference.world_rank} (tp {place.tp}, pp {place.pp}, dp {place.dp})"
    if named:
        text += f", stage {stage_of(config, difference.name, place.pp)}"
        digits = [part for part in difference.name.split(".") if part.isdigit()]
        text += f", layer {digits[0]}" if digits else ""
    return text
