"""How many rows a run has and what they count of its batches, from the files of data.train or rl.prompts alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dpo_ds.batch import NO_COMPARISON, Group
from dpo_ds.config import RlConfig, SftConfig
from dpo_ds.data.formats.conversation import Conversation
from dpo_ds.data.gathering import gathered
from dpo_ds.data.preparation import Reader, check_group
from dpo_ds.data.sources import Files, HuggingFace, open_source
from dpo_ds.errors import DataError
from dpo_ds.losses import make_loss
from dpo_ds.training.schedule import total_steps


@dataclass(frozen=True)
class Groups:
    """What data.group prompt makes of the rows. completions [groups]: of each; counts [groups]: what it counts of
    train.global_batch_size; sources: as data.batching has them.
    """

    completions: np.ndarray
    counts: np.ndarray
    sources: list[tuple[int, int, float]]


def groups_of(run: SftConfig | RlConfig) -> tuple[Groups | None, str | None]:
    """Returns the groups, None where rows stay by themselves; and a note where they cannot be read.

    Rows are one group where prompt and tools are equal as text, as they nearly always are then as tokens.

    Raises:
        ConfigError: rows of sft, which nothing compares.
        DataError: rows that cannot be used, where data.on_bad_row is error.
    """
    if getattr(run.data, "group", "none") != "prompt":
        return None, None
    check_group(run.data.group, run.sides)
    items = _items(run)
    for path, _ in items:
        if not _is_here(path):
            return None, f"data.group prompt: data.train {path} is not on this machine; told is what pairs alone take"
    reader = Reader([open_source(path) for path, _ in items], [path for path, _ in items], run.data, run.sides)
    sizes, sources = [], []
    for number, (_, weight) in enumerate(items):
        start = len(sizes)
        rows = [_as_group(conversation) for batch in reader.batches(number) for _, conversation in batch]
        found = gathered((row.prompt.tobytes() for row in rows), rows.__getitem__)
        sizes += [(len(group.completions), _counted(run, group)) for _, group in found]
        sources.append((start, len(sizes), weight))
    completions, counts = np.array(sizes).T
    return Groups(completions, counts, sources), None


def steps_of(run: SftConfig | RlConfig, groups: Groups | None) -> tuple[int | None, str]:
    """Returns the updates of the whole run (iterations of rl), and what they were counted from; None, and why not,
    where the rows are not on this machine.

    Raises:
        DataError: a file that cannot be read.
    """
    key = "rl.prompts" if run.command == "rl" else "data.train"
    if run.train.max_steps is not None:
        return run.train.max_steps, "train.max_steps"
    sources, start = [], 0
    for path, weight in _items(run):
        if not _is_here(path):
            return None, f"{key} {path} is not on this machine; give --train.max_steps"
        left = math.inf if run.data.limit is None else run.data.limit - start
        rows = min(_rows(open_source(path)), left)
        sources.append((start, start + int(rows), weight))
        start += int(rows)
    what = f"{start:,} rows of {key}"
    if groups is None:
        steps = total_steps(sources, run.train)
    else:
        steps = total_steps(groups.sources, run.train, groups.counts)
        what += f" in {len(groups.counts):,} groups"
    times = f"{run.train.epochs:g} times" if run.train.epochs != 1 else "once"
    return steps, f"{what} {times}, {run.train.global_batch_size} an update"


def _items(run: SftConfig | RlConfig) -> list[tuple[str, float]]:
    """Returns the paths or Hub ids of a run's rows with their weights."""
    source = run.rl.prompts if run.command == "rl" else run.data.train
    items = [source] if isinstance(source, str) else source
    return [(item, 1.0) if isinstance(item, str) else (item["path"], item.get("weight", 1.0)) for item in items]


def _is_here(path: str) -> bool:
    return any(Path(name).expanduser().exists() for name in (path, path.rpartition(":")[0] or path))


def _as_group(conversation: Conversation) -> Group:
    """Returns a row with text in place of tokens."""
    prompt, *completions = map(_ids, ([conversation.prompt, conversation.tools], *conversation.completions))
    compared = np.array(conversation.comparisons, np.int64).reshape(-1, 2)
    labels = None if conversation.labels is None else np.array(conversation.labels)
    masks = tuple(np.ones(len(ids), bool) for ids in completions)
    return Group(prompt, tuple(completions), masks, compared if len(compared) else NO_COMPARISON, None, labels)


def _ids(text) -> np.ndarray:
    return np.frombuffer(json.dumps(text).encode(), np.uint8)


def _counted(run: SftConfig, group: Group) -> int:
    """Returns what a group counts of a batch, as the objectives in training/objectives count it."""
    if run.command == "reward":
        return 1 if run.reward.loss == "plackett_luce" else len(group.comparisons)
    loss = make_loss(run.loss)
    if loss.of_labels:
        return len(group.completions)
    return 1 if loss.per_group else len(group.comparisons)


def _rows(source: Files | HuggingFace) -> int:
    """Counts rows as they stand in the files, good and bad."""
    if isinstance(source, HuggingFace):
        return len(source.data)
    return sum(_rows_of_file(path) for path in source.paths)


def _rows_of_file(path: Path) -> int:
    if path.suffix != ".parquet":
        return sum(1 for _ in Files((path,)).rows())
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"{path}: broken Parquet file; copy or download it again") from error
