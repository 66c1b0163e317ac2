"""Adds the auxiliary loss of a mixture of experts' routers to whatever a run minimises (models/layers/routers)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_ds.batch import Batch
from dpo_ds.cluster import collectives
from dpo_ds.models.engine import Policy
from dpo_ds.models.layers.routers import RouterBalance, Tally, coefficient_of
from dpo_ds.training.objectives.objective import Objective

ROUTER_AUX_LOSS = "router_aux_loss"  # before it is multiplied with its coefficient


class BalancedObjective:
    """Minimises what `objective` does plus coefficient times the routers' auxiliary loss over the global batch.

    The loss's gradient needs to know how often the global batch chose each expert. Where every rank has one micro-batch
    its own forward tells; where it has several, a forward of all of them without gradients comes first. All that is not
    said here, evaluation among it, is the objective's own.
    """

    def __init__(self, objective: Objective, balance: RouterBalance):
        self._objective, self._balance = objective, balance
        self._global: tuple[Tensor, Tensor, Tensor] | None = None  # of the global batch: load [E], tokens [], weight []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    @property
    def names(self) -> tuple[str, ...]:
        return *self._objective.names, ROUTER_AUX_LOSS

    def begin(self, policy: Policy, micro_batches: Sequence[Batch], mismatched: Sequence[Batch] = ()) -> None:
        self._objective.begin(policy, micro_batches, mismatched)
        self._weight, self._global = sum(map(self._objective.weight, micro_batches)), None
        if len(micro_batches) > 1:
            with policy.evaluating(), torch.no_grad(), self._balance.counting(with_gradients=False) as tallies:
                for batch in micro_batches:
                    policy.engine(batch.to(policy.device))
            self._global = self._agreed(Tally.total(tallies))

    def __call__(self, policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
        with self._balance.counting(with_gradients=True) as tallies:
            loss, sums = self._objective(policy, batch)
        tally = Tally.total(tallies)
        self._global = self._global or self._agreed(tally)
        load, tokens, weight = self._global
        probabilities = collectives.reduce_sequence(tally.probabilities)
        auxiliary = len(load) * (load * probabilities).sum() / tokens
        sums = torch.cat([sums, (auxiliary * weight)[None]])  # the trainer divides by that weight
        return self._balance.minimised(loss, load * weight, tokens), sums

    def _agreed(self, tally: Tally) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the global batch's load, tokens and weight. All ranks enter."""
        weight = self._weight if collectives.sequence_place() == 0 else 0  # tokens are spread, comparisons are not
        own = [tally.chosen, tally.tokens[None], tally.tokens.new_tensor([weight])]
        chosen, tokens, weight = collectives.reduce_sum(torch.cat(own)).split([len(tally.chosen), 1, 1])
        return chosen / tokens, tokens[0], weight[0]


def with_balanced_routers(
    objective: Objective, policy: Policy, wanted: float | None
) -> tuple[Objective | BalancedObjective, list[str]]:
    """Returns the objective with the routers' auxiliary loss, where the policy has one, and lines for the user.

    wanted: model.router_aux_loss.

    Raises:
        ModelError: a policy has no such loss that is asked for one.
    """
    coefficient = coefficient_of(policy.causal_lm, wanted)
    if not coefficient:
        return objective, []
    line = f"{type(policy.causal_lm).__name__}: routers are kept balanced, by {coefficient:g} times {ROUTER_AUX_LOSS}"
    return BalancedObjective(objective, RouterBalance(policy.engine.module, coefficient)), [line]
