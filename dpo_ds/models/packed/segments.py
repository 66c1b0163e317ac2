"""The pairs of one pack as attention kernels want them: blocks of queries and keys, and the rows that are seen twice.

A pair is two blocks of causal attention: queries prompt ++ chosen against the same keys, and queries rejected, which
must also see the prompt. There are two ways to show it to them:

- copied: the block's keys are prompt ++ rejected, so that the prompt's keys and values are laid out a second time;
- merged: the block's keys are rejected alone, a second, non-causal call has the queries rejected against the keys
  prompt, and the two results are merged by their log-sum-exps (`packed.varlen`). No key is copied.

Either way a pair's result depends on its own lengths alone, never on what else is in the pack.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_ds.batch import Segment

# Both ways do the same arithmetic. Copying moves the pair's keys and values some 12 times in forward and backward,
# merging moves rejected's queries, outputs and gradients some 15 times and the prompt's keys: with four query heads to
# a key head that is less from a prompt of 3.6 times rejected's length on, and the second call's launches have to pay.
# Measured on an H200 with torch's flash attention 2 (tests/benchmarks/RESULTS.md): merging takes 1.15 to 1.3 times as
# long for prompts of 100 to 512 tokens, 1.01 and 1.02 times for (prompt, completions) of (2048, 64) and (8192, 1024),
# and up to a third less memory: it is for prompts where it costs no time.
MERGED_PROMPT, MERGED_RATIO = 2048, 8


def is_merged(segment: Segment) -> bool:
    """Tells whether rejected sees its prompt by a second call or else by copied keys; by the pair's lengths alone."""
    return segment.prompt >= max(MERGED_PROMPT, MERGED_RATIO * segment.rejected)


class Blocks(NamedTuple):
    """Blocks of attention: block i's queries are rows cu_queries[i] : cu_queries[i + 1], its keys cu_keys[i : i + 2].

    cu_queries, cu_keys [blocks + 1]: int32. max_queries, max_keys: of the longest block.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int


class Copies(NamedTuple):
    """Keys of which some are rows of the pack for the second time.

    rows: of the pack, key by key. first [T]: the key that is row t for the first time. again, again_rows: the other
    keys and the rows they are, each row at most once.
    """

    rows: Tensor
    first: Tensor
    again: Tensor
    again_rows: Tensor


class Shared(NamedTuple):
    """The second call: block i's queries are a rejected, its keys that pair's prompt. query_rows, key_rows: of the
    pack, slices where only one pair is merged."""

    blocks: Blocks
    query_rows: Tensor | slice
    key_rows: Tensor | slice


class PackIndex(NamedTuple):
    """own: the causal blocks, aligned bottom-right. copies: their keys; None for the rows of the pack as they are.
    shared: the second call; None where every prompt is copied or nothing is rejected."""

    own: Blocks
    copies: Copies | None
    shared: Shared | None


class SegmentTable:
    """The pairs of one pack and what attention derives from them, built at first use.

    handle: the segments as a flat int64 tensor on the CPU. A compiled layer takes it as an input like any other, so
    that no graph depends on a batch's segments, and `table_of` leads from it back to the table.
    """

    def __init__(self, segments: tuple[Segment, ...]):
        self.segments = segments
        self.length = segments[-1].end
        with torch.inference_mode(False):
            self.handle = torch.tensor([number for segment in segments for number in segment], dtype=torch.int64)
        torch._dynamo.maybe_mark_dynamic(self.handle, 0)  # or one graph for the number of pairs that came first
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
        """Returns blocks and rows on `device`. merge: pairs are merged (True), copied (False), or by length (None)."""
        index_key = (device, merge)
        if index_key not in self._indices:
            with torch.inference_mode(False):
                self._indices[index_key] = self._build(device, merge)
        return self._indices[index_key]

    def _build(self, device: torch.device, merge: bool | None) -> PackIndex:
        own, own_rows, shared, shared_queries, shared_keys = [], [], [], [], []
        is_copy = []
        for segment in self.segments:
            prompt = np.arange(segment.start, segment.start + segment.prompt)
            chosen_end = segment.end - segment.rejected
            rejected = np.arange(chosen_end, segment.end)
            if chosen_end > segment.start:
                own.append((chosen_end - segment.start,) * 2)
                own_rows.append(np.arange(segment.start, chosen_end))
                is_copy.append(np.zeros(len(own_rows[-1]), bool))
            if not segment.rejected:
                continue
            merged = segment.prompt > 0 and (is_merged(segment) if merge is None else merge)
            copied = 0 if merged else segment.prompt
            own.append((segment.rejected, copied + segment.rejected))
            own_rows.append(np.concatenate([prompt[:copied], rejected]))
            is_copy.append(np.arange(len(own_rows[-1])) < copied)
            if merged:
                shared.append((segment.rejected, segment.prompt))
                shared_queries.append(rejected)
                shared_keys.append(prompt)
        copies = _copies(np.concatenate(own_rows), np.concatenate(is_copy), device)
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


def _copies(rows: np.ndarray, is_copy: np.ndarray, device: torch.device) -> Copies | None:
    if not is_copy.any():
        return None
    again = is_copy.nonzero()[0]
    return Copies(*_on_device([rows, (~is_copy).nonzero()[0], again, rows[again]], device))


def _on_device(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Returns the arrays as tensors, moved in one copy for which the host does not wait."""
    flat = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        flat = flat.pin_memory()
    return list(flat.to(device, non_blocking=True).split([len(array) for array in arrays]))


def segment_table(segments: tuple[Segment, ...]) -> SegmentTable:
    """Returns the table of a pack; layers, policy, reference and recomputation of one batch share it."""
    return _tables(np.array(segments, np.int64).tobytes())


def table_of(handle: Tensor) -> SegmentTable:
    """Returns the table whose handle this is."""
    return _tables(handle.numpy().tobytes())


def forget_tables() -> None:
    """Lets go of masks and indices that are kept for the next layers."""
    _tables.cache_clear()


@lru_cache(maxsize=2)
def _tables(content: bytes) -> SegmentTable:
    rows = np.frombuffer(content, np.int64).reshape(-1, len(Segment._fields)).tolist()
    return SegmentTable(tuple(Segment(*row) for row in rows))
