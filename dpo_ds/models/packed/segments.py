"""The groups of one pack as attention kernels want them: blocks of queries and keys, and the rows that are seen again.

A group is a block of causal attention, queries prompt ++ y_1 against the same keys, and one more for every other
completion, whose queries must also see the prompt. There are two ways to show it to them:

- copied: the block's keys are prompt ++ y_i, so that the prompt's keys and values are laid out once more;
- merged: the block's keys are y_i alone, a second, non-causal call has the queries of all completions but the first
  against the keys prompt, and the two results are merged by their log-sum-exps (`packed.varlen`). No key is copied.

Either way a group's result depends on its own lengths alone, never on what else is in the pack.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_ds.batch import Segment

# Both ways do the same arithmetic. Copying moves a pair's keys and values some 12 times in forward and backward,
# merging moves rejected's queries, outputs and gradients some 15 times and the prompt's keys: with four query heads to
# a key head that is less from a prompt of 3.6 times rejected's length on, and the second call's launches have to pay.
# Measured on an H200 with torch's flash attention 2 (tests/benchmarks/RESULTS.md): merging takes 1.15 to 1.3 times as
# long for prompts of 100 to 512 tokens, 1.01 and 1.02 times for (prompt, completions) of (2048, 64) and (8192, 1024),
# and up to a third less memory: it is for prompts where it costs no time. With more completions both costs grow alike.
MERGED_PROMPT, MERGED_RATIO = 2048, 8


def is_merged(segment: Segment) -> bool:
    """Tells whether the other completions see their prompt by a second call or else by copied keys; by the group's
    lengths alone."""
    others = segment.completions[1:]
    return sum(others) > 0 and segment.prompt >= max(MERGED_PROMPT, MERGED_RATIO * sum(others) / len(others))


class Blocks(NamedTuple):
    """Blocks of attention: block i's queries are rows cu_queries[i] : cu_queries[i + 1], its keys cu_keys[i : i + 2].

    cu_queries, cu_keys [blocks + 1]: int32. max_queries, max_keys: of the longest block.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int


class Copies(NamedTuple):
    """Keys of which some are rows of the pack once more.

    rows: of the pack, key by key. first [T]: the key that is row t for the first time. again: the other keys and the
    rows they are, one after another the second, third, ... copies, each row at most once in each.
    """

    rows: Tensor
    first: Tensor
    again: list[tuple[Tensor, Tensor]]


class Shared(NamedTuple):
    """The second call: block i's queries are a group's completions but the first, its keys the group's prompt.
    query_rows, key_rows: of the pack, slices where only one group is merged."""

    blocks: Blocks
    query_rows: Tensor | slice
    key_rows: Tensor | slice


class PackIndex(NamedTuple):
    """own: the causal blocks, aligned bottom-right. copies: their keys; None for the rows of the pack as they are.
    shared: the second call; None where every prompt is copied or groups have one completion."""

    own: Blocks
    copies: Copies | None
    shared: Shared | None


