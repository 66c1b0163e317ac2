"""Preference pairs as token ids, and the micro-batches that a model sees.

Two layouts stand behind one `Batch`: padded (chosen and rejected as rows of their own, the oracle) and packed (a pair
stored once as prompt ++ chosen ++ rejected, pairs end to end, no padding). Whoever computes log-probs reads
`target_rows`, `targets` and `target_counts` and need not know which layout it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PAIR = ("chosen", "rejected")  # the sides of a preference batch, in the order of `target_counts`
CHOSEN_ONLY = ("chosen",)  # the sides of a supervised batch


@dataclass(frozen=True)
class PreferencePair:
    """One tokenised pair: the tokens both sides share, then what each side goes on with.

    prompt [P], chosen [C], rejected [R]: int64 token ids. chosen_mask [C], rejected_mask [R]: bool, true where a token
    is trained on (user turns inside a completion are not). `index` is the row in the tokenised data set.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_mask: np.ndarray
    rejected_mask: np.ndarray
    index: int = -1

    def completion(self, side: str) -> np.ndarray:
        return getattr(self, side)

    def target_positions(self, side: str) -> np.ndarray:
        """Positions inside the completion whose token is trained on; a token that nothing precedes cannot be
        predicted.
        """
        positions = np.flatnonzero(getattr(self, f"{side}_mask"))
        return positions if len(self.prompt) else positions[positions > 0]


@dataclass(frozen=True)
class PairLogps:
    """Log-probs summed over each completion's trained tokens, and how many tokens those are; all [pairs].

    The sums are float32; counts are int64.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def logratio(self) -> Tensor:  # [pairs]
        return self.chosen - self.rejected


class Segment(NamedTuple):
    """Places one pair in a packed row: prompt, chosen and rejected follow each other from `start`."""

    start: int
    prompt: int
    chosen: int
    rejected: int

    @property
    def end(self) -> int:
        return self.start + self.prompt + self.chosen + self.rejected


@dataclass(frozen=True)
class Batch:
    """A micro-batch in either layout.

    input_ids, position_ids: [rows, length]. attention_mask: [rows, length] bool, padded layout only. segments: one per
    pair, packed layout only (rows is 1). target_rows [N]: index into the flattened [rows * length] hidden states of the
    row that predicts `targets` [N]. target_counts [pairs * sides]: how N splits into sequences, sides of a pair
    adjacent. num_tokens counts each prompt once, padding never. pair_indices: rows of the data set.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    segments: tuple[Segment, ...] | None
    target_rows: Tensor
    targets: Tensor
    target_counts: Tensor
    num_pairs: int
    num_tokens: int
    pair_indices: tuple[int, ...]

    def to(self, device: torch.device | str) -> Batch:
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Returns a copy in page-locked memory, from which a GPU takes it while the host goes on."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})

    def pair_logps(self, token_logps_N: Tensor) -> PairLogps:
        """Sums per side; `token_logps_N` in the order of `targets`."""
        sums = sum_per_sequence(token_logps_N, self.target_counts).view(self.num_pairs, len(PAIR))
        counts = self.target_counts.view(self.num_pairs, len(PAIR))
        return PairLogps(sums[:, 0], sums[:, 1], counts[:, 0], counts[:, 1])


def sum_per_sequence(values_N: Tensor, counts: Tensor) -> Tensor:
    """Sums of consecutive runs of `values_N`, float32; `counts` are the runs' lengths. Deterministic on every
    device.
    """
    if values_N.numel() == 0:  # keeps the graph: an empty micro-batch still takes part in ZeRO-3's backward
        return values_N.sum() + values_N.new_zeros(len(counts))
    return torch.segment_reduce(values_N.float(), "sum", lengths=counts, unsafe=True)


def padded_batch(pairs: Sequence[PreferencePair], sides: tuple[str, ...] = PAIR) -> Batch:
    """Every side of every pair a row of its own, padded on the right: chosen of pair 0, rejected of pair 0, ...

    Pad positions hold token 0 and are never a target. No pairs give one token and no target: the rank that has none
    left still takes part in every collective.
    """
    sequences = [(pair, side, np.concatenate([pair.prompt, pair.completion(side)])) for pair in pairs for side in sides]
    length = max((len(ids) for _, _, ids in sequences), default=1)
    input_ids = np.zeros((max(len(sequences), 1), length), dtype=np.int64)
    mask = np.zeros_like(input_ids, dtype=bool)
    rows, targets, counts = [], [], []
    for row, (pair, side, ids) in enumerate(sequences):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
        positions = len(pair.prompt) + pair.target_positions(side)
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
        num_pairs=len(pairs),
        num_tokens=_num_tokens(pairs, sides),
        pair_indices=tuple(pair.index for pair in pairs),
    )


def packed_batch(pairs: Sequence[PreferencePair], sides: tuple[str, ...] = PAIR) -> Batch:
    """One row without padding: prompt ++ chosen ++ rejected of pair 0, of pair 1, ...; rejected's positions restart
    after the prompt, whose last row predicts the first token of both. Needs the packed attention, which hides chosen
    from rejected.
    """
    ids, positions, segments, rows, targets, counts = [], [], [], [], [], []
    start = 0
    for pair in pairs:
        prompt = len(pair.prompt)
        lengths = {side: len(pair.completion(side)) if side in sides else 0 for side in PAIR}
        ids.append(pair.prompt)
        positions.append(np.arange(prompt))
        offset = start + prompt
        for side in sides:
            completion, wanted = pair.completion(side), pair.target_positions(side)
            ids.append(completion)
            positions.append(prompt + np.arange(len(completion)))
            rows.append(np.where(wanted > 0, offset + wanted - 1, start + prompt - 1))
            targets.append(completion[wanted])
            counts.append(len(wanted))
            offset += len(completion)
        segments.append(Segment(start, prompt, lengths["chosen"], lengths["rejected"]))
        start = offset
    if not pairs:  # one token that nobody reads, as in padded_batch
        ids, positions, segments = [[0]], [[0]], [Segment(0, 1, 0, 0)]
    return Batch(
        input_ids=_int64(ids)[None],
        position_ids=_int64(positions)[None],
        attention_mask=None,
        segments=tuple(segments),
        target_rows=_int64(rows),
        targets=_int64(targets),
        target_counts=torch.tensor(counts, dtype=torch.int64),
        num_pairs=len(pairs),
        num_tokens=_num_tokens(pairs, sides),
        pair_indices=tuple(pair.index for pair in pairs),
    )


def _num_tokens(pairs: Sequence[PreferencePair], sides: tuple[str, ...]) -> int:
    return sum(len(pair.prompt) + sum(len(pair.completion(side)) for side in sides) for pair in pairs)


def _int64(arrays: list) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64) if arrays else np.zeros(0, np.int64))
