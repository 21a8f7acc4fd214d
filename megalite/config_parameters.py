"""The fields that treat some parameters apart, by the names of their tensors. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.option import option


@dataclass(frozen=True)
class ParametersConfig:
    """Rates and decay of some parameters, and which stay, by the names of their tensors."""

    lr_scale: tuple[str, ...] = option(
        (),
        "Tensors whose Hugging Face name matches PATTERN (*, ?, [abc]) learn at X times the "
        "learning rate; the last match counts. As in '*.mlp.*=2,lm_head.*=0.1'.",
        metavar="PATTERN=X,...",
    )
    weight_decay_for: tuple[str, ...] = option(
        (),
        "Weight decay X in place of --weight-decay, or of none, for tensors that match PATTERN.",
        metavar="PATTERN=X,...",
    )
    freeze: tuple[str, ...] = option(
        (),
        "Tensors that match PATTERN stay as they are: no gradient, no optimizer state, no decay. "
        "q, k and v of a layer go together, and so do gate and up.",
        metavar="PATTERN,...",
    )