class SegmentTable:
    """The groups of one pack and what attention derives from them, built at first use.

    handle: the segments as a flat int64 tensor on the CPU (`_numbers`). A compiled layer takes it as an input like any
    other, so that no graph depends on a batch's segments, and `table_of` leads from it back to the table.
    """

    def __init__(self, segments: tuple[Segment, ...]):
        self.segments = segments
        self.length = segments[-1].end
        with torch.inference_mode(False):
            self.handle = torch.tensor(_numbers(segments), dtype=torch.int64)
        torch._dynamo.maybe_mark_dynamic(self.handle, 0)  # or one graph for the number of groups that came first
        self._masks: dict[tuple, Tensor] = {}
        self._indices: dict[tuple, PackIndex] = {}

    def mask(self, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
        """Returns a block's additive mask [queries, keys]: 0 for keys 0 to window - 1 positions back, else -inf."""
        mask_key = (queries, keys, window, like.dtype, like.device)
        if mask_key not in self._masks:
            with torch.inference_mode(False):  # built by a reference pass, saved for backward by the policy's
                distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
                seen = (distance >= 0) & (distance < (window or keys))
                mask = torch.zeros(queries, keys, dtype=like.dtype).masked_fill_(~seen, float("-inf"))
                self._masks[mask_key] = mask.to(like.device)
        return self._masks[mask_key]

    def index(self, device: torch.device, merge: bool | None = None) -> PackIndex:
        """Returns blocks and rows on `device`. merge: groups are merged (True), copied (False), or by length (None)."""
        index_key = (device, merge)
        if index_key not in self._indices:
            with torch.inference_mode(False):
                self._indices[index_key] = self._build(device, merge)
        return self._indices[index_key]

    def _build(self, device: torch.device, merge: bool | None) -> PackIndex:
        own, own_rows, shared, shared_queries, shared_keys = [], [], [], [], []
        copy_of = []  # for every key how many keys are the same row before it
        for segment in self.segments:
            prompt = np.arange(segment.start, segment.start + segment.prompt)
            first_end = segment.start + segment.prompt + sum(segment.completions[:1])
            if first_end > segment.start:
                own.append((first_end - segment.start,) * 2)
                own_rows.append(np.arange(segment.start, first_end))
                copy_of.append(np.zeros(len(own_rows[-1]), int))
            if not segment.end - first_end:
                continue
            merged = segment.prompt > 0 and (is_merged(segment) if merge is None else merge)
            copied = 0 if merged else segment.prompt
            start, copies = first_end, 0
            for length in filter(None, segment.completions[1:]):
                copies += 1
                own.append((length, copied + length))
                own_rows.append(np.concatenate([prompt[:copied], np.arange(start, start + length)]))
                copy_of.append(np.where(np.arange(copied + length) < copied, copies, 0))
                start += length
            if merged:
                shared.append((segment.end - first_end, segment.prompt))
                shared_queries.append(np.arange(first_end, segment.end))
                shared_keys.append(prompt)
        copies = _copies(np.concatenate(own_rows), np.concatenate(copy_of), device)
        if not shared:
            return PackIndex(_blocks(own, device), copies, None)
        rows = shared_queries, shared_keys
        if len(shared) == 1:
            query_rows, key_rows = (slice(int(r[0][0]), int(r[0][-1]) + 1) for r in rows)
        else:
            query_rows, key_rows = _on_device([np.concatenate(r) for r in rows], device)
        return PackIndex(_blocks(own, device), copies, Shared(_blocks(shared, device), query_rows, key_rows))


def _blocks(lengths: list[tuple[int, int]], device: torch.device) -> Blocks:
    """Lays blocks of (queries, keys) end to end."""
    cumulative = np.zeros((2, len(lengths) + 1), np.int32)
    np.cumsum(np.array(lengths).T, axis=1, out=cumulative[:, 1:])
    return Blocks(*_on_device(list(cumulative), device), *np.max(lengths, axis=0).tolist())


def _copies(rows: np.ndarray, copy_of: np.ndarray, device: torch.device) -> Copies | None:
    if not copy_of.any():
        return None
    again = [(copy_of == copy).nonzero()[0] for copy in range(1, copy_of.max() + 1)]
    parts = [rows, (copy_of == 0).nonzero()[0], *(part for keys in again for part in (keys, rows[keys]))]
    rows, first, *parts = _on_device(parts, device)
    return Copies(rows, first, list(zip(parts[::2], parts[1::2], strict=True)))


def _on_device(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Returns the arrays as tensors, moved in one copy for which the host does not wait."""
    flat = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        flat = flat.pin_memory()
    return list(flat.to(device, non_blocking=True).split([len(array) for array in arrays]))


def segment_table(segments: tuple[Segment, ...]) -> SegmentTable:
    """Returns the table of a pack; layers, policy, reference and recomputation of one batch share it."""
    return _tables(np.array(_numbers(segments), np.int64).tobytes())


def table_of(handle: Tensor) -> SegmentTable:
    """Returns the table whose handle this is."""
    return _tables(handle.numpy().tobytes())


def forget_tables() -> None:
    """Lets go of masks and indices that are kept for the next layers."""
    _tables.cache_clear()


@lru_cache(maxsize=2)
def _tables(content: bytes) -> SegmentTable:
    numbers, segments = iter(np.frombuffer(content, np.int64).tolist()), []
    for start in numbers:
        prompt, count = next(numbers), next(numbers)
        segments.append(Segment(start, prompt, tuple(islice(numbers, count))))
    return SegmentTable(tuple(segments))


def _numbers(segments: tuple[Segment, ...]) -> list[int]:
    """Returns start, prompt, number of completions and the length of each, for one segment after another."""
    return [n for s in segments for n in (s.start, s.prompt, len(s.completions), *s.completions)]
