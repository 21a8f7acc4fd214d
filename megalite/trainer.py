"""Build a run from its parts, take a step, run to the end: the only place that knows them all."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint.reader import Checkpoint
from megalite.checkpoint.state import load_optimizer, load_weights, start_from_weights
from megalite.config import Config
from megalite.data.host_batch import Batch
from megalite.data.loader import Loader
from megalite.data.samples import Samples
from megalite.estimate import fixed_bytes
from megalite.events import Events
from megalite.faults import Faults
from megalite.figures import Figures, Result
from megalite.injected import flip_a_bit, spoiled
from megalite.layers.batch import MicroBatch
from megalite.layers.dtypes import DTYPES, weights_dtype
from megalite.layers.shard import draw, freeze
from megalite.metrics import RunLog
from megalite.models.llama import LlamaStage
from megalite.models.stage import stage_specs
from megalite.optim.flat import FlatParameters
from megalite.optim.lr import learning_rate
from megalite.optim.optimizer import Optimizer
from megalite.optim.replicas import check_replicas
from megalite.optim.scaler import make_loss_scale
from megalite.parallel.groups import ParallelGroups
from megalite.parallel.stop import StopRequest
from megalite.pipeline.costs import Costs
from megalite.pipeline.recorder import write_record
from megalite.pipeline.runtime import Executor
from megalite.pipeline.trace import traced_steps
from megalite.planning.block_costs import estimated_costs, stage_costs
from megalite.planning.measure import measure_message
from megalite.planning.recorded import recorded_costs
from megalite.planning.shared import memory_limit
from megalite.precisions import precisions
from megalite.programs import Programs, splits_backwards
from megalite.saving import Saves, limit_s
from megalite.treatment import frozen_names, treatments

MEASURED_STEPS = (2, 3)
"""By the costs of their actions messages and weight gradients are placed from then on; 1 is the
first step of this start."""


class Trainer:
    """One rank's part of a run.

    Args:
        config: fully resolved.
        samples: of training, validation and, if there is one, the test after training.
        groups: of this rank.
        device: of this rank.
        costs: of the stages, by which messages and weight gradients are placed at first; None:
            estimates.
        stop: whether this rank is asked to stop after a step; None: nobody asks.
        faults: what is injected on purpose into this rank; None: nothing.
    """

    def __init__(
        self,
        config: Config,
        samples: tuple[Samples, Samples, Samples | None],
        groups: ParallelGroups,
        device: torch.device,
        costs: Costs | None = None,
        stop: StopRequest | None = None,
        faults: Faults | None = None,
    ):
        self.config, self.groups, self.device = config, groups, device
        self._activity = groups.activity
        self._stop, self._faults = stop or StopRequest(), faults or Faults.none()
        costs = costs or stage_costs(config, estimated_costs(config))
        limit: float | None = None
        if splits_backwards(config):
            limit = memory_limit(config, groups, device) - max(fixed_bytes(config))
        self.programs = Programs(config, costs, limit)
        dtype = weights_dtype(config)
        stage_rank = self.programs.stage_rank
        self.stages: dict[int, LlamaStage] = {}
        frozen = frozen_names(config)
        for spec in stage_specs(config):
            if stage_rank[spec.stage] == groups.pp.rank:
                stage = LlamaStage(
                    config, spec, tp=groups.tp, dtype=dtype, device=device, without_values=True
                )
                freeze(stage, frozen)
                self.stages[spec.stage] = stage
        self._last_stage = self.stages.get(len(stage_rank) - 1)
        if config.model.tie_embeddings and 0 in self.stages and self._last_stage is not None:
            self._last_stage.share_embedding(self.stages[0])
        level = config.parallel.zero
        self.flat = FlatParameters(
            self.stages,
            groups,
            shards_gradients=level >= 2,
            shards_weights=level >= 3,
            reduce_dtype=DTYPES[precisions(config.train).reduction],
            draw=partial(draw, seed=config.train.seed),
        )
        self.executor = Executor(self.stages, groups, self.flat)
        loss_scale = make_loss_scale(config, device)
        self.optimizer = Optimizer(self.flat, groups, config.train, loss_scale, treatments(config))
        train_samples, valid_samples, self._tested = samples
        self.loader = Loader(config, train_samples, valid_samples, groups.dp, device)
        self._copied: torch.cuda.Event | None = None

    @property
    def last_stage_rank(self) -> int:
        """Pipeline rank of the last stage, which has logits."""
        return self.programs.stage_rank[-1]

    def train_step(self, step: int) -> Tensor:
        """Optimizer step `step`, 0 first.

        Returns:
            fp64 on the device: gradient norm before clipping, loss [nats per token]; in fp16 the
            step's loss scale; how many ranks were asked to stop; with --skip-spikes whether the
            step was one. Equal on all ranks. Not there before `optimizer.validate` if the step
            `is_open`.
        """
        return self.update(step, self.accumulate(step))

    def accumulate(self, step: int) -> Tensor:
        """Forward and backward of all micro-batches of a step.

        Afterwards the flat buffers hold the reduced gradients of the step's mean loss, times the
        loss scale.

        Returns:
            fp64 [2] on the device: the loss, on the last stage's ranks, zero on the others; and how
            many of this rank's data ranks were asked to stop.
        """
        self._activity.at("reading samples")
        batch = self.loader.train_batch(step)
        self._faults.in_step(step + 1)
        self._activity.enter("counting tokens")
        scale = 1.0 / self._global_tokens(batch)
        is_guessed = self.optimizer.is_open  # what the forwards read
        with spoiled(self.stages.values(), is_on=self._faults.spoils_gradients(step + 1)):
            sums = self._gradients(batch, scale)
            if self.optimizer.guessed_wrong() and is_guessed:
                self._activity.enter("computing again what a wrong guess spoilt")
                sums = self._gradients(batch, scale)
        return sums

    def _gradients(self, batch: Batch, scale: Tensor) -> Tensor:
        """Forward and backward of a batch, returned and left behind as by `accumulate`."""
        self.flat.zero_gradients()
        loss_scale = self.optimizer.loss_scale.value

        def head(logits: Tensor, micro_batch: MicroBatch) -> Tensor:
            return self._weighted_loss(logits, micro_batch, scale * loss_scale)

        program = self.programs.training(len(batch.micro_batches))
        losses = self.executor.run(program, batch.micro_batches, head)
        self._activity.enter("summing gradients", self._activity.position)
        self.executor.recorder.enters("gradient sums")
        self.flat.finish_reduction()
        vote = torch.full_like(loss_scale, self._stop.by is not None, dtype=torch.float64)[None]
        sums = self.groups.dp.all_reduce(torch.cat([self._sum(losses), vote]))
        sums[0] /= loss_scale
        return sums

    def update(self, step: int, sums: Tensor) -> Tensor:
        """Clip and move the weights by the gradients of `accumulate`, which also gave the sums;
        returns as `train_step`."""
        self._activity.enter("updating weights", self._activity.position)
        self.executor.recorder.enters("optimizer")
        if self._copied is not None:
            # The weights and states of a step before are being copied for a checkpoint.
            torch.cuda.current_stream(self.device).wait_event(self._copied)
            self._copied = None
        statistics, votes = sums.split(1)
        if self.config.train.precision == "fp16":
            loss_scale = self.optimizer.loss_scale.value.double()
            statistics = torch.cat([statistics, loss_scale[None] * (self._last_stage is not None)])
        rate = learning_rate(self.config.train, step)
        return self.optimizer.clip_and_step(rate, statistics, votes)

    def validate(self) -> float:
        """Mean loss over the validation samples [nats per token], equal on all ranks."""
        return self._evaluate(self.loader.validation_batches(), "validation")

    def test(self) -> float | None:
        """Mean loss over the test samples [nats per token], equal on all ranks; None: no test."""
        if self._tested is None:
            return None
        return self._evaluate(self.loader.evaluation_batches(self._tested), "test")

    @torch.no_grad()
    def _evaluate(self, batches: Iterable[Batch], what: str) -> float:
        self.optimizer.validate()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)

        def head(logits: Tensor, micro_batch: MicroBatch) -> Tensor:
            return self._token_losses(logits, micro_batch).sum()

        for number, batch in enumerate(batches, start=1):
            self._activity.begin(f"batch {number} of a {what}")
            program = self.programs.evaluating(len(batch.micro_batches))
            losses = self.executor.run(program, batch.micro_batches, head)
            totals[0] += self._sum(losses)[0]
            if self._last_stage is not None:
                totals[1] += batch.counted_tokens
        self.groups.pp.all_reduce(self.groups.dp.all_reduce(totals))
        total, tokens = totals.tolist()
        return total / max(1.0, tokens)

    def load(self, checkpoint: Checkpoint, *, with_optimizer: bool = True) -> None:
        """Start from a checkpoint of any layout; the data follow from the step alone.

        Args:
            checkpoint: of the same model.
            with_optimizer: take the optimizer's states too; else they stay as they are.
        """
        files = checkpoint.manifest.files
        allowance_s = limit_s(self.config, sum(file.num_bytes for file in files))
        self._activity.begin("loading a checkpoint", "checkpoint", allowance_s=allowance_s)
        load_weights(self.flat, checkpoint)
        if with_optimizer:
            load_optimizer(self.flat, self.optimizer, checkpoint)
        else:
            start_from_weights(self.flat, self.optimizer, checkpoint)
        self.flat.wait_for_parameters()

    def fit(
        self,
        log: RunLog | None,
        events: Events | None = None,
        first_step: int = 0,
        saves: Saves | None = None,
    ) -> Result:
        """Train to the end, or until a rank is asked to stop: with validations on the way and, at
        the end, a test.

        Args:
            log: on the rank that keeps the record, None on the others.
            events: likewise, of what happens; None: no record.
            first_step: steps that have been taken already.
            saves: checkpoints on the way, and one at the end; None: none.

        Raises:
            RunError: too many steps in a row were not finite, on all ranks alike; or this rank's
                replicas differ.
            SaveError: checkpoints can't be written.
        """
        train = self.config.train
        figures = Figures(self.config, self.device, log, events or Events(None))
        if saves is not None:
            saves.reserve(self.flat, self.optimizer)
        valid_loss = None
        traced = [first_step + step for step in traced_steps(self.config.run.trace_steps)]
        measured = [first_step + step for step in MEASURED_STEPS if self.groups.pp.size > 1]
        for step in range(first_step + 1, train.steps + 1):
            self._activity.begin(f"step {step}", "step")
            if step in (*traced, *measured):
                self.optimizer.validate()  # so that no action is recorded twice
                self.executor.recorder.begin_step(step)
            figures.begin()
            figures.end(step, self.train_step(step - 1))
            self.executor.recorder.end_step()
            if measured and step == measured[-1] and step < train.steps:
                self.plan_by_measured_costs()
            is_last = step == train.steps
            evaluates = is_last or (train.eval_interval and step % train.eval_interval == 0)
            if evaluates:
                self.optimizer.validate()
            self._activity.enter("reading the figures of the step before")
            figures.read(is_open=self.optimizer.is_open)
            if traced and step == traced[-1]:
                self._activity.enter("writing when actions ran")
                self._write_trace()
            self._compare_replicas(step)
            # Known of an earlier step, so that all ranks find it at the same place.
            stops = figures.is_asked and not is_last
            if stops or evaluates:
                self.optimizer.validate()
                figures.finish()
            if saves is not None:
                saves.look()
                if stops or is_last or saves.is_due(step):
                    figures.record_times()
                    self._save(step, saves)
            if stops:
                self._finish(saves)
                return Result(step, True, figures.loss, valid_loss, None)
            if evaluates:
                valid_loss = self._validated(step, log)
        if first_step >= train.steps:
            valid_loss = self._validated(train.steps, log)
        test_loss = self.test()
        self._finish(saves)
        if log is not None and test_loss is not None:
            log.test(train.steps, test_loss)
        return Result(train.steps, False, figures.loss, valid_loss, test_loss)

    def _validated(self, step: int, log: RunLog | None) -> float | None:
        """The loss of a validation after so many steps; None: there is none."""
        if not self.config.train.eval_steps:
            return None
        loss = self.validate()
        if log is not None:
            log.validation(step, loss)
        return loss

    def _save(self, step: int, saves: Saves) -> None:
        """Begin to save; the next update waits until the values have been copied."""
        allowance_s = limit_s(self.config, 8 * self.flat.length * self.flat.dtype.itemsize)
        self._activity.begin("starting to save", "checkpoint", allowance_s=allowance_s)
        self.optimizer.validate()
        self._copied = saves.start(step, self.flat, self.optimizer)
        if not saves.in_background:
            self._finish(saves, is_last=False)

    def _finish(self, saves: Saves | None, *, is_last: bool = True) -> None:
        """Wait for the save under way, if there is one."""
        if saves is not None:
            allowance_s = limit_s(self.config, 8 * self.flat.length * self.flat.dtype.itemsize)
            self._activity.begin("finishing a save", "checkpoint", allowance_s=allowance_s)
            saves.finish(is_last=is_last)

    def _compare_replicas(self, step: int) -> None:
        """See --check-replicas; an injected fault flips a bit just before.

        Raises:
            RunError: replicas differ.
        """
        if self._faults.flips_a_bit(step):
            self.optimizer.validate()
            flip_a_bit(self.flat.own_parameters[0])
        interval = self.config.supervision.check_replicas
        if interval and step % interval == 0:
            self.optimizer.validate()
            self._activity.enter("comparing replicas")
            check_replicas(step, self.flat, self.optimizer, self.groups.dp)

    def plan_by_measured_costs(self) -> None:
        """Place messages and weight gradients anew, by what the recorded steps' actions took.

        The order of gradients on each stage stays, so every sum does: the numbers do not change.
        """
        self._activity.enter("planning by measured costs")
        dtype = weights_dtype(self.config)
        message = measure_message(self.config, self.groups, self.device, dtype)
        recorder = self.executor.recorder
        self.programs.replan(recorded_costs(recorder, self.groups, self.programs.costs, message))
        recorder.clear()

    def save(self, saves: Saves) -> None:
        """Write what there is at the end of the run; returns when all ranks have."""
        self._save(self.config.train.steps, saves)
        self._finish(saves)

    def _write_trace(self) -> None:
        """Write when the actions of the recorded steps ran; one tensor and data rank does."""
        if self.groups.tp.is_first and self.groups.dp.is_first:
            folder = Path(self.config.run.runs) / self.config.run.name
            write_record(self.executor.recorder, folder, self.groups.pp)
        self.executor.recorder.clear()

    def _weighted_loss(self, logits: Tensor, micro_batch: MicroBatch, scale: Tensor) -> Tensor:
        """A micro-batch's part of the step's mean loss, []; takes the logits over."""
        assert self._last_stage is not None, "only the last stage has logits"
        weights = self._token_weights(micro_batch, scale)
        return self._last_stage.weighted_loss(logits, micro_batch.labels, weights)

    def _token_weights(self, micro_batch: MicroBatch, scale: Tensor) -> Tensor:
        """What each token's loss counts in the step's mean, [B, S]."""
        return micro_batch.mask * scale

    def _token_losses(self, logits: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Losses of the tokens that count; zero for the others. [S, B]."""
        assert self._last_stage is not None, "only the last stage has logits"
        losses = self._last_stage.token_losses(logits, micro_batch.labels)
        return losses.masked_fill(~micro_batch.mask.t(), 0.0)

    def _global_tokens(self, batch: Batch) -> Tensor:
        """Tokens that count in the global batch, fp64 [] on the device; at least 1."""
        count = batch.counted_tokens.clone()  # the sum is taken in place
        return self.groups.dp.all_reduce(count).clamp(min=1.0)

    def _sum(self, results: dict[int, Tensor]) -> Tensor:
        """fp64 [1]: sum over this rank's micro-batches; zero off the last stage."""
        if not results:
            return torch.zeros(1, dtype=torch.float64, device=self.device)
        return torch.stack(list(results.values())).double().sum()[None]
