"""The loop of `dpo-ds rl`: draw, score, measure, update; all ranks run it together.

A step is an iteration: of train.global_batch_size prompts, rl.n completions each, rl.epochs passes over them in
rl.minibatches updates.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dpo_ds.checkpoint import faultpoints
from dpo_ds.checkpoint.writer import CheckpointWriter
from dpo_ds.cluster import collectives
from dpo_ds.cluster.stopping import StopFlag
from dpo_ds.cluster.watchdog import PeerWatch, Silent
from dpo_ds.config import RlConfig
from dpo_ds.data.batching import Layout, global_batches, steps_per_epoch
from dpo_ds.data.prompts import Prompt
from dpo_ds.errors import TrainingError
from dpo_ds.training import metrics
from dpo_ds.training.profile import StepProfile
from dpo_ds.training.rl.experience import NATS, Measured, Models, micro_batches
from dpo_ds.training.rl.kl import AdaptiveKL, FixedKL
from dpo_ds.training.rl.learners import Learner
from dpo_ds.training.rl.rollouts import Rollout, Sampler, penalised
from dpo_ds.training.rl.samples import best_of, keep_samples
from dpo_ds.training.schedule import learning_rate, total_steps
from dpo_ds.training.tracking import Tracker
from dpo_ds.training.trainer import is_due

TOLD = ("score", "reward", "kl", "entropy", "completion_tokens", "unfinished")  # what a model card tells of a run
CRITIC = "critic"  # in the names of its files in a checkpoint
EVALUATION = 0  # in place of an iteration's number, so that every evaluation draws with the same random numbers


@dataclass(frozen=True)
class Collected:
    """What an iteration has to learn from. shares: places in rollouts of each minibatch; measured: this rank's part of
    them; scores: penalties taken off; seconds: of each phase.
    """

    rollouts: list[Rollout]
    scores: list[np.ndarray]
    shares: list[list[int]]
    measured: list[list[Measured]]
    told: dict[str, float]
    seconds: dict[str, float]


class RlTrainer:
    """Runs iterations first_step..total_steps; `held_out` may be empty."""

    def __init__(
        self, models: Models, sampler: Sampler, learner: Learner, prompts: Sequence[Prompt], held_out: Sequence[Prompt],
        layout: Layout, run: RlConfig, writer: CheckpointWriter, tracker: Tracker | None, stop: StopFlag,
        peers: PeerWatch | Silent, profile: StepProfile,
    ):  # fmt: skip
        self.models, self.policy, self.sampler, self.learner = models, models.policy, sampler, learner
        self.prompts, self.held_out, self.layout, self.run = prompts, held_out, layout, run
        self.writer, self.tracker, self.stop, self.peers, self.profile = writer, tracker, stop, peers, profile
        self.kl = FixedKL(run.rl.beta) if run.rl.target_kl is None else AdaptiveKL(run.rl.beta, run.rl.target_kl)
        self.sources = [(0, len(prompts), 1.0)]
        self.per_epoch = steps_per_epoch(self.sources, run.train.global_batch_size)
        self.total_steps = total_steps(self.sources, run.train)
        self.last_metrics: dict[str, float] = {}

    def train(self, first_step: int) -> None:
        """Iterates from `first_step` on, with evaluations and checkpoints between and after."""
        batches = global_batches(self.sources, self.run.train.seed, self.run.train.global_batch_size, first_step)
        for step, rows in itertools.takewhile(lambda batch: batch[0] <= self.total_steps, batches):
            started = time.perf_counter()
            self.between_phases(step)
            with self.profile.around(step):
                collected = self.collect(step, rows.tolist())
                update = self.update(step, collected)
            self.log(step, collected, update, time.perf_counter() - started)
            self.kl = self.kl.after(collected.told["kl"])
            self.evaluate_and_save(step)
        self.profile.finish()

    def between_phases(self, step: int) -> None:
        """Tells the watchdog that `step` goes on, commits a checkpoint that is written by now, and stops if any rank
        was told to: no update of this iteration is made, so the one before is what is saved.
        """
        self.peers.progress(step)
        self.writer.commit_if_written()
        if reason := self.stop.agreed(self.policy.device):
            self.writer.save_and_stop(self.policy.engine, step - 1, self._state(), reason, beside=self._beside())

    def collect(self, step: int, rows: Sequence[int]) -> Collected:
        """Draws, scores and measures an iteration's completions."""
        clock = Clock()
        rollouts = self.sampler.draw(self.prompts, rows, self.run.rl.n, step)
        clock.lap("generation_seconds")
        faultpoints.reach("completions-drawn")
        self.between_phases(step)
        rollouts = self.sampler.score(rollouts)
        clock.lap("scoring_seconds")
        faultpoints.reach("completions-scored")
        self.between_phases(step)
        shares = [list(map(int, part)) for part in np.array_split(np.arange(len(rows)), self.run.rl.minibatches)]
        shares = [share for share in shares if share]  # the last iteration of an epoch may have few prompts
        measured, nats = self.measure(self.models, rollouts, shares)
        clock.lap("measuring_seconds")
        scores = penalised(rollouts, self.run.rl.unfinished_penalty, self.run.rl.center_scores)
        told = described(rollouts) | nats
        told["reward"] = told["score"] - self.run.rl.unfinished_penalty * told["unfinished"] - self.kl.beta * nats["kl"]
        return Collected(rollouts, scores, shares, measured, told, clock.laps)

    def measure(
        self, models: Models, rollouts: Sequence[Rollout], shares: Sequence[Sequence[int]]
    ) -> tuple[list[list[Measured]], dict[str, float]]:
        """Returns this rank's micro-batches of every share, measured, and over all of them the means of NATS: KL a
        completion and entropy a token. All ranks enter.
        """
        groups = [rollout.group(place) for place, rollout in enumerate(rollouts)]
        of_shares = [micro_batches([groups[place] for place in share], self.layout) for share in shares]
        measured = [models.measure(batches) for batches in of_shares]
        nats = collectives.reduce_data(sum(one.nats() for share in measured for one in share)).tolist()
        lengths = np.concatenate([rollout.lengths for rollout in rollouts])
        counts = len(lengths), lengths.sum()
        return measured, {name: total / float(count) for name, total, count in zip(NATS, nats, counts, strict=True)}

    def update(self, step: int, collected: Collected) -> dict[str, float]:
        """Makes rl.epochs passes of updates, each in a new order; returns means over them, by name. All ranks enter."""
        minibatches, told = self.learner.minibatches(
            collected.shares, collected.rollouts, collected.scores, collected.measured, self.kl.beta
        )
        counts = torch.tensor([self.learner.weight(own) for own in minibatches], device=self.policy.device)
        weights = collectives.reduce_data(counts).tolist()
        train, found = self.run.train, []

        def rate_of(peak: float) -> float:
            return learning_rate(step, train, self.total_steps, peak)

        for epoch in range(self.run.rl.epochs):
            for place in np.random.default_rng([train.seed, step, epoch, 1]).permutation(len(minibatches)).tolist():
                if not weights[place]:
                    continue  # nothing to compare in any of its groups
                self.peers.progress(step)
                faultpoints.reach("before-update")
                means, norm = self.learner.update(minibatches[place], weights[place], rate_of, self.kl.beta)
                self._check_finite(step, means, norm, [collected.rollouts[own] for own in collected.shares[place]])
                found.append([*means, norm])
        means = np.mean(found, axis=0).tolist() if found else [0.0] * (len(self.learner.names) + 1)
        named = dict(zip((*self.learner.names, "grad_norm"), means, strict=True))
        return named | told | {"learning_rate": rate_of(train.learning_rate), "updates": len(found)}

    def log(self, step: int, collected: Collected, update: dict[str, float], seconds: float) -> None:
        """Hands the iteration's metrics to the tracker, and keeps its completions where that is due."""
        peak = collectives.reduce_max(metrics.peak_memory_bytes(self.policy.device), self.policy.device)
        lengths = np.concatenate([rollout.lengths for rollout in collected.rollouts])
        seen = self.run.rl.epochs * (sum(len(own.prompt.ids) for own in collected.rollouts) + int(lengths.sum()))
        updating = seconds - sum(collected.seconds.values())
        line = {
            **update,
            **collected.told,
            "beta": self.kl.beta,
            "epoch": step / self.per_epoch,
            "prompts": len(collected.rollouts),
            "tokens": int(lengths.sum()),
            **collected.seconds,
            "update_seconds": updating,
            "generation_tokens_per_second": float(lengths.sum()) / collected.seconds["generation_seconds"],
            "update_tokens_per_second": seen / updating,
            "step_seconds": seconds,
            "peak_memory_bytes": int(peak),
        }
        self.last_metrics = update | collected.told
        if self.tracker is None:
            return
        self.tracker.step({"step": step, **line})
        if is_due(step, self.run.rl.samples_every):
            keep_samples(self.writer.folder.parent, step, collected.rollouts)
            self.tracker.samples(step, best_of(collected.rollouts))

    def evaluate_and_save(self, step: int) -> None:
        """Evaluates and saves where either is due after `step`."""
        is_last = step == self.total_steps
        if self.held_out and (is_last or is_due(step, self.run.train.eval_every)):
            started = time.perf_counter()
            evaluation = {f"eval_{name}": mean for name, mean in self.evaluate().items()}
            self.last_metrics = self.last_metrics | evaluation
            if self.tracker:
                size = {"eval_prompts": len(self.held_out), "eval_seconds": time.perf_counter() - started}
                self.tracker.evaluation({"step": step, "epoch": step / self.per_epoch, **evaluation, **size})
        if is_last or is_due(step, self.run.checkpoint.every):
            self.writer.save(self.policy.engine, step, self._state(), wait=is_last, beside=self._beside())

    def evaluate(self) -> dict[str, float]:
        """Means over one completion of every held-out prompt, always from the same random numbers. All ranks enter."""
        rollouts = self.sampler.score(self.sampler.draw(self.held_out, range(len(self.held_out)), 1, EVALUATION))
        size = self.run.train.global_batch_size * self.run.rl.n
        shares = [range(start, min(start + size, len(rollouts))) for start in range(0, len(rollouts), size)]
        return described(rollouts) | self.measure(replace(self.models, critic=None), rollouts, shares)[1]

    def load_state(self, states: Sequence[dict[str, Any]]) -> None:
        """Takes back what every rank that saved kept beside the engines, in their order."""
        self.kl = replace(self.kl, beta=states[0]["beta"])
        self.learner.load_state([state["learner"] for state in states])

    def _state(self) -> dict[str, Any]:
        return {"beta": self.kl.beta, "learner": self.learner.state()}

    def _beside(self) -> dict[str, Any]:
        """Returns the engines that are trained beside the policy's."""
        return {} if self.models.critic is None else {CRITIC: self.models.critic.engine}

    def _check_finite(self, step: int, means: Sequence[float], norm: float, rollouts: Sequence[Rollout]) -> None:
        if all(map(math.isfinite, (*means, norm))):
            return
        prompts = [rollout.prompt.location for rollout in rollouts]
        more = f" and {len(prompts) - 16} more" if len(prompts) > 16 else ""
        raise TrainingError(
            f"step {step}: loss {means[0]} and gradient norm {norm} must be finite; in an update with these prompts: "
            f"{', '.join(prompts[:16])}{more}"
        )


class Clock:
    """Takes the seconds of one phase after another."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._since = now - self._since, now


def described(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over completions of what needs no model: the score as it was given, tokens, the share that did not end."""
    scores, lengths, finished = (
        np.concatenate([getattr(rollout, name) for rollout in rollouts]) for name in ("scores", "lengths", "finished")
    )
    return {
        "score": float(scores.mean()),
        "score_std": float(scores.std()),
        "completion_tokens": float(lengths.mean()),
        "unfinished": 1 - float(finished.mean()),
    }

