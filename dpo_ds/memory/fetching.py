"""Which weights DeepSpeed 0.19.8's stage 3 has whole at a time, by going through a step as its coordinator does.

By its source, runtime/zero/partitioned_param_coordinator.py: a module's weights are fetched when it is reached and
those of the next ones beside its computation; what it leaves behind is given back, unless it is needed again soon.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Use(NamedTuple):
    """A time that a module is reached, in a phase of the step. weights: by number. is_leaf: it is one to DeepSpeed,
    whatever is in it.
    """

    phase: str
    weights: tuple[int, ...]
    is_leaf: bool


class Limits(NamedTuple):
    """Numbers of weights: stage3_prefetch_bucket_size, stage3_max_live_parameters, stage3_max_reuse_distance."""

    prefetch: int
    live: int
    reuse: int


@dataclass
class _Fetch:
    """What came together, in one buffer that stays until the last of it is waited for; a single weight is its buffer.
    """

    weights: Sequence[int]
    waiting: set[int]
    is_copied: bool = False


@dataclass
class Coordinator:
    """Runs through `uses`, the whole of a step; sizes: numbers in each weight."""

    uses: Sequence[Use]
    sizes: Sequence[int]
    limits: Limits
    _here: set[int] = field(default_factory=set)  # or under way
    _fetches: list[_Fetch] = field(default_factory=list)
    _wanted_at: dict[int, int] = field(default_factory=dict)  # the last use that a weight was fetched for

    def peaks(self) -> Mapping[str, tuple[int, int]]:
        """Returns in each phase how many numbers weights take when it is most: whole ones, and transfer buffers."""
        found: dict[str, tuple[int, int]] = {}
        queue = deque((weight, at) for at, use in enumerate(self.uses) for weight in use.weights)
        for at, use in enumerate(self.uses):
            self._fetch([weight for weight in use.weights if weight not in self._here])
            self._wait(use.weights)
            self._prefetch(queue, at, use.weights)
            found[use.phase] = max(found.get(use.phase, (0, 0)), self._held(), key=sum)
            self._release(at + 1, use)
        return found

    def _fetch(self, weights: Sequence[int]) -> None:
        if weights:
            self._here.update(weights)
            self._fetches.append(_Fetch(weights, set(weights)))

    def _wait(self, weights: Sequence[int]) -> None:
        for fetch in self._fetches:
            if not fetch.waiting.isdisjoint(weights):
                fetch.is_copied = True
                fetch.waiting.difference_update(weights)
        self._fetches = [fetch for fetch in self._fetches if fetch.waiting]

    def _prefetch(self, queue: deque[tuple[int, int]], at: int, weights: Sequence[int]) -> None:
        new, seen = {weight for weight in weights if self._wanted_at.get(weight, -1) < at}, set()
        while queue and seen < new:
            weight, wanted = queue.popleft()
            self._wanted_at[weight] = wanted
            seen.add(weight)
        taken: list[int] = []
        room = min(self.limits.live - self._total(self._here), self.limits.prefetch)
        while queue and self._total(taken) < room:
            weight, wanted = queue.popleft()
            self._wanted_at[weight] = max(self._wanted_at.get(weight, -1), wanted)
            if weight not in self._here and weight not in taken:
                taken.append(weight)
        self._fetch(taken)

    def _held(self) -> tuple[int, int]:
        """Counts what is under way as a buffer."""
        buffers = [fetch for fetch in self._fetches if len(fetch.weights) > 1 or not fetch.is_copied]
        under_way = {weight for fetch in buffers if not fetch.is_copied for weight in fetch.weights}
        return self._total(self._here - under_way), sum(self._total(fetch.weights) for fetch in buffers)

    def _release(self, after: int, use: Use) -> None:
        """Gives a module's weights back but those that were fetched for later, or are used again soon."""
        gone = {weight for weight in use.weights if self._wanted_at[weight] < after}
        passed = 0
        for later in self.uses[after:]:
            if passed >= self.limits.reuse or not gone:
                break
            if use.is_leaf or not later.is_leaf:  # it looks into leaves from leaves alone
                gone.difference_update(later.weights)
                passed += self._total(later.weights)
        self._here -= gone

    def _total(self, weights) -> int:
        return sum(self.sizes[weight] for weight in weights)
