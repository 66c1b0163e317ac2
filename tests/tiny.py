"""Small pairs and groups that tests share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from dpo_ds.batch import Group

VOCAB = 257


def random_pairs(count: int, seed: int = 0, vocab: int = VOCAB) -> list[Group]:
    """Uneven pairs: prompts of 1 to 12 tokens, completions of 1 to 9; one with an untrained turn in the middle."""
    generator = np.random.default_rng(seed)
    pairs = []
    for index in range(count):
        prompt, chosen, rejected = (generator.integers(1, high) for high in (13, 10, 10))
        if index == 0:
            prompt, chosen, rejected = 1, 1, 7
        mask = np.ones(chosen, bool)
        mask[1:3] = chosen < 5  # a user's turn inside the completion
        tokens = generator.integers(1, vocab, prompt + chosen + rejected)
        pairs.append(
            Group.pair(
                prompt=tokens[:prompt],
                chosen=tokens[prompt : prompt + chosen],
                rejected=tokens[prompt + chosen :],
                chosen_mask=mask,
                rejected_mask=np.ones(rejected, bool),
                index=index,
            )
        )
    return pairs


def random_groups(sizes: Sequence[int], seed: int = 0, vocab: int = VOCAB) -> list[Group]:
    """Uneven groups of so many completions, ranked in their order, best first."""
    generator, groups = np.random.default_rng(seed), []
    for index, size in enumerate(sizes):
        lengths = generator.integers(1, 10, size + 1)
        prompt, *completions = (generator.integers(1, vocab, n) for n in lengths)
        masks = tuple(np.ones(len(ids), bool) for ids in completions)
        better = np.array(list(itertools.combinations(range(size), 2)), np.int64).reshape(-1, 2)
        groups.append(Group(prompt, tuple(completions), masks, better, index=index))
    return groups


def as_pairs(group: Group) -> list[Group]:
    """A row a comparison, as the same data would be without groups."""
    return [
        Group.pair(group.prompt, *(part[i] for part in (group.completions, group.masks) for i in (better, worse)))
        for better, worse in group.comparisons.tolist()
    ]
