"""What every training command does around its loop: the job's status and process group, what it opens in its output
folder, and the model that it leaves there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_ds.checkpoint.manifest import Checkpoint, versions
from dpo_ds.checkpoint.resume import set_aside_newer
from dpo_ds.checkpoint.writer import CheckpointWriter
from dpo_ds.cluster import collectives, stopping
from dpo_ds.cluster.launch import Launch, from_environment
from dpo_ds.cluster.process_group import process_group, quiet_libraries, speaker
from dpo_ds.cluster.stopping import StopFlag
from dpo_ds.cluster.watchdog import PeerWatch, Silent
from dpo_ds.config import to_plain
from dpo_ds.errors import TrainingError
from dpo_ds.training.hub import Push
from dpo_ds.training.output_dir import keeping_status, last_metrics_of, set_aside, watched, write_config, write_status
from dpo_ds.training.tasks import Supervised
from dpo_ds.training.tracking import OF_PAIRS, ChosenFalls, Shown, Tracker, settings_of

if TYPE_CHECKING:
    from dpo_ds.models.engine import Policy
    from dpo_ds.training.profile import StepProfile


def run_job(task: Supervised, prepare: Callable, train: Callable) -> int:
    """Runs a training command on this rank; returns its exit code.

    prepare(task, launch, output_dir): what is checked and read before a process group is there. train(task, what it
    returned, launch, output_dir, device, stop, peers): all else, by all ranks together.

    Raises:
        UserError: on every rank, for the caller to print on rank 0.
    """
    launch, output_dir = from_environment(), Path(task.run.output_dir)
    quiet_libraries()
    started = time.time()
    with keeping_status(output_dir, launch) as lock:
        prepared = prepare(task, launch, output_dir)
        stop = StopFlag(stopping.deadline(task.run.checkpoint, started))
        with process_group(launch) as device:
            lock.share(collectives.barrier)
            with watched(output_dir, launch, stop) as peers:
                train(task, prepared, launch, output_dir, device, stop, peers)
    return 0


@dataclass
class Output:
    """A run's output folder, open. tracker: rank 0's, None elsewhere; first_step: to be taken; used: versions;
    getting_on(): told while something takes its time; push: of the model to the Hub, once it is under way.
    """

    task: Supervised
    folder: Path
    used: dict[str, str]
    is_first: bool
    getting_on: Callable[[], None]
    tracker: Tracker | None
    writer: CheckpointWriter
    profile: StepProfile
    first_step: int
    push: Push | None = None

    def ends_early(self, reason: str) -> None:
        if self.is_first:
            write_status(self.folder, "running", reason, self.writer.newest)
            self.tracker.say(f"ends early: {reason}")

    def hand_over(
        self, policy: Policy, tokenizer: Any, names: Sequence[str], metrics: dict[str, float], best: int = 0
    ) -> None:
        """Exports the policy to final/ with its card, begins to push it, and gives trackers the last metrics. All ranks
        enter.

        names: metrics of a step, for a run in which none was taken; metrics: the last ones; best: the step that the
        policy is of, where that is the best and not the last one.
        """
        from dpo_ds.models import export

        run, final = self.task.run, self.folder / "final"
        metrics = last_metrics_of(self.folder, names, best or None) | metrics
        card = export.model_card(run.command, to_plain(run), metrics, self.used)
        export.export(policy.causal_lm, tokenizer, final, card, self.task.merges_adapters, self.getting_on)
        if self.is_first and run.hub.push:
            self.push = Push(final, run.hub)
        if self.tracker:
            self.tracker.final(metrics)
            of_step = f" (step {best}, the best {run.checkpoint.best})" if best else ""
            self.tracker.say(f"done: {final}{of_step}")


@contextlib.contextmanager
def opened_output(
    task: Supervised, identity: dict[str, str], launch: Launch, output_dir: Path, resume: Checkpoint | None,
    last_step: int, stop: StopFlag, peers: PeerWatch | Silent, watch: ChosenFalls | None = None,
    shown: Shown = OF_PAIRS,
) -> Iterator[Output]:  # fmt: skip
    """Writes config.yaml, cuts metrics back to the checkpoint, sets aside what is in the way. At the end it closes the
    tracker and waits for a model that is being pushed; a checkpoint that is being written when training fails stays,
    too. All ranks enter.

    watch, shown: the tracker's.
    """
    from dpo_ds.training.profile import StepProfile

    run, say, used = task.run, speaker(launch), versions()
    resumed, getting_on = 0 if resume is None else resume.step, partial(peers.progress, last_step)
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
        output = Output(
            task, output_dir, used, launch.is_first, getting_on, tracker, writer, profile, first_step=resumed + 1
        )
        try:
            yield output
        except TrainingError:
            writer.finish()
            raise
    if output.push:
        say([output.push.outcome(getting_on, lambda: any(stop.told()))])
