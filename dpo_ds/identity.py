"""What a path stood for when a run began, in a few bytes: a checkpoint resumes only with the same model and data."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

SAMPLE = 1 << 20  # bytes read at the start and at the end of a weights file
PAIRS = 256  # pairs whose tokens are read
WEIGHTS = ("*.safetensors", "*.bin")


def model_id(path: str, config) -> str:
    """Of a folder: its config, and every weights file's name, size, first and last MiB; of a Hub id: the commit."""
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}@{getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(file for pattern in WEIGHTS for file in folder.glob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(SAMPLE))
            stream.seek(max(0, size - SAMPLE))
            digest.update(stream.read(SAMPLE))
    return digest.hexdigest()[:16]


def data_id(dataset) -> str:
    """Of prepared pairs: every length, in order, and the tokens of pairs spread evenly over the data."""
    digest = hashlib.sha256()
    for lengths in (dataset.prompt_lengths, dataset.chosen_lengths, dataset.rejected_lengths):
        digest.update(np.ascontiguousarray(lengths, dtype=np.int64))
    for row in np.unique(np.linspace(0, len(dataset) - 1, PAIRS).astype(int)):
        pair = dataset[int(row)]
        for tokens in (pair.prompt, pair.chosen, pair.rejected):
            digest.update(np.ascontiguousarray(tokens, dtype=np.int64))
    return digest.hexdigest()[:16]
