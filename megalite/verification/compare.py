"""One step of all ranks against the definition: what differs, where, by how much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.config import Config
from megalite.parallel.topology import Topology
from megalite.verification.bounds import HALF, coarsest, derive
from megalite.verification.definition import (
    DefinedStep,
    Definition,
    Weights,
    weight_shapes,
)
from megalite.verification.record import Part, RankStep
from megalite.verification.sites import cut


@dataclass(frozen=True)
class Difference:
    """A value beside the one it should be.

    Attributes:
        step: of the run; -1 for the initial weights.
        kind: "initial weight", "activation", "loss", "gradient", "norm" or "weight".
        name: of the tensor or the site.
        world_rank: where.
        samples: of the micro-batch, of an activation.
        ours, theirs: values at the element that is worst against its bound; theirs is right.
        index: of that element in the rank's tensor.
        error: at that element, as the bound is meant.
        bound: the most that rounding explains.
        largest: absolute difference of any element.
    """

    step: int
    kind: str
    name: str
    world_rank: int
    samples: tuple[int, ...]
    ours: float
    theirs: float
    index: tuple[int, ...]
    error: float
    bound: float
    largest: float

    @property
    def ratio(self) -> float:
        """Error over bound; above 1 it is no rounding."""
        return self.error / self.bound if math.isfinite(self.error) else math.inf


class Comparison:
    """Compares the steps of one run, one after the other.

    Args:
        config: of the run.
        definition: at the same step as the run.

    Attributes:
        bounds: of the first step.
        compared: tensors compared so far.
    """

    def __init__(self, config: Config, definition: Definition):
        self._config, self._definition = config, definition
        self.bounds = derive(config)
        self._is_half = coarsest(config) in HALF
        self.compared = 0
        self._topology = Topology(
            tp=config.parallel.tp, pp=config.parallel.pp, dp=config.parallel.dp
        )
        self._update_errors = {n: torch.zeros_like(w) for n, w in definition.initial.items()}

    def initial(self, ranks: Sequence[Sequence[Part]]) -> list[Difference]:
        """Initial weights of all ranks, which are equal bit for bit."""
        tiny = dict.fromkeys(self._definition.initial, torch.finfo(torch.float64).tiny)
        return self._parts(-1, "initial weight", ranks, self._definition.initial, tiny)

    def step(
        self, step: int, ranks: Sequence[RankStep], defined: DefinedStep, *, skipped: bool = False
    ) -> list[Difference]:
        """Everything in a step, in order of execution.

        Args:
            step: number.
            ranks: what each rank of the world saw.
            defined: what is right.
            skipped: a gradient was not finite: norms have to say so, and nothing may move.
        """
        growth = 1 + step
        found = self._activations(step, ranks, defined.activations)
        found += self._scalars(
            step, "loss", [r.loss for r in ranks], defined.loss, growth * self.bounds.loss
        )
        if skipped:
            found += self._not_finite(step, ranks)
        else:
            bounds = self._gradient_bounds(defined.gradients, growth)
            backward = dict(reversed(defined.gradients.items()))
            gradients = [r.gradients for r in ranks]
            found += self._parts(step, "gradient", gradients, backward, bounds)
            norms = [r.norm for r in ranks]
            found += self._scalars(step, "norm", norms, defined.norm, growth * self.bounds.gradient)
        self._grow_update_errors(defined, growth)
        weights = [r.weights for r in ranks]
        found += self._parts(step, "weight", weights, defined.weights, self._weight_bounds(step))
        return found

    def missing(self, ranks: Sequence[Sequence[Part]]) -> list[str]:
        """Whole tensors of which a part is on no rank, or counts more than once."""
        held = dict.fromkeys(weight_shapes(self._config), 0)
        for world_rank, parts in enumerate(ranks):
            if self._topology.coordinates(world_rank).dp:
                continue
            for part in parts:
                if part.counts and part.name in held:
                    held[part.name] += part.value.numel()
        shapes = weight_shapes(self._config)
        return [name for name, count in held.items() if count != math.prod(shapes[name])]

    def _gradient_bounds(self, gradients: Weights, growth: int) -> dict[str, float]:
        """Absolute, for each whole tensor: relative to its largest value."""
        return {
            name: growth * self.bounds.gradient * max(g.abs().max().item(), 1e-30)
            for name, g in gradients.items()
        }

    def _grow_update_errors(self, defined: DefinedStep, growth: int) -> None:
        """AdamW moves a weight by lr m / (sqrt(v) + eps): an error of the gradient moves it by
        twice lr / (sqrt(v) + eps) times that error, through m and through v. Muon amplifies it, and
        as much again that its own products round. Neither moves a weight by more than the step
        itself, twice."""
        if defined.update is None:
            return
        bounds = self._gradient_bounds(defined.gradients, growth)
        for name, scale in defined.update.error_scale.items():
            moved = (2 * scale * bounds[name]).clamp(max=2 * defined.update.largest[name])
            self._update_errors[name] = self._update_errors[name] + moved

    def _weight_bounds(self, step: int) -> dict[str, Tensor]:
        """Absolute, for each element."""
        rounding = 16 * (step + 2) * self.bounds.unit
        return {
            name: errors + rounding * self._definition.weights[name].abs().max()
            for name, errors in self._update_errors.items()
        }

    def _parts(
        self,
        step: int,
        kind: str,
        ranks: Sequence[Sequence[Part]],
        wholes: Weights,
        bounds: Mapping[str, float | Tensor],
    ) -> list[Difference]:
        """Each rank's slices of whole tensors, in the order of the whole tensors."""
        held: dict[str, list[tuple[int, Part]]] = {name: [] for name in wholes}
        for world_rank, parts in enumerate(ranks):
            for part in parts:
                held[part.name].append((world_rank, part))
        found = []
        for name, whole in wholes.items():
            for world_rank, part in held[name]:
                bound = bounds[name]
                limit = part.of(bound) if isinstance(bound, Tensor) else bound
                theirs = part.of(whole)
                found.append(self._tensor(step, kind, name, world_rank, part.value, theirs, limit))
        return found

    def _tensor(
        self,
        step: int,
        kind: str,
        name: str,
        world_rank: int,
        ours: Tensor,
        theirs: Tensor,
        bound: float | Tensor,
        samples: tuple[int, ...] = (),
    ) -> Difference:
        """The worst element of a tensor; in 16 bits, the tensor as a whole."""
        self.compared += 1
        theirs = theirs.cpu()
        bounds = torch.as_tensor(bound, dtype=torch.float64).cpu().expand(ours.shape)
        errors = (ours - theirs).abs()
        ratio = errors / bounds
        flat = int(ratio.nan_to_num(nan=math.inf).argmax()) if ratio.numel() else 0
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), ours.shape))
        error, limit = errors[index].item(), bounds[index].item()
        largest = errors.max().item() if errors.numel() else 0.0
        if self._is_half and kind != "weight":
            # Root mean squares, on the scale of the bound, which is that of the largest value.
            scale = limit / theirs.abs().max().clamp(min=1e-30).item()
            error, limit = errors.norm().item(), scale * max(theirs.norm().item(), 1e-30)
        return Difference(
            step,
            kind,
            name,
            world_rank,
            samples,
            ours[index].item(),
            theirs[index].item(),
            index,
            error,
            limit,
            largest,
        )

    def _scalars(
        self, step: int, kind: str, ours: Sequence[float], theirs: float, bound: float
    ) -> list[Difference]:
        self.compared += len(ours)
        limit = bound * abs(theirs)
        return [
            Difference(step, kind, kind, rank, (), value, theirs, (), error, limit, error)
            for rank, value in enumerate(ours)
            for error in (abs(value - theirs),)
        ]

    def _not_finite(self, step: int, ranks: Sequence[RankStep]) -> list[Difference]:
        """Ranks that did not notice that a gradient is not finite."""
        nan = math.nan
        return [
            Difference(step, "norm", "norm", rank, (), seen.norm, nan, (), math.inf, 1.0, math.inf)
            for rank, seen in enumerate(ranks)
            if math.isfinite(seen.norm)
        ]

    def _activations(
        self, step: int, ranks: Sequence[RankStep], wholes: Mapping[str, Tensor]
    ) -> list[Difference]:
        """Each watched activation, micro-batch by micro-batch, in order of the forward."""
        order = {site: place for place, site in enumerate(wholes)}
        seen = [
            (samples, order[site], site, world_rank, value)
            for world_rank, rank in enumerate(ranks)
            for (site, samples), value in rank.activations.items()
        ]
        found = []
        for samples, _, site, world_rank, ours in sorted(seen, key=lambda item: item[:2]):
            whole = wholes[site]
            theirs = activation_part(self._config, whole, site, world_rank, samples)
            bound = (1 + step) * self.bounds.activation * whole.abs().max().item()
            found.append(
                self._tensor(
                    step, "activation", site, world_rank, ours, theirs, bound, samples=samples
                )
            )
        return found


def activation_part(
    config: Config, whole: Tensor, site: str, world_rank: int, samples: Sequence[int]
) -> Tensor:
    """What a rank has of a whole activation for these samples."""
    layout = config.parallel
    place = Topology(tp=layout.tp, pp=layout.pp, dp=layout.dp).coordinates(world_rank)
    return cut(config, site, place).of(whole[:, list(samples)])
