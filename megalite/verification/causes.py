"""The likely cause of a difference, in words, where its pattern is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from megalite.run_plan import num_stages
from megalite.verification.compare import Difference
from megalite.verification.evidence import Evidence
from megalite.verification.sites import stage_of
from megalite.verification.suspects_backward import gradient_suspects
from megalite.verification.suspects_forward import activation_suspects, loss_suspects
from megalite.verification.suspects_update import norm_suspects, weight_suspects

SUSPECTS: Mapping[str, Callable[[Evidence, Difference], Iterator[str]]] = MappingProxyType(
    {
        "activation": activation_suspects,
        "loss": loss_suspects,
        "gradient": gradient_suspects,
        "norm": norm_suspects,
        "weight": weight_suspects,
    }
)


def likely_cause(evidence: Evidence) -> str:
    """The first suspect that explains the first difference, or where it comes from.

    Args:
        evidence: with at least one difference.
    """
    first = evidence.wrong[0]
    return next(SUSPECTS[first.kind](evidence, first), "") or _where(evidence, first)


def _where(evidence: Evidence, first: Difference) -> str:
    """What the place of the difference says by itself."""
    if first.kind == "activation":
        return f"what goes into {first.name} is right, what comes out is not"
    if first.kind == "loss":
        return "the logits are right, the loss made of them is not"
    names = evidence.wrong_names(first.kind)
    config = evidence.config
    if first.kind in ("gradient", "weight") and num_stages(config) > 1:
        stages = {
            stage_of(config, d.name, evidence.place(d.world_rank).pp)
            for d in evidence.wrong
            if d.kind == first.kind
        }
        if len(stages) == 1:
            return f"only stage {stages.pop()} differs"
    if first.kind in ("gradient", "weight") and len(names) == 1:
        return f"only {first.name} differs"
    return "no known pattern"
