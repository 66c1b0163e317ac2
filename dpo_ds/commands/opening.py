"""Opens what a training run writes into its output folder, once its models are there and nothing can be mistaken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_ds.checkpoint.manifest import Checkpoint
from dpo_ds.checkpoint.resume import set_aside_newer
from dpo_ds.checkpoint.writer import CheckpointWriter
from dpo_ds.cluster.launch import Launch
from dpo_ds.cluster.process_group import speaker
from dpo_ds.cluster.stopping import StopFlag
from dpo_ds.cluster.watchdog import PeerWatch, Silent
from dpo_ds.config import RlConfig, SftConfig
from dpo_ds.training.output_dir import set_aside, write_config
from dpo_ds.training.tracking import OF_PAIRS, ChosenFalls, Shown, Tracker, settings_of

if TYPE_CHECKING:
    from dpo_ds.training.profile import StepProfile


@dataclass(frozen=True)
class Output:
    """tracker: rank 0's, None elsewhere; first_step: to be taken."""

    tracker: Tracker | None
    writer: CheckpointWriter
    profile: StepProfile
    first_step: int


@contextlib.contextmanager
def opened_output(
    run: SftConfig | RlConfig, identity: dict[str, str], launch: Launch, output_dir: Path, resume: Checkpoint | None,
    last_step: int, used: dict[str, str], stop: StopFlag, peers: PeerWatch | Silent, watch: ChosenFalls | None = None,
    shown: Shown = OF_PAIRS,
) -> Iterator[Output]:  # fmt: skip
    """Writes config.yaml, cuts metrics back to the checkpoint, sets aside what is in the way; closes the tracker at the
    end. All ranks enter.

    used: versions; watch, shown: the tracker's.
    """
    from dpo_ds.training.profile import StepProfile

    say, resumed = speaker(launch), 0 if resume is None else resume.step
    if resumed >= last_step:
        more = "raise train.max_steps or train.epochs to go on from there, or start over with --checkpoint.resume never"
        say([f"nothing left to do: step {resumed} of {last_step} is saved; {more}"])
    tracker = None
    if launch.is_first:
        if run.checkpoint.resume == "never":
            set_aside(output_dir)
        write_config(output_dir, run, used, launch)
        described = settings_of(run, used, launch.world_size)
        tracker = Tracker(output_dir, resumed, last_step, watch, run.tracking, described, shown)
    with tracker or contextlib.nullcontext():
        if tracker and resume is not None:
            say(set_aside_newer(output_dir, resume))
            tracker.say(f"resumed from {resume.path}")
        tell = tracker.say if tracker else print
        writer = CheckpointWriter(output_dir, run, identity, resumed, stop.committing, tell, peers.progress)
        profile = StepProfile(output_dir / "profile", run.train.profile_steps if launch.is_first else None, tell)
        yield Output(tracker, writer, profile, resumed + 1)
