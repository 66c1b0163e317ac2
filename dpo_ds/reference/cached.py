"""The reference read from a cache that `dpo-ds precompute` has filled: one model in memory, no second forward."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpo_ds import config
from dpo_ds.batch import Batch, sum_per_sequence
from dpo_ds.cluster import collectives
from dpo_ds.cluster.launch import Launch
from dpo_ds.config import PrecomputeConfig, TrainConfig, reference_section
from dpo_ds.data import GroupDataset
from dpo_ds.data.batching import Layout, Lengths, plan
from dpo_ds.data.tokenize import fingerprint_without_template
from dpo_ds.errors import ConfigError
from dpo_ds.models.fingerprint import weights_digest
from dpo_ds.models.layers.units import is_compiled
from dpo_ds.models.packed.backends import backend_for
from dpo_ds.reference import Reference
from dpo_ds.reference.cache import QUANTIZE, Manifest, check_shards, read_manifest
from dpo_ds.reference.store import Store, data_rows, open_store

SPOT_CHECK_PAIRS = 8
EAGER = {"layers": "eager"}  # where a build says nothing of its layers
SPOT_CHECK_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # mean nats a token of one completion


@dataclass(frozen=True)
class CachedRows:
    """Knows where in the cache each completion of each data set of a run is."""

    manifest: Manifest
    store: Store
    datasets: Sequence[GroupDataset]
    rows: Sequence[np.ndarray]  # one for each data set, [its completions, 2] int64: row and side in the store

    def token_logps(self, batch: Batch) -> Tensor:  # [N] float32
        """In the order of `batch.targets`, on the CPU."""
        parts = [part for index in batch.indices for part in self._completions(index)]
        return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0)

    def _completions(self, index: int) -> list[np.ndarray]:
        """Log-probs of the trained tokens of each completion of one group."""
        split = max(i for i, data in enumerate(self.datasets) if data.first_index <= index)
        row = index - self.datasets[split].first_index
        group, first = self.datasets[split][row], int(self.datasets[split].first_completions[row])
        found = self.rows[split][first : first + len(group.completions)].tolist()
        return [self.store.logps(*place)[group.target_positions(i)] for i, place in enumerate(found)]


@dataclass(frozen=True)
class CachedReference(Reference):
    """Log-probs that wait on disk."""

    cached: CachedRows
    device: torch.device

    def token_logps(self, batch: Batch) -> Tensor:
        return self.cached.token_logps(batch).to(self.device)


def identity(run: TrainConfig | PrecomputeConfig, tokenizer) -> dict[str, str]:
    """Returns what a cache is of: digests of the reference's weights and of the tokenizer, its template left out, and
    how the weights were quantised, where they were.

    A template, like a cut, changes token ids and thereby the pairs' keys.
    """
    section = reference_section(run)
    words = hashlib.sha256(fingerprint_without_template(tokenizer).encode()).hexdigest()
    quantized = {} if section.quantize is None else {QUANTIZE: section.quantize}
    return {"reference": section.path, "weights": weights_digest(section, section.path), "tokenizer": words} | quantized


def check_identity(run: TrainConfig | PrecomputeConfig, found: dict, now: dict) -> None:
    """Raises ConfigError where a cache, or a shard of one, was computed with other weights, with weights that were or
    were not quantised, or with another tokenizer.
    """
    for what, path in (("weights", now["reference"]), ("tokenizer", run.model.path)):
        if found[what] != now[what]:
            raise ConfigError(
                f"--reference.cache {run.reference.cache}: computed with the {what} {found[what][:12]} of "
                f"{found.get('reference', 'a run that was stopped')}, but {path} now has {now[what][:12]}; use what "
                "it was computed with, or another folder"
            )
    then, is_now = (of.get(QUANTIZE, "none") for of in (found, now))
    if then != is_now:
        raise ConfigError(
            f"--reference.cache {run.reference.cache}: computed with model.quantize {then}, this run has {is_now}, "
            "which makes another reference; use another folder"
        )


def refuse_random_weights(run: TrainConfig | PrecomputeConfig) -> None:
    if run.model.from_config:
        raise ConfigError("--model.from_config true: a cache is recognised by the weights' bytes; save them first")


def check_cache(run: TrainConfig, tokenizer, launch: Launch) -> Manifest:
    """The manifest of reference.cache, after comparing it with the model's files and its shards with their hashes.

    Raises:
        ConfigError: there is no finished cache, it is of another model or tokenizer, or a byte of it has changed.
    """
    refuse_random_weights(run)
    folder = Path(run.reference.cache)
    manifest = read_manifest(folder)
    if manifest is None:
        what = "an unfinished cache" if any(folder.glob("shard-*")) else "no cache"
        command = config.command_line("precompute", run)
        raise ConfigError(f"--reference.cache {folder}: holds {what}; fill it with: {command}")
    if launch.is_first:
        check_identity(run, manifest.values, identity(run, tokenizer))
    if launch.is_first_on_node:
        check_shards(manifest)
    return manifest


def find_rows(run: TrainConfig, manifest: Manifest, datasets: Sequence[GroupDataset], launch: Launch) -> CachedRows:
    """Returns every completion's row in the cache.

    Raises:
        ConfigError: some are missing; the message counts their rows and names the command that adds them.
    """
    store = open_store(manifest, build=launch.is_first_on_node)
    rows = [data_rows(store, data, build=launch.is_first_on_node) for data in datasets]
    missing = 0
    for data, places in zip(datasets, rows, strict=True):
        missing += int(np.logical_or.reduceat(places[:, 0] < 0, data.first_completions).sum())
    if missing:
        what = "groups" if any(data.census["groups"] for data in datasets) else "pairs"
        lacking = f"{missing} of {sum(map(len, datasets))} {what} are not in it"
        raise ConfigError(
            f"--reference.cache {manifest.folder}: {lacking} (other rows, template or cut than it was filled with); "
            f"add them with: {config.command_line('precompute', run)}"
        )
    return CachedRows(manifest, store, datasets, rows)


def kernels(model, layout: str) -> dict[str, str]:
    """Returns what the last digits of a model's log-probs depend on besides its weights."""
    settings = model.causal_lm.config.get_text_config()
    dtype = next(model.causal_lm.parameters()).dtype
    attention = settings._attn_implementation
    if layout == "packed":
        width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
        softcap = bool(getattr(settings, "attn_logit_softcapping", None))
        attention = backend_for(model.device, dtype, width, softcap=softcap)
    logprobs = "triton" if model.device.type == "cuda" else "chunked"
    layers = {"layers": "compiled"} if is_compiled(model.causal_lm) else {}
    return {
        "dtype": str(dtype).removeprefix("torch."), "layout": layout, "attention": attention, "logprobs": logprobs,
        "device": model.device.type, **layers,
    }  # fmt: skip


