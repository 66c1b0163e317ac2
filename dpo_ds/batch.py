"""Groups of completions as token ids, and the micro-batches that a model sees.

A group is a prompt with its completions and with what is known of them: which of two is better. A preference pair is
the group of two with one comparison, a supervised row the group of one with none.

Two layouts stand behind one `Batch`: padded (every completion a row of its own behind its prompt, the oracle) and
packed (a group stored once as prompt ++ y_1 ++ ... ++ y_n, groups end to end, no padding). Whoever computes log-probs
reads `target_rows`, `targets` and `target_counts` and need not know which layout it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PAIR = ("chosen", "rejected")  # the sides of a preference pair
CHOSEN_ONLY = ("chosen",)  # of a supervised row

NO_COMPARISON = np.zeros((0, 2), np.int64)
OF_A_PAIR = np.array([[0, 1]])  # the first is better than the second


@dataclass(frozen=True)
class Group:
    """A tokenised prompt and what each completion goes on with.

    prompt [P], completions [n][C_i]: int64 token ids. masks [n][C_i]: bool, true where a token is trained on (user
    turns inside a completion are not). comparisons [K, 2] int64: the better and the worse completion, those of the same
    better one adjacent. margins [K] float32: how much better it is, where that was asked for; else None. labels [n]
    bool: said to be desirable; None where nothing is said. `index` is the row in the tokenised data set.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    masks: tuple[np.ndarray, ...]
    comparisons: np.ndarray = field(default_factory=lambda: NO_COMPARISON)
    margins: np.ndarray | None = None
    labels: np.ndarray | None = None
    index: int = -1

    @classmethod
    def pair(
        cls, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, chosen_mask: np.ndarray,
        rejected_mask: np.ndarray, index: int = -1,
    ) -> Group:  # fmt: skip
        return cls(prompt, (chosen, rejected), (chosen_mask, rejected_mask), OF_A_PAIR, index=index)

    @property
    def chosen(self) -> np.ndarray:
        """The better completion of a pair, the only one of a supervised row."""
        return self.completions[0]

    @property
    def rejected(self) -> np.ndarray:
        return self.completions[1]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))

    def target_positions(self, i: int) -> np.ndarray:
        """Positions inside completion `i` whose token is trained on; a token that nothing precedes cannot be
        predicted.
        """
        positions = np.flatnonzero(self.masks[i])
        return positions if len(self.prompt) else positions[positions > 0]


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of both sides of comparisons, summed over each completion's trained tokens, and how many tokens those
    are; all [comparisons]: one a pair.

    The sums are float32; counts are int64. margins [comparisons] float32: how much better chosen is, None where that
    was not asked for. rivals: how many comparisons each completion is chosen in, one after another, int64; None: one
    each.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    margins: Tensor | None = None
    rivals: Tensor | None = None

    @property
    def logratio(self) -> Tensor:  # [comparisons]
        return self.chosen - self.rejected


class Segment(NamedTuple):
    """Places one group in a packed row: from `start` on its prompt and completions, of these lengths."""

    start: int
    prompt: int
    completions: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + self.prompt + sum(self.completions)

    @property
    def ends(self) -> list[int]:
        """Where each completion ends."""
        return list(accumulate(self.completions, initial=self.start + self.prompt))[1:]


@dataclass(frozen=True)
class Part:
    """One rank's share of a packed row that is spread over several: `length` tokens from `start` on.

    All shares are equally long, so the last ones may end in padding; segments: of the whole row with that padding, a
    prompt without completions. input_ids, position_ids: [1, length]. rows [n]: those of the share that predict a
    target; places [n]: which of the batch's targets these are.
    """

    start: int
    length: int
    segments: tuple[Segment, ...]
    input_ids: Tensor
    position_ids: Tensor
    rows: Tensor
    places: Tensor

    def of_row(self, values: Tensor) -> Tensor:  # [tokens] or [1, tokens] -> [length] or [1, length]
        """Returns the share of what is known of every token of the row, 0 for padding."""
        return _share(values, self.start, self.length)


