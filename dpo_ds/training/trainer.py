"""The training loop of `sft` and `train`: batches, log-probs, loss, backward, update; all ranks run it together."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dpo_ds.batch import Batch
from dpo_ds.checkpoint.writer import CheckpointWriter
from dpo_ds.cluster import collectives
from dpo_ds.cluster.signals import Stopped
from dpo_ds.cluster.stopping import StopFlag, stop_reason
from dpo_ds.cluster.watchdog import PeerWatch, Silent
from dpo_ds.config import TrainSection
from dpo_ds.data.batching import Layout, global_batches, steps_per_epoch
from dpo_ds.errors import TrainingError, UserError
from dpo_ds.models.engine import Policy
from dpo_ds.training import metrics
from dpo_ds.training.course import COURSE, Course
from dpo_ds.training.feed import Feed, LocalBatch
from dpo_ds.training.mfu import Utilisation
from dpo_ds.training.objectives.objective import Objective
from dpo_ds.training.profile import StepProfile
from dpo_ds.training.samples import Sampler
from dpo_ds.training.schedule import learning_rate, total_steps
from dpo_ds.training.tracking import Tracker

EVALUATION_DUE = "evaluation_due"  # in a checkpoint that was saved within an evaluation


@dataclass(frozen=True)
class Agreed:
    """Holds what all ranks know after the one sum that a step makes over them: the objective's sums, the next global
    batch's weight, tokens and scored tokens, the most memory that any rank has held, why to stop ("": to go on).
    """

    sums: list[float]
    weight: int
    tokens: int
    targets: int
    peak_memory: int
    stop: str


@dataclass(frozen=True)
class Update:
    """Tells of one update: the means over its global batch, the gradient norm before clipping, all ranks' tokens.

    host_seconds: for which this rank issued forwards and backwards; a GPU that is done earlier waits for Python.
    """

    means: dict[str, float]
    grad_norm: float
    learning_rate: float
    tokens: int
    targets: int
    host_seconds: float


class Trainer:
    """Runs updates first_step..total_steps; `evaluation_data` may be None."""

    def __init__(
        self, policy: Policy, objective: Objective, data, evaluation_data, layout: Layout, run: TrainSection,
        writer: CheckpointWriter, checkpoint_every: int, tracker: Tracker | None, stop: StopFlag,
        peers: PeerWatch | Silent, profile: StepProfile, sampler: Sampler | None = None,
        course: Course | None = None,
    ):  # fmt: skip
        self.policy, self.objective, self.layout, self.run = policy, objective, layout, run
        self.data, self.evaluation_data = data, evaluation_data
        self.writer, self.checkpoint_every = writer, checkpoint_every
        self.tracker, self.stop, self.peers, self.profile, self.sampler = tracker, stop, peers, profile, sampler
        self.course = course
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        self.counts = objective.counts(data)
        self.total_steps = total_steps(data.sources, run, self.counts)
        self.per_epoch = steps_per_epoch(data.sources, run.global_batch_size, self.counts)
        self.agreed = Agreed([], 0, 0, 0, 0, "")
        self.utilisation = Utilisation.of(policy, objective.forwards(), self.world_size)
        self.last_metrics: dict = {}  # of the last step and evaluation, for the model card

    def train(self, first_step: int, evaluation_due: bool = False) -> None:
        """Updates from `first_step` on, with evaluations and checkpoints between and after them.

        evaluation_due: the run resumed was stopped within the evaluation of the step before.
        """
        if evaluation_due:
            self.evaluate_and_save(first_step - 1)
        if self.has_seen_enough:
            return
        size = self.run.global_batch_size
        batches = global_batches(self.data.sources, self.run.seed, size, first_step, self.counts)
        batches = itertools.takewhile(lambda batch: batch[0] <= self.total_steps, batches)
        with contextlib.closing(self._feed(batches, self.data)) as feed:
            self._agree([], feed.following())
            self._step_ended, self._waited = time.perf_counter(), feed.waited
            for batch in feed:
                self.between_steps(batch.step)
                with self.profile.around(batch.step):
                    update = self.update(batch, feed)
                self.log(batch, update, feed)
                self.show_samples(batch.step)
                self.evaluate_and_save(batch.step)
                if self.has_seen_enough:
                    break
        self.profile.finish()

    @property
    def has_seen_enough(self) -> bool:
        """Tells whether the run ends before its last step, as evaluations got no better."""
        return self.course is not None and self.course.has_seen_enough

    def between_steps(self, step: int) -> None:
        """Tells the watchdog that `step` begins, commits a checkpoint that is written by now, and stops if any rank was
        told to.
        """
        self._look_around(step)
        if self.agreed.stop:
            self._save_and_stop(step - 1, self.agreed.stop)

    def update(self, batch: LocalBatch, feed: Feed) -> Update:
        """Makes one update with the mean gradient over the global batch's pairs, whichever ranks compute them."""
        agreed, started = self.agreed, time.perf_counter()
        sums = torch.zeros(len(self.objective.names), dtype=torch.float64, device=self.policy.device)
        losses = []
        self.objective.begin(self.policy, batch.micro_batches, batch.mismatched)
        for micro_batch in batch.micro_batches:
            loss, micro_sums = self.objective(self.policy, micro_batch)
            # DeepSpeed averages gradients over the ranks, and a rank has a share of the pairs.
            self.policy.backward(loss * self.world_size / agreed.weight, is_last=micro_batch is batch.micro_batches[-1])
            sums += micro_sums
            losses.append((loss, micro_batch))
        feed.prepare_next()
        host_seconds = time.perf_counter() - started
        rate = learning_rate(batch.step, self.run, self.total_steps)
        grad_norm = self.policy.step(rate)
        self._agree(sums, feed.following())
        means = [total / agreed.weight for total in self.agreed.sums]
        self._check_finite(batch.step, means, grad_norm, losses)
        named = self.objective.shown(dict(zip(self.objective.names, means, strict=True)))
        self.objective.after_step(batch.step, named)
        return Update(named, grad_norm, rate, agreed.tokens, agreed.targets, host_seconds)

    def step_on(self, rows: np.ndarray) -> Update:
        """Makes the first update, with these rows of the data as its global batch. All ranks enter."""
        with contextlib.closing(self._feed([(1, rows)], self.data)) as feed:
            self._agree([], feed.following())
            return self.update(next(iter(feed)), feed)

    def log(self, batch: LocalBatch, update: Update, feed: Feed) -> None:
        """Hands the step's metrics to the tracker."""
        seconds, self._step_ended = time.perf_counter() - self._step_ended, time.perf_counter()
        data_seconds, self._waited = feed.waited - self._waited, feed.waited
        self.last_metrics = update.means
        pairs = len(batch.rows) if self.counts is None else int(self.counts[batch.rows].sum())
        mfu = {}
        if self.utilisation is not None:
            mfu = {"mfu": self.utilisation(batch.lengths, update.targets, seconds)}
        if self.tracker:
            self.tracker.step(
                {
                    "step": batch.step,
                    **update.means,
                    "grad_norm": update.grad_norm,
                    "learning_rate": update.learning_rate,
                    "epoch": batch.step / self.per_epoch,
                    "pairs": pairs,
                    "tokens": update.tokens,
                    "tokens_per_second": update.tokens / seconds,
                    "pairs_per_second": pairs / seconds,
                    "step_seconds": seconds,
                    "data_seconds": data_seconds,
                    "host_seconds": update.host_seconds,
                    **mfu,
                    "peak_memory_bytes": self.agreed.peak_memory,
                }
            )

    def show_samples(self, step: int) -> None:
        """Hands completions by the policy to the tracker where they are due after `step`."""
        if self.sampler is None or not is_due(step, self.run.sample_every):
            return
        try:
            samples = self.sampler(step)
        except UserError as problem:  # on every rank
            self.sampler = None
            if self.tracker:
                self.tracker.say(f"step {step}: {problem}; no completions are shown, training goes on")
            return
        if self.tracker:
            self.tracker.samples(step, samples)

    def evaluate_and_save(self, step: int) -> None:
        """Evaluates and saves where either is due after `step`."""
        is_last = step == self.total_steps
        evaluates = self.evaluation_data is not None and (is_last or is_due(step, self.run.eval_every))
        if evaluates:
            started = time.perf_counter()
            try:
                evaluation = self.evaluate(step)
            except Stopped as stopped:
                self._save_and_stop(step, str(stopped), evaluation_due=True)
            self.last_metrics = self.last_metrics | evaluation
            if self.tracker:
                counts = self.objective.counts(self.evaluation_data)
                pairs = len(self.evaluation_data) if counts is None else int(counts.sum())
                size = {"eval_pairs": pairs, "eval_seconds": time.perf_counter() - started}
                self.tracker.evaluation({"step": step, "epoch": step / self.per_epoch, **evaluation, **size})
        follows = evaluates and self.course is not None
        is_best = follows and self.course.observe(step, evaluation, self.writer.best_or_coming)
        ends = is_last or self.has_seen_enough
        saves = ends or is_best or is_due(step, self.checkpoint_every)
        if saves:
            self.writer.save(self.policy.engine, step, self.state(), wait=ends, is_best=is_best)
        if (evaluates or saves) and not ends:  # both take their time: another signal may have come
            self.agreed = replace(self.agreed, stop=self.stop.agreed(self.policy.device))

    def evaluate(self, step: int) -> dict[str, float]:
        """Exact means over all of the evaluation data, each pair once, keys prefixed eval_. All ranks enter."""
        rows = np.arange(len(self.evaluation_data))
        means = self.means(self.objective.for_evaluation(), self.evaluation_data, rows, step)
        return {f"eval_{name}": mean for name, mean in means.items()}

    def means(self, objective: Objective, data, rows: np.ndarray, step: int) -> dict[str, float]:
        """Exact means of an objective's sums over these rows of `data`, without gradients. All ranks enter."""
        sums = torch.zeros(1 + len(objective.names), dtype=torch.float64, device=self.policy.device)  # weight first
        size = self.run.global_batch_size
        batches = ((step, rows[start : start + size]) for start in range(0, len(rows), size))
        with contextlib.closing(self._feed(batches, data)) as feed, self.policy.evaluating():
            for batch in feed:
                self._look_around(step)
                if reason := self.stop.agreed(self.policy.device):
                    raise Stopped(reason, step)
                objective.begin(self.policy, batch.micro_batches, batch.mismatched)
                for micro_batch in batch.micro_batches:
                    sums[1:] += objective(self.policy, micro_batch)[1]
                    sums[0] += objective.weight(micro_batch)
                feed.prepare_next()
        collectives.reduce_data(sums)
        means = sums[1:] / sums[0]
        if not means.isfinite().all():
            name, value = objective.names[0], means[0].item()
            raise TrainingError(f"evaluation at step {step}: {name} {value} must be finite")
        return objective.shown(metrics.named(objective.names, means))

    def _look_around(self, step: int) -> None:
        """Does what is due between two forwards."""
        self.peers.progress(step)
        self.writer.commit_if_written()

    def state(self, evaluation_due: bool = False) -> dict:
        """Returns what this rank's part of a checkpoint keeps beside the engine's state."""
        course = {} if self.course is None else {COURSE: self.course.state()}
        return {"objective": self.objective.state(), EVALUATION_DUE: evaluation_due, **course}

    def _save_and_stop(self, step: int, reason: str, evaluation_due: bool = False) -> None:
        """Ends the run between two steps, with all that was done until `step` in a checkpoint."""
        self.writer.save_and_stop(self.policy.engine, step, self.state(evaluation_due), reason)

    def _feed(self, batches: Iterable[tuple[int, np.ndarray]], data) -> Feed:
        mismatches = self.objective.needs_mismatches
        place = collectives.data_rank(), collectives.data_ranks()
        return Feed(batches, data, self.layout, *place, self.policy.device, mismatches)

    def _agree(self, sums: Tensor | Sequence[float], following: LocalBatch | None) -> None:
        """Sums over the ranks what each of them knows, all in one message. All ranks enter."""
        micro_batches = [] if following is None else following.micro_batches
        peaks = [0] * self.world_size  # a place for every rank's
        peaks[self.rank] = metrics.peak_memory_bytes(self.policy.device)
        counts = [
            sum(map(self.objective.weight, micro_batches)),
            sum(micro_batch.num_tokens for micro_batch in micro_batches),
            sum(len(micro_batch.targets) for micro_batch in micro_batches),
        ]
        if collectives.sequence_place() > 0:  # the first of the group has told them
            sums, counts = [0.0] * len(sums), [0] * len(counts)
        parts = [torch.as_tensor(part, dtype=torch.float64) for part in (sums, counts, self.stop.told(), peaks)]
        together = torch.cat([part.to(self.policy.device) for part in parts])
        found = collectives.reduce_sum(together).split([len(part) for part in parts])
        sums, counts, told, peaks = (part.tolist() for part in found)
        self.agreed = Agreed(sums, *map(int, counts), int(max(peaks)), stop_reason(told))

    def _check_finite(
        self, step: int, means: Sequence[float], grad_norm: float, losses: Sequence[tuple[Tensor, Batch]]
    ) -> None:
        """Stops every rank at a loss or gradient that is not finite, naming the step and the pairs: those of the
        micro-batches whose loss is not finite; all where only the gradient is.
        """
        if all(map(math.isfinite, (*means, grad_norm))):
            return
        told = losses if collectives.sequence_place() == 0 else []
        mine = [
            (self.data.location(row), bool(loss.isfinite())) for loss, batch in told for row in batch.indices
        ]
        all_pairs = [pair for of_rank in collectives.gather_objects(mine) for pair in of_rank]
        pairs = [name for name, finite in all_pairs if not finite] or [name for name, _ in all_pairs]
        raise TrainingError(
            f"step {step}: loss {means[0]} and gradient norm {grad_norm} must be finite; among these pairs: "
            f"{', '.join(pairs[:16])}{f' and {len(pairs) - 16} more' if len(pairs) > 16 else ''}"
        )


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
