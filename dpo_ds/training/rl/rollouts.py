"""What the policy draws in an iteration, by all ranks together, and what it is worth.

A completion's randomness comes from seed, iteration and the prompt's number alone. Prompts are drawn in shards that do
not depend on the ranks, so that any number of them gets the same completions of the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dpo_ds.batch import Group
from dpo_ds.checkpoint import faultpoints
from dpo_ds.cluster import collectives, rendezvous
from dpo_ds.config import GenerationSection, RlSection
from dpo_ds.data.prompts import Prompt
from dpo_ds.models.engine import Policy, Replica
from dpo_ds.models.generation import Completion, Generator, in_rounds
from dpo_ds.models.scoring import Scorer


@dataclass(frozen=True)
class Rollout:
    """A prompt with its completions. row: the prompt's number; scores [n] float64, as they were given: None before."""

    row: int
    prompt: Prompt
    completions: Sequence[Completion]
    scores: np.ndarray | None = None

    def group(self, index: int) -> Group:
        ids = tuple(completion.ids for completion in self.completions)
        return Group(self.prompt.ids, ids, tuple(np.ones(len(own), bool) for own in ids), index=index)

    @property
    def finished(self) -> np.ndarray:  # [n] bool
        return np.array([completion.finished for completion in self.completions])

    @property
    def lengths(self) -> np.ndarray:  # [n]
        return np.array([len(completion.ids) for completion in self.completions])


class Sampler:
    """Draws completions from a policy and has them scored. All ranks enter both.

    replica: a whole copy on every rank to draw from; None: the policy itself is drawn from, under ZeRO-3.
    """

    def __init__(
        self, policy: Policy, tokenizer: Any, scorer: Scorer, settings: RlSection, seed: int,
        replica: Replica | None = None,
    ):  # fmt: skip
        self.policy, self.scorer, self.settings, self.seed, self.replica = policy, scorer, settings, seed, replica
        how = {name: getattr(settings, name) for name in ("max_new_tokens", "temperature", "batch_size")}
        self._generator = Generator(replica or policy, tokenizer, GenerationSection(**how), together=replica is None)
        self._generator.report = self._batch_drawn

    def draw(self, prompts: Sequence[Prompt], rows: Sequence[int], n: int, iteration: int) -> list[Rollout]:
        """Returns n completions of each of these rows of `prompts`, without scores, on every rank.

        Raises:
            UserError: on every rank, where the model cannot be drawn from on any.
        """
        order = sorted(range(len(rows)), key=lambda place: (-len(prompts[rows[place]].ids), place))
        size = max(1, self.settings.batch_size // n)
        shards = [order[start : start + size] for start in range(0, len(order), size)]  # like lengths share a batch
        own: dict[int, list[Completion]] = {}
        if self.replica is not None:
            self.replica.follow(self.policy)
        # A compiled layer would be compiled again for the cache of every length.
        with self.policy.evaluating(), torch.compiler.set_stance("force_eager"):
            for shard in in_rounds(shards, collectives.rank(), collectives.world_size()):
                numbers = [rows[place] for place in shard or ()]
                seeds = [(self.seed, iteration, row) for row in numbers]
                with collectives.raising_together():  # in every round, or the others would wait in the next
                    drawn = self._generator.draw([prompts[row].ids for row in numbers], n, seeds)
                own |= zip(shard or (), drawn, strict=True)
        whole = {place: found for part in collectives.gather_objects(own) for place, found in part.items()}
        return [Rollout(row, prompts[row], whole[place]) for place, row in enumerate(rows)]

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Returns them with scores, each rank having asked for its share.

        Raises:
            UserError: on every rank, where the scorer fails on any.
        """
        rank, ranks = collectives.rank(), collectives.world_size()
        own = rollouts[rank::ranks]
        texts = [(rollout.prompt.text, one.text) for rollout in own for one in rollout.completions]
        with collectives.raising_together():
            scores = self.scorer([prompt for prompt, _ in texts], [completion for _, completion in texts])
        parts = collectives.gather_objects(np.asarray(scores, dtype=np.float64))
        found: list[np.ndarray] = [np.zeros(0)] * len(rollouts)
        for other, part in enumerate(parts):
            counts = [len(rollout.completions) for rollout in rollouts[other::ranks]]
            found[other::ranks] = np.split(part, np.cumsum(counts)[:-1]) if counts else []
        return [replace(rollout, scores=own) for rollout, own in zip(rollouts, found, strict=True)]

    def _batch_drawn(self, tokens: int, completions: int) -> None:
        rendezvous.peers().progress()
        faultpoints.reach("batch-drawn")


def penalised(rollouts: Sequence[Rollout], penalty: float, center: bool = False) -> list[np.ndarray]:
    """Scores [n] of each, less what a completion pays that has not ended; center: of mean 0 before, as section 3 of
    arXiv 2305.18290 normalises rewards, the mean over the prompt's n in place of the expectation.
    """
    return [own.scores - center * own.scores.mean() - penalty * ~own.finished for own in rollouts]
