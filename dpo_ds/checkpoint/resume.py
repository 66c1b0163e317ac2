"""Which checkpoint a run goes on from: what is there, what is whole, and what may have changed since."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from dpo_ds.checkpoint import manifest
from dpo_ds.checkpoint.manifest import LATEST, Checkpoint, open_folder, step_folders, versions
from dpo_ds.cluster import collectives, shared_files
from dpo_ds.config import Section, flatten, keys, to_plain
from dpo_ds.config.deepspeed import is_bf16
from dpo_ds.errors import ConfigError, shorten
from dpo_ds.models.fingerprint import MODEL, model_as_recorded

DATA, REFERENCE = "the data in data.train", "the model in reference.path"
SHOWN = 200  # characters of a setting that changed
PAIRS = 256  # pairs whose tokens an old checkpoint's identity is of
START_OVER = "use another output_dir, or --checkpoint.resume never to start over"
# Keys that may differ between a run and its resumption; all others decide what is computed.
MAY_CHANGE = (
    "train.learning_rate", "train.schedule", "train.warmup_steps", "train.warmup_ratio",
    "train.min_lr_ratio", "train.decay_ratio", "train.max_steps", "train.epochs",
    "train.eval_every", "train.stop_after_worse",
    "data.eval", "train.micro_batch_tokens", "train.layout", "train.activation_checkpointing",
    "train.activation_memory",
    "train.sequence_parallel", "train.profile_steps", "train.sample_every", "train.sample_prompts", "model.attn",
    "model.compile", "reference.cache",
    "reward.calibration", "reward.calibration_rows", "rl.batch_size", "rl.critic_learning_rate", "rl.eval_prompts",
    "rl.replica", "rl.samples_every", "rl.score_timeout",
)  # fmt: skip
PATHS = ("data.train", "model.path", "reference.path")  # may lie elsewhere: check_identity compares what is there
MAY_CHANGE_SECTIONS = ("checkpoint.", "deepspeed.", "sample.", "tracking.", "hub.", "output_dir")


def find(output_dir: Path, resume: str) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints to continue from, best first, and a line on each one passed over; reads manifests and sizes only.

    Args:
        resume: checkpoint.resume, i.e. auto, never or a folder.
    Raises:
        ConfigError: the named folder is no complete checkpoint, or auto finds damaged ones only.
    """
    if resume == "never":
        return [], []
    if resume != "auto":
        checkpoint, problem = open_folder(Path(resume))
        if checkpoint is None:
            raise ConfigError(f"--checkpoint.resume {resume}: {problem}; name a folder checkpoints/step-... or auto")
        return [checkpoint], []
    complete, notes = [], []
    folder = output_dir / "checkpoints"
    if (folder / LATEST).is_dir():
        raise ConfigError(f"{folder / LATEST}: is a folder; the file that names the newest checkpoint belongs there")
    for path in reversed(step_folders(folder)):
        checkpoint, problem = open_folder(path)
        if checkpoint is not None:
            complete.append(checkpoint)
        elif not complete:
            notes.append(f"{path}: {problem}; trying the one before")
    if notes and not complete:
        raise ConfigError(_none_left(folder, notes[0].removesuffix("; trying the one before")))
    if complete and (folder / LATEST).exists():
        named = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        newest = complete[0].path.name
        if named != newest:
            notes.append(f"{folder / LATEST} names {named or 'nothing'}; taking {newest}, the newest complete one")
    return complete, notes


def choose(candidates: Sequence[Checkpoint]) -> tuple[Checkpoint | None, list[str]]:
    """The first candidate whose every byte is right, and a line on each damaged one. All ranks enter, each reads some.

    Raises:
        ConfigError: on every rank, all of them are damaged.
    """
    notes = []
    for candidate in candidates:
        damage = candidate.damage(collectives.rank(), collectives.world_size())
        damaged = sorted(name for names in collectives.gather_objects(damage) for name in names)
        if not damaged:
            return candidate, notes
        problem = f"{candidate.path}: {', '.join(damaged)} differs from what was written (SHA-256)"
        if candidate is candidates[-1]:
            raise ConfigError(_none_left(candidate.path.parent, problem))
        notes.append(f"{problem}; trying the one before")
    return None, notes


