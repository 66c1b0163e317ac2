"""What a path stood for when a run began, in a few bytes: a checkpoint resumes only with the same model and data."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from dpo_ds.config import Section
from dpo_ds.config.deepspeed import is_bf16

SAMPLE = 1 << 20  # bytes read at the start and at the end of a weights file
PAIRS = 256  # pairs whose tokens are read
MODEL = "the model in model.path"
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
    """Of prepared pairs: every length and margin, in order, and the tokens of pairs spread evenly over the data."""
    digest = hashlib.sha256(b"" if dataset.margins is None else dataset.margins)
    for lengths in (dataset.prompt_lengths, dataset.chosen_lengths, dataset.rejected_lengths):
        digest.update(np.ascontiguousarray(lengths, dtype=np.int64))
    for row in np.unique(np.linspace(0, len(dataset) - 1, PAIRS).astype(int)):
        pair = dataset[int(row)]
        for tokens in (pair.prompt, pair.chosen, pair.rejected):
            digest.update(np.ascontiguousarray(tokens, dtype=np.int64))
    return digest.hexdigest()[:16]


def of_run(run: Section, model_config, policy_config: dict, dataset) -> dict[str, str]:
    """What a checkpoint remembers of model, reference, data and precision; messages name these keys."""
    known = {
        MODEL: model_id(run.model.path, model_config),
        "the data in data.train": data_id(dataset),
        "the precision": "bf16" if is_bf16(policy_config) else "fp32",
    }
    reference = getattr(run, "reference", None)
    if reference is not None and reference.path is not None:
        known["the model in reference.path"] = model_id(reference.path, model_config)
    return known
