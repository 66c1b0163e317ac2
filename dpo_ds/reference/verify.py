"""`dpo-ds precompute --verify FOLDER`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dpo_ds.errors import ConfigError
from dpo_ds.reference.cache import MANIFEST, QUANTIZE, check_shards, read_manifest, read_shards


def verify(folder: Path) -> None:
    """Checks every hash and prints what the cache holds.

    Raises:
        ConfigError: no finished cache there, or a byte of it has changed.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ConfigError(f"--verify {folder}: no {MANIFEST}, so no finished cache; dpo-ds precompute finishes one")
    check_shards(manifest)
    rows, sums, counts, keys = 0, np.zeros(2), np.zeros(2), []
    for shard in read_shards(manifest):
        rows += len(shard.keys)
        keys.append(np.array(shard.keys))
        sums += [np.nansum(side, dtype=np.float64) for side in (shard.chosen, shard.rejected)]
        counts += [np.isfinite(side).sum() for side in (shard.chosen, shard.rejected)]
    values, unique = manifest.values, len(np.unique(np.concatenate(keys), axis=0))
    if (rows, unique) != (values["rows"], values["rows"]):
        raise ConfigError(f"--verify {folder}: {rows} rows, {unique} of them unique; {MANIFEST} says {values['rows']}")
    print(f"{folder}: cache {manifest.id}, every hash is right")
    quantized = f" in {values[QUANTIZE]}" if QUANTIZE in values else ""
    weights, tokenizer = values["weights"][:12], values["tokenizer"][:12]
    print(f"  reference  {values['reference']}, weights {weights}{quantized}, tokenizer {tokenizer}")
    print(f"  rows       {rows} in {len(manifest.shards)} shards, {sum(s['bytes'] for s in manifest.shards)} bytes")
    print(f"  tokens     {int(counts.sum())}, mean log-prob {sums.sum() / counts.sum():.4f}")
    for build in values["builds"]:
        names = ("dtype", "layout", "attention", "logprobs", "device", "threads")
        used = ", ".join(f"{name} {build[name]}" for name in names)
        print(f"  build      {len(build['shards'])} shards: {used}; torch {build['versions']['torch']}")