def spot_check(run: TrainConfig, policy, cached: CachedRows, layout: Layout) -> list[str]:
    """Recomputes a few random pairs with the policy's initial weights; lines for the user. All ranks enter.

    To be called before a checkpoint is loaded: what the policy has learned is no reason to distrust the cache.

    Raises:
        ConfigError: cache and policy differ by more than rounding.
    """
    if run.reference.path not in (None, run.model.path):
        return [f"reference.cache: not checked against the policy, which starts from {run.model.path}"]
    now = EAGER | kernels(policy, layout.name)
    builds = [EAGER | build for build in cached.manifest.values["builds"]]
    changed = {name: sorted({build[name] for build in builds} - {value}) for name, value in now.items()}
    notes = [f"reference.cache: computed with {name} {', '.join(olds)}, this run has {now[name]}"
             for name, olds in changed.items() if olds]  # fmt: skip
    tolerance = max(SPOT_CHECK_TOLERANCE[dtype] for dtype in (now["dtype"], *(build["dtype"] for build in builds)))

    data = cached.datasets[0]
    picked = np.random.default_rng(run.train.seed).permutation(len(data))[:SPOT_CHECK_PAIRS]
    lengths, what = Lengths.of(data, picked), "groups" if data.census["groups"] else "pairs"
    worst = 0.0
    with policy.evaluating():
        for members in plan(lengths, layout, collectives.data_ranks())[collectives.data_rank()]:
            batch = layout.collate([data[int(picked[position])] for position in members])
            error = (policy.token_logps(batch).cpu() - cached.token_logps(batch)).abs()
            means = sum_per_sequence(error, batch.target_counts) / batch.target_counts
            worst = max([worst, *means.nan_to_num(nan=float("inf")).tolist()])
    worst = collectives.reduce_max(worst, policy.device)
    if worst > tolerance:
        raise ConfigError(
            f"--reference.cache {cached.manifest.folder}: {len(picked)} {what} recomputed with {run.model.path} differ "
            f"by up to {worst:.1e} nats a token, more than {tolerance:.0e} ({'; '.join(notes) or 'same kernels'}); "
            f"fill another folder with: {config.command_line('precompute', run)}"
        )
    return [*notes, f"reference.cache: {len(picked)} {what} recomputed, within {worst:.1e} nats a token"]
