"""data.group prompt: rows of one prompt come together, so that it is computed once and each of its completions once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dpo_ds.batch import NO_COMPARISON, Group

MOST = 16  # completions of a gathered group: a group is in one micro-batch, whatever the budget


def gathered(prompts: Iterator[bytes], row: Callable[[int], Group]) -> Iterator[tuple[int, Group]]:
    """Yields, in the order of the rows, each first row of a prompt with the group that it and its other rows make.

    prompts: the token ids of every row's prompt. Completions of equal tokens are one; every comparison is kept, those
    of the same better completion side by side.
    """
    rows_of: dict[bytes, list[int]] = {}
    for number, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(number)
    for rows in rows_of.values():
        for group in _joined([row(number) for number in rows]):
            yield rows[0], group


def _joined(groups: Sequence[Group]) -> Iterator[Group]:
    """Yields groups of at most MOST completions, or as many as one row has."""
    known: dict[tuple, int] = {}
    taken: list[Group] = []
    for group in groups:
        keys = [_key(group, i) for i in range(len(group.completions))]
        if taken and len(known.keys() | set(keys)) > MOST:
            yield _one(taken, known)
            known, taken = {}, []
        for key in keys:
            known.setdefault(key, len(known))
        taken.append(group)
    yield _one(taken, known)


def _one(groups: Sequence[Group], known: dict[tuple, int]) -> Group:
    completions, masks, labels = [None] * len(known), [None] * len(known), np.zeros(len(known), bool)
    comparisons, margins = [NO_COMPARISON], []
    for group in groups:
        places = np.array([known[_key(group, i)] for i in range(len(group.completions))])
        for place, ids, mask in zip(places.tolist(), group.completions, group.masks, strict=True):
            completions[place], masks[place] = ids, mask
        comparisons.append(places[group.comparisons])
        margins += [] if group.margins is None else [group.margins]
        if group.labels is not None:
            labels[places] = group.labels
    together = np.concatenate(comparisons)
    order = np.lexsort((together[:, 1], together[:, 0]))
    return Group(
        groups[0].prompt,
        tuple(completions),
        tuple(masks),
        together[order],
        np.concatenate(margins)[order] if margins else None,
        None if groups[0].labels is None else labels,
    )


def _key(group: Group, i: int) -> tuple:
    """Two completions are one where tokens, masks and what is said of them are the same."""
    label = None if group.labels is None else bool(group.labels[i])
    return group.completions[i].tobytes(), group.masks[i].tobytes(), label
