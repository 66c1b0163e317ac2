"""Completes a few prompts by the policy while it trains, for people to read: what no metric tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_ds.cluster import collectives, rendezvous
from dpo_ds.config import CompletionsSection
from dpo_ds.data.prompts import Prompt

if TYPE_CHECKING:
    from dpo_ds.models.engine import Policy


class Sample(NamedTuple):
    """A completion to read. finished: it came to its end within sample.max_new_tokens; tokens: of the completion."""

    prompt: str
    completion: str
    finished: bool
    tokens: int


class Sampler:
    """Draws one completion of each prompt; the same draws every time, so that what differs is the policy.

    Training does not notice: draws come from sample.seed and a prompt's number alone, without torch's generators.
    """

    def __init__(self, policy: Policy, tokenizer: Any, prompts: Sequence[Prompt], settings: CompletionsSection):
        from dpo_ds.models.generation import Generator

        self._policy, self._prompts = policy, prompts
        self._generator = Generator(policy, tokenizer, settings, together=True)

    def __call__(self, step: int) -> list[Sample]:
        """Returns all completions, in the order of prompts, on every rank, `step` being done. All ranks enter.

        Raises:
            UserError: on every rank, where the policy cannot be drawn from.
        """
        ranks, rank = collectives.world_size(), collectives.rank()
        share = -(-len(self._prompts) // ranks)
        own = self._prompts[rank * share : (rank + 1) * share]
        self._generator.report = lambda *_: rendezvous.peers().progress(step)
        with self._policy.evaluating(), collectives.raising_together():
            drawn = self._generator([prompt.ids for prompt in own], 1, rank * share)
        samples = [
            Sample(prompt.text, completion.text, completion.finished, len(completion.ids))
            for prompt, (completion,) in zip(own, drawn, strict=True)
        ]
        return [sample for part in collectives.gather_objects(samples) for sample in part]
