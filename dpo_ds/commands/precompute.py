"""`dpo-ds precompute`: the reference's log-probs on all completions, into reference.cache, by any number of ranks.

Rows with completions that the cache lacks are cut into shards in the order of the data. A shard is one rank's work, and
its micro-batches depend on nothing but its rows, so that its bytes are the same whoever computes it, and when.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dpo_ds.batch import PAIR, Group
from dpo_ds.checkpoint.manifest import versions
from dpo_ds.cluster import collectives, signals
from dpo_ds.cluster.launch import Launch, from_environment
from dpo_ds.cluster.process_group import process_group, quiet_libraries, speaker, this_machine
from dpo_ds.cluster.shared_files import FolderLock, leftovers, make_writable, refuse_foreign
from dpo_ds.commands.preflight import check_fit, check_reference_model, check_sequence, prepare_data, tell_content
from dpo_ds.config import PrecomputeConfig, VerifyConfig, reference_section
from dpo_ds.config import deepspeed as ds_config
from dpo_ds.data import GroupDataset
from dpo_ds.data.batching import Layout
from dpo_ds.data.chat.template import DATE, dated, set_date, set_template, settle_template
from dpo_ds.data.shard import SHARD_NAME, head_of, shard_files, shard_name
from dpo_ds.errors import ConfigError
from dpo_ds.models.layers.quantized import check_gathering, check_quantize
from dpo_ds.models.loading import check_model, load_tokenizer
from dpo_ds.reference.cache import (
    FORMAT,
    MANIFEST,
    QUANTIZE,
    SHARDS,
    KeyIndex,
    Manifest,
    Shard,
    check_shards,
    is_a_cache,
    is_finished,
    pair_keys,
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


class Lacking(NamedTuple):
    """A row, counting through all data sets, the places of its completions that the cache lacks, and their tokens."""

    row: int
    completions: tuple[int, ...]
    prompt: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.lengths)


@dataclass(frozen=True)
class Work:
    """Holds what is left to do. engine: DeepSpeed's config, None for a replica a rank. identity: rank 0's, None on
    others.

    keys [completions, 2]: of all data sets; firsts [rows]: where a row's completions begin among them. shards: what
    each new one holds.
    """

    engine: dict | None
    identity: dict | None
    datasets: Sequence[GroupDataset]
    keys: np.ndarray
    firsts: np.ndarray
    manifest: Manifest | None
    shards: Sequence[Sequence[Lacking]]
    hidden_size: int
    lock: FolderLock

    @property
    def first_number(self) -> int:
        return 0 if self.manifest is None else len(self.manifest.shards)

    def path(self, folder: Path, shard: int) -> Path:
        return folder / shard_name(self.first_number + shard)

    def shard_keys(self, rows: Sequence[Lacking]) -> np.ndarray:
        return self.keys[[self.firsts[row.row] + i for row in rows for i in row.completions]]

    def group(self, lacking: Lacking) -> Group:
        """With every token of the completions a target, whatever the masks: they apply when the cache is read."""
        data = next(data for data in reversed(self.datasets) if data.first_index <= lacking.row)
        group = data[lacking.row - data.first_index]
        completions = tuple(group.completions[i] for i in lacking.completions)
        return Group(group.prompt, completions, tuple(np.ones(len(ids), bool) for ids in completions))


def start_verify(run: VerifyConfig) -> int:
    """Runs `dpo-ds precompute --verify` on rank 0; returns the exit code."""
    if from_environment().is_first:
        verify(Path(run.verify))
    return 0


def start(run: PrecomputeConfig) -> int:
    """Runs the command on this rank; returns its exit code."""
    launch = from_environment()
    quiet_libraries()
    work = prepare(run, launch)
    if not work.shards:
        there = f"{work.manifest.values['rows']} rows"
        speaker(launch)([f"{run.reference.cache}: complete, {there}; nothing to compute"])
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
    policy_config, machine = check_model(run.model, run.model.path), this_machine(launch)
    check_quantize(run.model, machine, policy_config)
    text_config = check_reference_model(run, policy_config.get_text_config())
    tokenizer = load_tokenizer(run.model, policy_config, run.model.path)
    set_template(tokenizer, run.data.chat_template)
    source, filled = run.deepspeed.reference_config or run.deepspeed.config, None
    check_sequence("precompute", run.precompute.sequence_parallel, text_config, launch)
    if run.precompute.sequence_parallel > 1 and source == NO_DEEPSPEED:
        given = f"--precompute.sequence_parallel {run.precompute.sequence_parallel}"
        raise ConfigError(f"{given}: replicas work alone; give a file to --deepspeed.config, not none")
    if source != NO_DEEPSPEED:
        key = "deepspeed.reference_config" if run.deepspeed.reference_config else "deepspeed.config"
        given = ds_config.read(source, key)
        filled, notes = ds_config.fill_reference(given, source, machine, text_config.hidden_size)
        speaker(launch)(notes)
        check_gathering(run.model, filled, source)
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
    firsts = np.concatenate([data.completions for data in datasets]).cumsum()
    firsts = np.concatenate([[0], firsts[:-1]])
    new = lacking(datasets, keys, firsts, manifest)
    size = run.precompute.shard_rows
    shards = [new[begin : begin + size] for begin in range(0, len(new), size)]
    shards = [sorted(rows, key=lambda row: -row.tokens) for rows in shards]  # like lengths share a forward
    return Work(filled, of_model, datasets, keys, firsts, manifest, shards, text_config.hidden_size, lock)


def lacking(
    datasets: Sequence[GroupDataset], keys: np.ndarray, firsts: np.ndarray, manifest: Manifest | None
) -> list[Lacking]:
    """Returns the rows with completions that the cache lacks, each key once, in the order of the data."""
    order = sort_keys(keys)
    is_new = np.zeros(len(keys), bool)
    is_new[order[0]] = True
    is_new[order[1:]] = (keys[order][1:] != keys[order][:-1]).any(1)  # sort_keys is stable: the first of equal keys
    if manifest is not None:
        kept = [(np.array(shard.keys), shard.has_pairs) for shard in read_shards(manifest)]
        there = np.concatenate([of_shard for of_shard, _ in kept])
        index = KeyIndex(there[sort_keys(there)].T)
        is_new &= index.find(keys) < 0
        if any(has_pairs for _, has_pairs in kept):
            as_pairs = [(index.find(pair_keys(data)) >= 0) & (data.completions == 2) for data in datasets]
            has_pair = np.concatenate(as_pairs)
            is_new &= ~np.repeat(has_pair, np.diff([*firsts, len(keys)]))
    found = []
    prompts = np.concatenate([data.prompt_lengths for data in datasets])
    lengths = np.concatenate([of[of > 0] for of in (data.completion_lengths for data in datasets)])
    owners = np.searchsorted(firsts, is_new.nonzero()[0], side="right") - 1
    for row, members in groupby(zip(owners.tolist(), is_new.nonzero()[0].tolist(), strict=True), key=itemgetter(0)):
        places = [place for _, place in members]
        own = tuple(place - int(firsts[row]) for place in places)
        found.append(Lacking(row, own, int(prompts[row]), tuple(lengths[places].tolist())))
    return found


def fill(run: PrecomputeConfig, work: Work, launch: Launch, device: torch.device) -> None:
    """Model, shards, manifest; all ranks together, or, as replicas, each on its own from the first shard on."""
    from dpo_ds.cluster.collectives import from_rank_0
    from dpo_ds.cluster.process_group import leave
    from dpo_ds.models.checks import layout_notes, settle_layout, settle_sequence
    from dpo_ds.models.engine import load_frozen
    from dpo_ds.models.layers.compile import settle_compilation

    say = speaker(launch)
    model = load_frozen(reference_section(run), work.engine, device)
    layout_name, refusal = settle_layout(run.precompute.layout, [model])
    say(layout_notes("precompute.layout", refusal))
    settle_compilation(run.model.compile, [model], say)
    ranks = settle_sequence(run.precompute.sequence_parallel, refusal, [model], "precompute")
    # The same micro-batches, and so the same log-probs but for rounding, whether one rank computes them or several.
    spread = ranks, collectives.sequence_place() if work.engine else 0
    layout = Layout(layout_name, run.precompute.micro_batch_tokens, work.hidden_size, spread)

    work.lock.share(collectives.barrier)
    of_model, folder = from_rank_0(work.identity), Path(run.reference.cache)
    threads, used = run.precompute.threads, versions()
    settings = kernels(model, layout_name) | {"micro_batch_tokens": layout.budget, "threads": threads}
    settings["versions"] = {name: used[name] for name in ("dpo_ds", "torch", "transformers")}
    known = ("weights", "tokenizer", QUANTIZE, DATE)
    head = {"format": FORMAT, **{what: of_model[what] for what in known if what in of_model}}
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
    rank, ranks = (0, 1) if work.engine is None else (collectives.data_rank(), collectives.data_ranks())
    compute_shards(model, work, todo, layout, folder, head, rank, ranks, launch.is_first)
    if work.engine is not None:
        collectives.barrier()
    paths = [work.path(folder, shard) for shard in range(len(work.shards))]
    if launch.is_first if work.engine else all(path.exists() for path in paths):  # of replicas, whoever ends last
        build = {**settings, "shard_rows": run.precompute.shard_rows, "shards": [{"file": path.name} for path in paths]}
        before = [] if work.manifest is None else work.manifest.values["builds"]
        manifest = write_manifest(folder, of_model, [*before, build])
        print(f"dpo-ds: done: {folder}: {manifest.values['rows']} completions, cache id {manifest.id}", flush=True)


def compute_shards(
    model, work: Work, todo: Sequence[int], layout: Layout, folder: Path, head: dict, rank: int, ranks: int, talks: bool
) -> None:
    """Writes the shards in `todo`, this rank every `ranks`th of them."""
    rounds = [todo[begin : begin + ranks] for begin in range(0, len(todo), ranks)]
    mine = [shards[rank] for shards in rounds if rank < len(shards)]
    tokens = sum(row.tokens for shard in mine for row in work.shards[shard])
    progress = Progress(tokens, talks, "token", "completions")
    for shards in rounds:
        # ZeRO-3 is collective: every rank runs as many forwards, on nothing where it has no rows left.
        forwards = max(len(micro_batches(work.shards[shard], layout)) for shard in shards)
        rows = work.shards[shards[rank]] if rank < len(shards) else []
        computed = compute(model, work, rows, forwards, layout, progress)
        if len(rows) and layout.spread[1] == 0:
            SHARDS.write(work.path(folder, shards[rank]), computed, head)
    progress.close()


def _unfinished(work: Work, folder: Path, head: dict) -> list[int]:
    """New shards that are not there yet; what is there and belongs to none is removed."""
    todo = []
    for shard, rows in enumerate(work.shards):
        path = work.path(folder, shard)
        if not is_finished(path, work.shard_keys(rows), head):
            path.unlink(missing_ok=True)
            todo.append(shard)
    last = work.path(folder, len(work.shards) - 1).name
    beyond = [path for path in shard_files(folder) if path.name > last]
    for path in [*beyond, *leftovers(folder, SHARD_NAME), *leftovers(folder, re.escape(MANIFEST))]:
        path.unlink()
    return todo


def micro_batches(rows: Sequence[Lacking], layout: Layout) -> list[Sequence[Lacking]]:
    """A shard's rows, longest first, cut where the budget is full; a longer one goes alone."""
    batches: list[list[Lacking]] = []
    for row in rows:
        if not batches or _size([*batches[-1], row], layout) > layout.budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def _size(rows: Sequence[Lacking], layout: Layout) -> int:
    """Tokens of a micro-batch; padded: a row a completion, as wide as the longest."""
    if layout.name == "packed":
        return sum(row.tokens for row in rows)
    return max(row.prompt + max(row.lengths) for row in rows) * sum(len(row.lengths) for row in rows)


def compute(model, work: Work, rows: Sequence[Lacking], forwards: int, layout: Layout, progress: Progress) -> Shard:
    """The log-probs of one shard's completions; all ranks enter under ZeRO-3, with equal `forwards`."""
    outputs = []
    for members in micro_batches(rows, layout):
        batch = layout.collate([work.group(row) for row in members])
        outputs.append(model.token_logps(batch))  # stays on the device: nothing waits for it until the shard is done
        progress.add(sum(batch.group_sizes), batch.num_tokens)
    while len(outputs) < forwards:
        outputs.append(model.token_logps(layout.collate([])))
    logps = torch.cat(outputs).cpu().numpy()
    parts, lengths, start = [np.zeros(0, np.float32)], [], 0
    for row in rows:
        for length in row.lengths:
            unpredicted = 0 if row.prompt else 1  # nothing precedes the first token of an empty prompt's completion
            parts += [np.full(unpredicted, np.nan, np.float32), logps[start : start + length - unpredicted]]
            lengths.append((length, 0))
            start += length - unpredicted
    counts = np.array(lengths, np.int64).reshape(-1, 2)
    return Shard(work.shard_keys(rows), counts, np.concatenate(parts), np.zeros(0, np.float32))