def check_config(checkpoint: Checkpoint, run: Section, ranks: int) -> list[str]:
    """Lines on what changed since the checkpoint and may.

    Raises:
        ConfigError: a setting changed that decides what is computed.
    """
    notes, now = [], versions()
    for package, used in checkpoint.manifest["versions"].items():
        if now.get(package) != used:
            notes.append(f"{checkpoint.path} was saved with {package} {used}, this is {now.get(package)}")
    if checkpoint.world_size != ranks:
        notes.append(
            f"{checkpoint.path} was saved by {checkpoint.world_size} ranks, this run has {ranks}: resharding, results "
            "agree within rounding"
        )
    before, now, known = flatten(checkpoint.manifest["config"]), flatten(to_plain(run)), keys(type(run))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key):
            continue
        if key not in before and key in known and now[key] == known[key].get_default(call_default_factory=True):
            continue  # a key that is newer than the checkpoint, and switches nothing on
        change = f"{key} {shorten(before.get(key), SHOWN)} -> {shorten(now.get(key), SHOWN)}"
        has_moved = key in PATHS and _without_paths(before.get(key)) == _without_paths(now.get(key))
        if not has_moved and key not in MAY_CHANGE and not key.startswith(MAY_CHANGE_SECTIONS):
            raise ConfigError(f"{change} cannot change on resume from {checkpoint.path}; {START_OVER}")
        if not key.startswith(("checkpoint.resume", "output_dir")):
            notes.append(f"changed on resume: {change}")
    return notes


def _without_paths(source):
    """Returns what a setting says beside paths: how many there are, and each one's weight."""
    if isinstance(source, list):
        return [_without_paths(item) for item in source]
    if isinstance(source, dict):
        return source | {"path": ""}
    return "" if isinstance(source, str) else source


def check_identity(checkpoint: Checkpoint, identity: dict[str, str]) -> None:
    """Compares what the config's paths stand for, as `identity_of` names it.

    Raises:
        ConfigError: another model, other data or another precision.
    """
    for what, value in checkpoint.manifest["identity"].items():
        if identity.get(what) != value:
            raise ConfigError(f"{what} is now {identity.get(what)}, in {checkpoint.path} it was {value}; {START_OVER}")


def set_aside_newer(output_dir: Path, resumed: Checkpoint) -> list[str]:
    """Renames the checkpoints in output_dir that come after `resumed`; all, if it lies elsewhere. Rank 0 only."""
    folder = output_dir / "checkpoints"
    manifest.clear(folder)
    own = resumed.path.parent.resolve() == folder.resolve()  # of the link, where it is one
    notes = []
    for path in step_folders(folder):
        if not own or int(path.name.removeprefix("step-")) > resumed.step:
            names = (f"{path.name}.aside{number}" for number in itertools.chain([""], itertools.count(2)))
            aside = next(free for name in names if not (free := path.with_name(name)).exists())
            path.rename(aside)
            notes.append(f"{path} is now {aside.name}; delete it once you need it no more")
    if own:
        shared_files.write_text(folder / LATEST, resumed.path.name + "\n")
    return notes


def _none_left(folder: Path, problem: str) -> str:
    return f"{problem}, and no complete checkpoint is left in {folder}; --checkpoint.resume never starts over"


def data_id(dataset) -> str:
    """Identifies prepared pairs as checkpoints did before every token counted: by every length and margin, in order,
    and the tokens of pairs spread evenly over the data.
    """
    digest = hashlib.sha256(b"" if dataset.margins is None else dataset.margins)
    for lengths in (dataset.prompt_lengths, *dataset.completion_lengths.T):
        digest.update(np.ascontiguousarray(lengths, dtype=np.int64))
    for row in np.unique(np.linspace(0, len(dataset) - 1, PAIRS).astype(int)):
        group = dataset[int(row)]
        for tokens in (group.prompt, *group.completions):
            digest.update(np.ascontiguousarray(tokens, dtype=np.int64))
    return digest.hexdigest()[:16]


def identity_of(
    run: Section, model_config, policy_config: dict, dataset, recorded: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Returns what a checkpoint remembers of model, reference, data and precision; messages name these keys.

    recorded: a checkpoint's, in whose form digests are given: older ones read samples of the bytes.
    """
    is_old = len(recorded.get(DATA, "")) == 16
    of_data = {DATA: data_id(dataset) if is_old else dataset.content()}
    return identity_of_models(run, model_config, policy_config, recorded) | of_data


def identity_of_models(
    run: Section, model_config, policy_config: dict, recorded: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Returns the part of `identity_of` that is of no data."""
    known = {
        MODEL: model_as_recorded(recorded.get(MODEL), run.model.path, model_config),
        "the precision": "bf16" if is_bf16(policy_config) else "fp32",
    }
    reference = getattr(run, "reference", None)
    if reference is not None and reference.path is not None:
        known[REFERENCE] = model_as_recorded(recorded.get(REFERENCE), reference.path, model_config)
    return known
