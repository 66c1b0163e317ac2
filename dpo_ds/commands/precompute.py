"""`dpo-ds precompute`: the reference's log-probs on all pairs, into reference.cache, by any number of ranks.

Pairs that the cache lacks are cut into shards in the order of the data. A shard is one rank's work, and its
micro-batches depend on nothing but its pairs, so that its bytes are the same whoever computes it, and when.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dpo_ds.batch import PAIR, PreferencePair
from dpo_ds.checkpoint.manifest import versions
from dpo_ds.cluster import collectives, signals
from dpo_ds.cluster.launch import Launch, from_environment
from dpo_ds.cluster.process_group import process_group, speaker, this_machine
from dpo_ds.cluster.shared_files import FolderLock, leftovers, make_writable, refuse_foreign
from dpo_ds.commands.preflight import check_fit, check_reference_model, prepare_data, tell_content
from dpo_ds.config import PrecomputeConfig, VerifyConfig, reference_section
from dpo_ds.config import deepspeed as ds_config
from dpo_ds.data import PairDataset
from dpo_ds.data.batching import Layout
from dpo_ds.data.chat.template import DATE, dated, set_date, set_template, settle_template
from dpo_ds.data.shard import SHARD_NAME, head_of, shard_files, shard_name
from dpo_ds.models.loading import check_model, load_tokenizer
from dpo_ds.reference.cache import (
    FORMAT,
    MANIFEST,
    SHARDS,
    KeyIndex,
    Manifest,
    Shard,
    check_shards,
    is_a_cache,
    is_finished,
    read_manifest,
    read_shards,
    sort_keys,
    write_manifest,
)
from dpo_ds.reference.cached import check_identity, identity, kernels, refuse_random_weights
from dpo_ds.reference.store import data_keys
from dpo_ds.reference.verify import verify
from dpo_ds.training.tracking import Progress

NO_DEEPSPEED = "none"


@dataclass(frozen=True)
class Work:
    """Holds what is left to do. engine: DeepSpeed's config, None for a replica a rank. identity: rank 0's, None on
    others.

    keys [rows, 2], lengths [rows, 3] (tokens of prompt, chosen and rejected): of all data sets, row numbers counting
    through. shards: the rows in each new shard.
    """

    engine: dict | None
    identity: dict | None
    datasets: Sequence[PairDataset]
    keys: np.ndarray
    lengths: np.ndarray
    manifest: Manifest | None
    shards: Sequence[np.ndarray]
    hidden_size: int
    lock: FolderLock

    @property
    def first_number(self) -> int:
        return 0 if self.manifest is None else len(self.manifest.shards)

    def path(self, folder: Path, shard: int) -> Path:
        return folder / shard_name(self.first_number + shard)

    def pair(self, row: int) -> PreferencePair:
        """With every token of both completions a target, whatever the masks: they apply when the cache is read."""
        data = next(data for data in reversed(self.datasets) if data.first_index <= row)
        pair = data[row - data.first_index]
        everything = {f"{side}_mask": np.ones(len(pair.completion(side)), bool) for side in PAIR}
        return replace(pair, **everything)


def start_verify(run: VerifyConfig) -> int:
    """Runs `dpo-ds precompute --verify` on rank 0; returns the exit code."""
    if from_environment().is_first:
        verify(Path(run.verify))
    return 0


def start(run: PrecomputeConfig) -> int:
    """Runs the command on this rank; returns its exit code."""
    launch = from_environment()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    work = prepare(run, launch)
    if not work.shards:
        speaker(launch)([f"{run.reference.cache}: complete, {work.manifest.values['rows']} pairs; nothing to compute"])
        work.lock.close()
        return 0
    kept = f"finished shards stay in {run.reference.cache}, and the same command goes on from there"
    with signals.keeping(kept), contextlib.closing(work.lock), process_group(launch) as device:
        fill(run, work, launch, device)
    return 0


def prepare(run: PrecomputeConfig, launch: Launch) -> Work:
    """Checks, data and what the cache lacks of it.

    Raises:
        UserError: the first mistake found.
    """
    refuse_random_weights(run)
    torch.set_num_threads(launch.threads)
    folder = Path(run.reference.cache)
    if launch.is_first:
        refuse_foreign(folder, "reference.cache", is_a_cache)
    make_writable(folder, "reference.cache")
    lock = FolderLock(folder, launch.rank, "reference.cache")
    if launch.is_first:
        lock.take(speaker(launch))
    policy_config = check_model(run.model, run.model.path)
    text_config = check_reference_model(run, policy_config.get_text_config())
    tokenizer = load_tokenizer(run.model, policy_config, run.model.path)
    set_template(tokenizer, run.data.chat_template)
    source, filled = run.deepspeed.reference_config or run.deepspeed.config, None
    if source != NO_DEEPSPEED:
        key = "deepspeed.reference_config" if run.deepspeed.reference_config else "deepspeed.config"
        given = ds_config.read(source, key)
        filled, notes = ds_config.fill_reference(given, source, this_machine(launch), text_config.hidden_size)
        speaker(launch)(notes)
    manifest, of_model = read_manifest(folder), None
    heads = [head_of(path) for path in shard_files(folder)] if manifest is None else [manifest.values]
    set_date(tokenizer, *heads)
    if launch.is_first:
        of_model = identity(run, tokenizer) | dated(tokenizer)
        for found in filter(None, heads):
            check_identity(run, found, of_model)
        if manifest is not None:
            check_shards(manifest)
    prepared = prepare_data(run.data, tokenizer, PAIR, launch)
    speaker(launch)(settle_template(tokenizer, any(pairs.census["message_lists"] for pairs in prepared.values())))
    check_fit(prepared, text_config, speaker(launch))
    models = {"model.path": run.model.path, "reference.path": run.reference.path}
    tell_content(launch, models, tokenizer, prepared, {"DeepSpeed's configuration": filled})
    datasets = list(prepared.values())
    keys = np.concatenate([data_keys(data, build=launch.is_first_on_node) for data in datasets])
    new = missing_rows(keys, manifest)
    size = run.precompute.shard_rows
    shards = [new[begin : begin + size] for begin in range(0, len(new), size)]
    columns = [(d.prompt_lengths, d.chosen_lengths, d.rejected_lengths) for d in datasets]
    lengths = np.concatenate([np.stack(column, axis=1) for column in columns])
    shards = [rows[np.argsort(-lengths[rows].sum(1), kind="stable")] for rows in shards]  # like lengths share a forward
    return Work(filled, of_model, datasets, keys, lengths, manifest, shards, text_config.hidden_size, lock)


def missing_rows(keys: np.ndarray, manifest: Manifest | None) -> np.ndarray:
    """Rows whose key the cache lacks, each key once, in the order of the data."""
    order = sort_keys(keys)
    is_first = np.ones(len(keys), bool)
    is_first[1:] = (keys[order][1:] != keys[order][:-1]).any(1)
    rows = np.sort(order[is_first])  # sort_keys is stable: the first of equal keys
    if manifest is None:
        return rows
    there = np.concatenate([np.array(shard.keys) for shard in read_shards(manifest)])
    return rows[KeyIndex(there[sort_keys(there)].T).find(keys[rows]) < 0]


def fill(run: PrecomputeConfig, work: Work, launch: Launch, device: torch.device) -> None:
    """Model, shards, manifest; all ranks together, or, as replicas, each on its own from the first shard on."""
    from dpo_ds.cluster.collectives import from_rank_0
    from dpo_ds.cluster.process_group import leave
    from dpo_ds.models.checks import layout_notes, settle_layout
    from dpo_ds.models.engine import load_frozen
    from dpo_ds.models.layers.compile import settle_compilation

    say = speaker(launch)
    model = load_frozen(reference_section(run), work.engine, device)
    layout_name, refusal = settle_layout(run.precompute.layout, [model])
    say(layout_notes("precompute.layout", refusal))
    settle_compilation(run.model.compile, [model], say)
    layout = Layout(layout_name, PAIR, run.precompute.micro_batch_tokens, work.hidden_size)

    work.lock.share(collectives.barrier)
    of_model, folder = from_rank_0(work.identity), Path(run.reference.cache)
    threads, used = run.precompute.threads, versions()
    settings = kernels(model, layout_name) | {"micro_batch_tokens": layout.budget, "threads": threads}
    settings["versions"] = {name: used[name] for name in ("dpo_ds", "torch", "transformers")}
    head = {"format": FORMAT, **{what: of_model[what] for what in ("weights", "tokenizer", DATE) if what in of_model}}
    head |= settings
    torch.set_num_threads(threads)
    if device.type == "cpu" and launch.threads > threads:
        more = f"start more ranks, or give it --precompute.threads {launch.threads}"
        say([f"a rank computes on {threads} of its {launch.threads} cores; {more}"])
    todo = from_rank_0(_unfinished(work, folder, head) if launch.is_first else None)
    done = len(work.shards) - len(todo)
    say([f"{done} of {len(work.shards)} shards are there already"] if done else [])

    if work.engine is None:
        leave()  # from here on no rank waits for another
        todo = todo[launch.rank :: launch.world_size]
    rank, ranks = (0, 1) if work.engine is None else (launch.rank, launch.world_size)
    compute_shards(model, work, todo, layout, folder, head, rank, ranks, launch.is_first)
    if work.engine is not None:
        collectives.barrier()
    paths = [work.path(folder, shard) for shard in range(len(work.shards))]
    if launch.is_first if work.engine else all(path.exists() for path in paths):  # of replicas, whoever ends last
        build = {**settings, "shard_rows": run.precompute.shard_rows, "shards": [{"file": path.name} for path in paths]}
        before = [] if work.manifest is None else work.manifest.values["builds"]
        manifest = write_manifest(folder, of_model, [*before, build])
        print(f"dpo-ds: done: {folder}: {manifest.values['rows']} pairs, cache id {manifest.id}", flush=True)


def compute_shards(
    model, work: Work, todo: Sequence[int], layout: Layout, folder: Path, head: dict, rank: int, ranks: int, talks: bool
) -> None:
    """Writes the shards in `todo`, this rank every `ranks`th of them."""
    rounds = [todo[begin : begin + ranks] for begin in range(0, len(todo), ranks)]
    mine = [shards[rank] for shards in rounds if rank < len(shards)]
    progress = Progress(sum(int(work.lengths[work.shards[shard]].sum()) for shard in mine), talks, "token", "pairs")
    for shards in rounds:
        # ZeRO-3 is collective: every rank runs as many forwards, on nothing where it has no pairs left.
        forwards = max(len(micro_batches(work.lengths[work.shards[shard]], layout)) for shard in shards)
        rows = work.shards[shards[rank]] if rank < len(shards) else work.shards[0][:0]
        computed = compute(model, work, rows, forwards, layout, progress)
        if len(rows):
            SHARDS.write(work.path(folder, shards[rank]), computed, head)
    progress.close()


def _unfinished(work: Work, folder: Path, head: dict) -> list[int]:
    """New shards that are not there yet; what is there and belongs to none is removed."""
    todo = []
    for shard, rows in enumerate(work.shards):
        path = work.path(folder, shard)
        if not is_finished(path, work.keys[rows], head):
            path.unlink(missing_ok=True)
            todo.append(shard)
    last = work.path(folder, len(work.shards) - 1).name
    beyond = [path for path in shard_files(folder) if path.name > last]
    for path in [*beyond, *leftovers(folder, SHARD_NAME), *leftovers(folder, re.escape(MANIFEST))]:
        path.unlink()
    return todo


def micro_batches(lengths: np.ndarray, layout: Layout) -> list[np.ndarray]:
    """A shard's pairs, longest first, cut where the budget is full; a longer pair goes alone.

    lengths [pairs, 3]: tokens of prompt, chosen and rejected. Returns places in the shard.
    """
    if not len(lengths):
        return []
    tokens = lengths.sum(1)
    rows = 2 * (lengths[:, 0] + lengths[:, 1:].max(1))  # padded: two rows a pair, as wide as the batch's longest
    starts, used, widest = [0], 0, 0
    for index in range(len(lengths)):
        used, widest = used + tokens[index], max(widest, rows[index])
        size = used if layout.name == "packed" else widest * (index + 1 - starts[-1])
        if size > layout.budget and index > starts[-1]:
            starts.append(index)
            used, widest = tokens[index], rows[index]
    return np.split(np.arange(len(lengths)), starts[1:])


def compute(model, work: Work, rows: np.ndarray, forwards: int, layout: Layout, progress: Progress) -> Shard:
    """The log-probs of one shard's pairs; all ranks enter under ZeRO-3, with equal `forwards`."""
    lengths = work.lengths[rows]
    outputs = []
    for places in micro_batches(lengths, layout):
        batch = layout.collate([work.pair(row) for row in rows[places]])
        outputs.append(model.token_logps(batch))  # stays on the device: nothing waits for it until the shard is done
        progress.add(len(places), batch.num_tokens)
    while len(outputs) < forwards:
        outputs.append(model.token_logps(layout.collate([])))
    logps = torch.cat(outputs).cpu().numpy()
    sides = [[np.zeros(0, np.float32)], [np.zeros(0, np.float32)]]
    start = 0
    for prompt, *completions in lengths.tolist():
        for side, length in zip(sides, completions, strict=True):
            unpredicted = 0 if prompt else 1  # nothing precedes the first token of an empty prompt's completion
            side.append(np.full(unpredicted, np.nan, np.float32))
            side.append(logps[start : start + length - unpredicted])
            start += length - unpredicted
    return Shard(work.keys[rows], lengths[:, 1:].astype(np.int64), *map(np.concatenate, sides))
