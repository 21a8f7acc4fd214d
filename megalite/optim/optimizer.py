"""Clipping, and an update of flat buffers by AdamW or Muon."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megalite.config import TrainConfig
from megalite.optim.adamw import AdamW
from megalite.optim.flat import FlatParameters
from megalite.optim.host_flag import HostFlag
from megalite.optim.muon import Muon
from megalite.optim.offload import Home, HostMemory, Offloaded
from megalite.optim.rule import Owned, Rule, Step
from megalite.optim.scaler import LossScale
from megalite.optim.segments import segments
from megalite.optim.spikes import SpikeGuard
from megalite.parallel.group import Pending
from megalite.parallel.groups import ParallelGroups
from megalite.precisions import precisions
from megalite.treatment import Treatment

NORM_ROW = 4096
"""Elements whose norm is taken in the gradients' own precision."""


@dataclass(frozen=True)
class _OpenStep:
    """A step whose norm is still being summed over the pipeline ranks.

    Attributes:
        totals: its square first, then the statistics.
        lr: learning rate.
        is_guessed: the weights have been moved already.
    """

    totals: Pending
    lr: float
    is_guessed: bool


_State = tuple[list[Tensor], list[Tensor], list[Tensor]]
"""Master weights and both moments, by span."""


class Optimizer:
    """An update of master weights by a rule for each span, after clipping the global norm.

    The rule is AdamW, or of matrices of layers Muon, if the run asks for it. Each rank updates what
    it owns of the flat buffers and passes it on to its shard group. Master weights and both moments
    are fp32 (fp64 in fp64 runs). For bf16 and fp16 parameters the master weights are buffers of
    their own; otherwise they are the parameters themselves. Per parameter of such a run: 2 bytes of
    weight, 4 of gradient, 12 / shards of master weight and moments; 8 / shards with Muon, which
    keeps one moment.

    With moments in bf16 the 12 are 8; in bf16-pure, where the parameters are the master weights
    too, they are 4. What is bf16 is rounded stochastically.

    Nothing here waits for the GPU: rules read the factor that clips the gradients, and takes the
    loss scale out of them, on the device, and skip the step, on all ranks alike, if the norm is not
    finite, or with --skip-spikes stands out. Such a step has no effect on weights, moments and
    their count of steps; the learning rate goes on.

    With post-validation and several pipeline ranks a step is guessed while its norm is summed over
    them: each rank moves its weights as if there were nothing to clip, and begins the next step
    with the same loss scale. When that one's first gradient comes, `validate` amends a guess that
    was wrong: it takes the step again from the state before it, which a second set of buffers
    keeps, so that each bit is what it is without post-validation. What was computed with wrong
    weights is the caller's to compute again. A step is guessed only after one whose guess was, or
    would have been, right. The second set takes 12 more bytes per parameter of a bf16 run; of an
    fp32 run 16 more, as its master weights become buffers of their own.

    Source: Qi et al., "Zero bubble pipeline parallelism", arXiv:2401.10241, section 4, with a
    rollback by copies, which is exact, in place of AdamW's inverse.

    Args:
        flat: this rank's flat buffers.
        groups: of this rank.
        train: hyper-parameters.
        loss_scale: of the loss that the gradients are of.
        treatments: rate and decay of every whole tensor, by name.

    Attributes:
        master, exp_avg, exp_avg_sq: what this rank owns, by `flat.spans`; of an open step, as they
            were before it. A moment that a span's rule doesn't keep is empty. With
            --offload-optimizer they are in the host's memory, where the device may read them after
            `validate`; the host has to wait for the device first.
        steps: fp32 [], on the device: updates so far, without those skipped.
    """

    def __init__(
        self,
        flat: FlatParameters,
        groups: ParallelGroups,
        train: TrainConfig,
        loss_scale: LossScale,
        treatments: Mapping[str, Treatment],
    ):
        self._flat, self._groups, self._train = flat, groups, train
        self.loss_scale = loss_scale
        self._spikes: SpikeGuard | None = None
        if train.skip_spikes:
            self._spikes = SpikeGuard(train.skip_spikes, train.spike_window, flat.device)
        guesses = train.post_validation and groups.pp.size > 1
        of, full = precisions(train), flat.gradient_dtype
        of_master, of_moments = (
            torch.bfloat16 if name == "bf16" else full for name in (of.master, of.moments)
        )
        self._copies_master = guesses or flat.dtype != of_master
        own = flat.own_parameters
        self.master = (
            # One after the other, so that not all of them are on the device at a time.
            list(map(self._kept(of_master), (part.to(of_master, copy=guesses) for part in own)))
            if self._copies_master
            else own
        )
        new = partial(torch.zeros_like, dtype=of_moments)
        self.exp_avg = list(map(self._kept(of_moments), map(new, own)))
        self._rules = _rules(flat, groups, train)
        seconds = (
            part if rule.num_moments == 2 else part[:0]
            for part, rule in zip(own, self._rules, strict=True)
        )
        self.exp_avg_sq = list(map(self._kept(of_moments), map(new, seconds)))
        rounds = torch.bfloat16 in (of_master, of_moments)
        seed = train.seed if rounds else None
        self._segments = segments(flat.slots, flat.spans, treatments, seed)
        self.steps = torch.zeros((), device=flat.device)
        self._order = sorted(range(len(flat.spans)), key=lambda number: flat.spans[number].decays)
        self._offloaded: Offloaded | None = None
        if train.offload_optimizer and flat.spans:
            self._offloaded = Offloaded(self._homes(), flat.device)
        self._open: _OpenStep | None = None
        self._spare: _State | None = None
        if guesses:
            assert groups.dp.shards.size == 1, "a guess would have to be passed on twice"
            master, exp_avg, exp_avg_sq = (
                [torch.empty_like(part) for part in parts] for parts in self._state()
            )
            self._spare = master, exp_avg, exp_avg_sq
            flat.last_use = self._settle
        self._guess, self._trusts_guess = 1.0, False
        self._verdict: tuple[bool, HostFlag] | None = None

    @property
    def has_master(self) -> bool:
        """Whether master weights are tensors of their own."""
        return self._copies_master

    def counters(self) -> dict[str, Tensor]:
        """The small states that all ranks have alike, by name; after `validate`."""
        spikes = {} if self._spikes is None else self._spikes.state()
        return {"steps": self.steps, **self.loss_scale.state(), **spikes}

    def restore(self, counters: Mapping[str, Tensor]) -> None:
        """Take what `counters` gave; those that are not there stay as they are."""
        if "steps" in counters:
            self.steps.copy_(counters["steps"])
        self.loss_scale.restore(counters)
        if self._spikes is not None:
            self._spikes.restore(counters)

    @property
    def is_open(self) -> bool:
        """Whether the last step is a guess that has not been validated."""
        return self._open is not None

    def guess_wrong(self) -> None:
        """Guess every step from now on, and wrongly: by NaN. For verification."""
        self._guess = math.nan

    def clip_and_step(self, lr: float, statistics: Tensor, votes: Tensor) -> Tensor:
        """Update the parameters from the reduced gradients.

        Args:
            lr: learning rate of this step.
            statistics: fp64 [n], the loss first, sums that only some pipeline ranks hold (others
                hold zeros); they ride along in the norm's collectives.
            votes: fp64 [1], summed over the tensor ranks too.

        Returns:
            fp64 [2 + n] on the device: the gradient norm before clipping, the statistics summed
            over the pipeline ranks, and the votes over those and the tensor ranks; with
            --skip-spikes [3 + n], 1 behind them if the step was skipped for a spike. Equal on all
            ranks. Of a step that `is_open`, not to be read before `validate`, which puts them
            there.
        """
        squares = self._groups.dp.shards.all_reduce(self._squared_norm())
        squares, votes = self._groups.tp.all_reduce(torch.cat([squares, votes])).split(1)
        totals = torch.cat([squares, statistics, votes])
        if self._spikes is not None:
            totals = torch.cat([totals, torch.zeros_like(squares)])
        pending = self._groups.pp.start_all_reduce(totals)
        guesses = self._trusts_guess or math.isnan(self._guess)
        self._open = _OpenStep(pending, lr, self._spare is not None and guesses)
        if self._open.is_guessed:
            guess = torch.full_like(totals[0], self._guess) / self.loss_scale.value
            self._update(lr, self.steps + 1.0, guess)
        else:
            self._settle()
        return totals

    def validate(self) -> None:
        """Make the last step final: amend it where it was guessed and the guess was wrong.

        Weights, states and statistics may be read afterwards. The device waits for the other
        pipeline ranks' parts of the norm and for what other data ranks have updated; on gloo the
        host does.
        """
        self._settle()
        self._flat.wait_for_parameters()
        if self._offloaded is not None:
            self._offloaded.settle()

    def _settle(self) -> None:
        """As `validate`, without waiting for what other data ranks have updated."""
        step, self._open = self._open, None
        if step is None:
            return
        loss_scale = self.loss_scale.value
        totals = step.totals.wait()
        norm = totals[0].sqrt_().div_(loss_scale)
        scale = torch.ones_like(norm)
        if self._train.clip_grad:
            scale = (self._train.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        skip = (~norm.isfinite()).float()
        self.loss_scale.update(skip)
        if self._spikes is not None:
            totals[-1] = self._spikes.judge(totals[:2])
            skip = torch.maximum(skip, totals[-1].float())
        self.steps += 1.0 - skip
        rescaled = self.loss_scale.value != loss_scale
        wrong = ((scale != self._guess) | (skip != 0) | rescaled).float()
        scale = scale / loss_scale
        self._update(step.lr, self.steps, scale, skip, wrong if step.is_guessed else None)
        if self._spare is not None:
            state, self._spare = self._spare, self._state()
            self.master, self.exp_avg, self.exp_avg_sq = state
            self._verdict = step.is_guessed, HostFlag(wrong)

    def guessed_wrong(self) -> bool:
        """Whether the step validated last was guessed, wrongly; equal on all ranks.

        The host waits until the device has validated it, for nothing behind that.
        """
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            return False
        is_guessed, wrong = verdict[0], verdict[1].read()
        self._trusts_guess = not wrong
        return is_guessed and wrong

    def _state(self) -> _State:
        return self.master, self.exp_avg, self.exp_avg_sq

    def _update(
        self,
        lr: float,
        step: Tensor,
        scale: Tensor,
        skip: Tensor | None = None,
        run: Tensor | None = None,
    ) -> None:
        """Move the weights; with spare buffers the new state goes there, and the old one stays.

        Spans are taken in the order in which the next forward needs them: norm weights, which the
        first layer has of, then matrices from the first stage on.
        """
        flat, spare = self._flat, self._spare
        for i, master, exp_avg, exp_avg_sq in self._in_turn():
            owned = Owned(
                flat.spans[i],
                self._segments[i],
                master,
                flat.own_gradients[i],
                exp_avg,
                exp_avg_sq,
                copy=flat.own_parameters[i] if self._copies_master else None,
                out=None if spare is None else (spare[0][i], spare[1][i], spare[2][i]),
            )
            self._rules[i].update(owned, Step(step, lr, scale, skip, run))
            flat.pass_on(i)

    def _in_turn(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Each span, its master weights and its moments, on the device."""
        if self._offloaded is None:
            for i in self._order:
                yield i, self.master[i], self.exp_avg[i], self.exp_avg_sq[i]
            return
        # It ends first, after it has sent back the last ones.
        visited = self._offloaded.visit(self._homes())
        for here, i in zip(visited, self._order, strict=True):
            exp_avg, exp_avg_sq, *master = here
            yield i, master[0] if master else self.master[i], exp_avg, exp_avg_sq

    def _kept(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Where states of a kind are from now on: where they are, or in the host's memory."""
        if not self._train.offload_optimizer:
            return lambda state: state
        length = sum(map(len, self._flat.own_parameters))
        return HostMemory(length, dtype, self._flat.device).keep

    def _homes(self) -> list[Home]:
        """What is offloaded, in the order of the update; master weights that are the parameters
        themselves are not."""
        kinds = [self.exp_avg, self.exp_avg_sq, *([self.master] if self._copies_master else [])]
        return [tuple(kind[i] for kind in kinds) for i in self._order]

    def _squared_norm(self) -> Tensor:
        """This rank's share of the squared global norm, fp64 [1]; every element counts once."""
        slices = self._flat.counted_gradients()
        if not slices:
            return torch.zeros(1, dtype=torch.float64, device=self._flat.device)
        return torch.stack([_square_sum(part) for part in slices]).sum()[None]


def _rules(flat: FlatParameters, groups: ParallelGroups, train: TrainConfig) -> list[Rule]:
    """The rule of each span."""
    adamw = AdamW(train)
    if train.optimizer == "adamw":
        return [adamw for _ in flat.spans]
    muon = Muon(train, groups, flat.dtype)
    return [muon if span.matrices else adamw for span in flat.spans]


def _square_sum(x: Tensor) -> Tensor:
    """Sum of squares of a vector of any length, fp64 [].

    Norms of short rows are exact enough in the vector's own precision, and only they are summed in
    fp64: the vector is read once, and no copy of it in fp64 is made.
    """
    whole = len(x) // NORM_ROW * NORM_ROW
    rows = torch.linalg.vector_norm(x[:whole].view(-1, NORM_ROW), dim=1)
    rest = torch.linalg.vector_norm(x[whole:])
    return rows.double().square().sum() + rest.double().square()
