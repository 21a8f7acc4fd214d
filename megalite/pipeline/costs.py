"""What actions cost: time and memory, in units that the caller chooses. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.pipeline.actions import Action, Op, Order


@dataclass(frozen=True)
class Costs:
    """Of one micro-batch, by stage. Times share one unit, and so do sizes.

    Attributes:
        forward: time of a forward.
        backward: time of a whole backward, with what is computed again in it.
        input_gradient, weight_gradient: times of its two parts where it is split; what is computed
            again belongs to the first.
        message: time from the end of an action to its result being usable on another rank.
        kept: size of what a forward keeps for the backward.
        kept_for_weights: size of what is left of it for the weight gradient alone.
        beside: share of its speed that a rank loses while a message waits on it for its other end.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    input_gradient: tuple[float, ...]
    weight_gradient: tuple[float, ...]
    message: float
    kept: tuple[float, ...]
    kept_for_weights: tuple[float, ...]
    beside: float = 0.0

    @classmethod
    def uniform(
        cls,
        num_stages: int,
        *,
        forward: float = 1.0,
        input_gradient: float = 1.0,
        weight_gradient: float = 1.0,
        message: float = 0.0,
    ) -> Costs:
        """The same for all stages; a size is a micro-batch on one stage until its last gradient."""
        ones = (1.0,) * num_stages
        return cls(
            forward=(forward,) * num_stages,
            backward=(input_gradient + weight_gradient,) * num_stages,
            input_gradient=(input_gradient,) * num_stages,
            weight_gradient=(weight_gradient,) * num_stages,
            message=message,
            kept=ones,
            kept_for_weights=ones,
        )

    def of(self, action: Action) -> float:
        """Time of a computation."""
        match action.op:
            case Op.FORWARD:
                return self.forward[action.stage]
            case Op.BACKWARD:
                return self.backward[action.stage]
            case Op.INPUT_GRADIENT:
                return self.input_gradient[action.stage]
            case Op.WEIGHT_GRADIENT:
                return self.weight_gradient[action.stage]
        raise AssertionError(f"{action} is no computation")

    def growth(self, action: Action) -> float:
        """By how much a computation changes what its rank keeps."""
        kept, left = self.kept[action.stage], self.kept_for_weights[action.stage]
        match action.op:
            case Op.FORWARD:
                return kept
            case Op.BACKWARD:
                return -kept
            case Op.INPUT_GRADIENT:
                return left - kept
            case Op.WEIGHT_GRADIENT:
                return -left
        raise AssertionError(f"{action} is no computation")

    def peak(self, order: Order) -> float:
        """The most that a rank keeps at one time."""
        kept = peak = 0.0
        for action in order:
            kept += self.growth(action)
            peak = max(peak, kept)
        return peak