@dataclass(frozen=True)
class Batch:
    """A micro-batch in either layout.

    input_ids, position_ids: [rows, length]. attention_mask: [rows, length] bool, padded layout only. segments: one per
    group, packed layout only (rows is 1). target_rows [N]: index into the flattened [rows * length] hidden states of
    the row that predicts `targets` [N]. target_counts [completions]: how N splits into completions, those of a group
    adjacent. comparisons [K, 2]: the better and the worse completion, among all of the batch; margins [K] float32 or
    None; rivals: how many comparisons each completion is better in, one after another; shares [K] float32: 1 over the
    comparisons of the same group; labels [completions] bool: said to be desirable, or better than another. group_sizes:
    completions of each group. num_tokens counts each prompt once, padding never. indices: rows of the data set. part:
    this rank's share of the tokens, None where it computes all of them.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    segments: tuple[Segment, ...] | None
    target_rows: Tensor
    targets: Tensor
    target_counts: Tensor
    comparisons: Tensor
    margins: Tensor | None
    rivals: Tensor
    shares: Tensor
    labels: Tensor
    group_sizes: tuple[int, ...]
    num_tokens: int
    indices: tuple[int, ...]
    part: Part | None = None

    @property
    def num_comparisons(self) -> int:
        return len(self.comparisons)

    def to(self, device: torch.device | str) -> Batch:
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Returns a copy in page-locked memory, from which a GPU takes it while the host goes on."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        part = None if self.part is None else _changed(self.part, change)
        return replace(_changed(self, change), part=part)

    def spread(self, ranks: int, place: int) -> Batch:
        """Returns the same packed batch for the `place`-th of so many ranks that compute it together."""
        total = self.input_ids.shape[1]
        length = -(-total // ranks)
        start, padding = place * length, ranks * length - total
        mine = (self.target_rows >= start) & (self.target_rows < start + length)
        segments = self.segments + ((Segment(total, padding, ()),) if padding else ())
        ids = [_share(whole, start, length) for whole in (self.input_ids, self.position_ids)]
        rows, places = self.target_rows[mine] - start, mine.nonzero()[:, 0]
        return replace(self, part=Part(start, length, segments, *ids, rows, places))

    def pair_logps(self, token_logps_N: Tensor) -> PairLogps:
        """Sums for both sides of every comparison; `token_logps_N` in the order of `targets`."""
        return self.compared(sum_per_sequence(token_logps_N, self.target_counts))

    def compared(self, sums: Tensor) -> PairLogps:
        """Puts sums [completions] side by side, with the counts of their tokens. A completion may be in several
        comparisons: indexing adds up its gradients in one order, index_select would not."""
        better, worse = self.comparisons.unbind(1)
        counts = self.target_counts
        return PairLogps(sums[better], sums[worse], counts[better], counts[worse], self.margins, self.rivals)


def _share(values: Tensor, start: int, length: int) -> Tensor:
    own = values[..., start : start + length]
    return torch.nn.functional.pad(own, (0, length - own.shape[-1]))


def _changed(holder: Any, change: Callable[[Tensor], Tensor]) -> Any:
    tensors = {name: value for name, value in vars(holder).items() if isinstance(value, Tensor)}
    return replace(holder, **{name: change(tensor) for name, tensor in tensors.items()})


def sum_per_sequence(values_N: Tensor, counts: Tensor) -> Tensor:
    """Sums of consecutive runs of `values_N`, float32; `counts` are the runs' lengths. Deterministic on every
    device.
    """
    if values_N.numel() == 0:  # keeps the graph: an empty micro-batch still takes part in ZeRO-3's backward
        return values_N.sum() + values_N.new_zeros(len(counts))
    return torch.segment_reduce(values_N.float(), "sum", lengths=counts, unsafe=True)


def padded_batch(groups: Sequence[Group]) -> Batch:
    """Every completion of every group a row of its own behind its prompt, padded on the right, in the order of groups.

    Pad positions hold token 0 and are never a target. No groups give one token and no target: the rank that has none
    left still takes part in every collective.
    """
    sequences = [(group, i, np.concatenate([group.prompt, ids])) for group in groups
                 for i, ids in enumerate(group.completions)]  # fmt: skip
    length = max((len(ids) for _, _, ids in sequences), default=1)
    input_ids = np.zeros((max(len(sequences), 1), length), dtype=np.int64)
    mask = np.zeros_like(input_ids, dtype=bool)
    rows, targets, counts = [], [], []
    for row, (group, i, ids) in enumerate(sequences):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
        positions = len(group.prompt) + group.target_positions(i)
        rows.append(row * length + positions - 1)
        targets.append(ids[positions])
        counts.append(len(positions))
    if not sequences:
        mask[0, 0] = True
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(length).expand(len(input_ids), length).contiguous(),
        attention_mask=torch.from_numpy(mask),
        segments=None,
        target_rows=_int64(rows),
        targets=_int64(targets),
        target_counts=torch.tensor(counts, dtype=torch.int64),
        **_known(groups),
    )


def packed_batch(groups: Sequence[Group]) -> Batch:
    """One row without padding: prompt ++ y_1 ++ ... ++ y_n of group 0, of group 1, ...; a completion's positions begin
    behind the prompt, whose last row predicts the first token of each. Needs the packed attention, which hides the
    completions of a group from each other.
    """
    ids, positions, segments, rows, targets, counts = [], [], [], [], [], []
    start = 0
    for group in groups:
        prompt = len(group.prompt)
        ids.append(group.prompt)
        positions.append(np.arange(prompt))
        offset = start + prompt
        for i, completion in enumerate(group.completions):
            wanted = group.target_positions(i)
            ids.append(completion)
            positions.append(prompt + np.arange(len(completion)))
            rows.append(np.where(wanted > 0, offset + wanted - 1, start + prompt - 1))
            targets.append(completion[wanted])
            counts.append(len(wanted))
            offset += len(completion)
        segments.append(Segment(start, prompt, tuple(map(len, group.completions))))
        start = offset
    if not groups:  # one token that nobody reads, as in padded_batch
        ids, positions, segments = [[0]], [[0]], [Segment(0, 1, ())]
    return Batch(
        input_ids=_int64(ids)[None],
        position_ids=_int64(positions)[None],
        attention_mask=None,
        segments=tuple(segments),
        target_rows=_int64(rows),
        targets=_int64(targets),
        target_counts=torch.tensor(counts, dtype=torch.int64),
        **_known(groups),
    )


def _known(groups: Sequence[Group]) -> dict[str, Any]:
    """Returns what a batch holds of its groups in either layout."""
    sizes = [len(group.completions) for group in groups]
    firsts = np.cumsum([0, *sizes])
    comparisons = [group.comparisons + first for group, first in zip(groups, firsts, strict=False)]
    together = np.concatenate([NO_COMPARISON, *comparisons]).astype(np.int64)
    starts = np.flatnonzero(np.diff(together[:, 0], prepend=-1))
    counts = np.array([len(group.comparisons) for group in groups], np.int64)
    margins = [group.margins for group in groups if group.margins is not None]
    labels = np.zeros(sum(sizes), bool)
    labels[together[:, 0]] = True
    for group, first in zip(groups, firsts, strict=False):
        if group.labels is not None:
            labels[first : first + len(group.labels)] = group.labels
    return {
        "labels": torch.from_numpy(labels),
        "comparisons": torch.from_numpy(together),
        "rivals": torch.from_numpy(np.diff([*starts, len(together)]).astype(np.int64)),
        "shares": torch.from_numpy(np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)),
        "margins": torch.from_numpy(np.concatenate(margins).astype(np.float32)) if margins else None,
        "group_sizes": tuple(sizes),
        "num_tokens": sum(group.num_tokens for group in groups),
        "indices": tuple(group.index for group in groups),
    }


def _int64(arrays: list) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64) if arrays else np.zeros(0, np.int64))
