"""Saves a checkpoint as training does, damages it, and reads it back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dpo_ds.checkpoint import resume, shards
from dpo_ds.checkpoint.manifest import Checkpoint, open_folder, step_folder
from dpo_ds.checkpoint.writer import CheckpointWriter
from dpo_ds.cluster import collectives
from dpo_ds.commands.doctor.report import FAIL, PASS, Finding
from dpo_ds.commands.doctor.stepping import bits, digests
from dpo_ds.errors import ConfigError
from dpo_ds.models.engine import Policy

SAVED = "checkpoint"
STEP = 1
LOSES = "does output_dir's file system keep what is written? choose another"


def check(policy: Policy, writer: CheckpointWriter, state: dict, told: Sequence[str]) -> list[Finding]:
    """All ranks enter; the policy has made one step, so that Adam has moments. told: by the writer, on rank 0."""
    started = time.perf_counter()
    writer.save(policy.engine, STEP, state, wait=True)
    seconds = time.perf_counter() - started
    if writer.newest != STEP:
        return [Finding(SAVED, FAIL, " ".join(told), "make room, or mend the disk")]
    checkpoint, problem = collectives.from_rank_0(open_folder(writer.folder / step_folder(STEP)))
    if checkpoint is None:
        return [Finding(SAVED, FAIL, f"is not there once written: {problem}", LOSES)]
    size = sum(file["size"] for file in checkpoint.manifest["files"].values())
    if not notices_damage(checkpoint):
        remedy = "do not trust checkpoints of this installation: report it, and read them with another version"
        return [Finding(SAVED, FAIL, "a byte was flipped in a shard, and it was read all the same", remedy)]
    before = _state(policy)
    resume.choose([checkpoint])
    shards.load(policy.engine, checkpoint)
    wrong = [name for name, now in _state(policy).items() if now != before[name]]
    if everyones := [name for of_rank in collectives.gather_objects(wrong) for name in of_rank]:
        text = f"{everyones[0]} is not what was saved"
        return [Finding(SAVED, FAIL, text, LOSES)]
    text = f"{size / 1e6:.1f} MB written in {seconds:.1f} s, refused with one byte flipped, read back bit-equal"
    return [Finding(SAVED, PASS, text, figures={"bytes": size, "seconds": seconds})]


def notices_damage(checkpoint: Checkpoint) -> bool:
    """Flips a byte of a shard, tells whether a run would refuse to go on from it, and flips it back."""
    files = checkpoint.manifest["files"]
    path = checkpoint.path / max(files, key=lambda name: files[name]["size"])
    if collectives.rank() == 0:
        _flip(path)
    collectives.barrier()
    try:
        resume.choose([checkpoint])
        noticed = False
    except ConfigError:
        noticed = True
    collectives.barrier()
    if collectives.rank() == 0:
        _flip(path)
    collectives.barrier()
    return noticed


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def _state(policy: Policy) -> dict[str, int]:
    """Returns a number for the bits of this rank's weights, and of Adam's moments."""
    found, adam = digests(policy), policy.engine.optimizer.optimizer.state
    for index, moments in enumerate(adam.values()):
        for name, values in moments.items():
            if torch.is_tensor(values) and values.numel() > 1:
                found[f"{name} {index}"] = bits(values)
    return found
