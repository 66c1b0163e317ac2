"""`dpo-ds doctor RUN.YAML`: looks at cluster, data and model before a long run, makes one step, and keeps nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dpo_ds.batch import Batch
from dpo_ds.checkpoint.writer import CheckpointWriter, state_bytes
from dpo_ds.cluster import collectives, rendezvous
from dpo_ds.cluster.foreign import otherwise
from dpo_ds.cluster.launch import Launch, from_environment
from dpo_ds.cluster.process_group import process_group, quiet_libraries, speaker, this_machine
from dpo_ds.cluster.shared_files import make_writable, temporary_beside
from dpo_ds.cluster.stopping import StopFlag
from dpo_ds.commands import preflight
from dpo_ds.commands.doctor import disk, network, rows, versions
from dpo_ds.commands.doctor.report import FAIL, PASS, Finding, as_json, softened, summary
from dpo_ds.commands.train import assemble
from dpo_ds.config import DoctorConfig, SftConfig, reference_section
from dpo_ds.data.batching import global_batches
from dpo_ds.errors import ModelError, UserError, first_line
from dpo_ds.memory.allocations import expected
from dpo_ds.memory.trace import PeakMemory
from dpo_ds.models.loading import check_shape
from dpo_ds.training import hub
from dpo_ds.training.profile import StepProfile
from dpo_ds.training.tasks import Prepared, Supervised, task_of

EXIT_FAILED = 1
ALONE_SECONDS = 10.0  # between a rank that a check fails on and the others' end of it


@dataclass
class Visit:
    """Carries out checks one after another, all ranks together, and tells of each as it ends."""

    launch: Launch
    lenient: tuple[str, ...]
    in_lines: bool
    findings: list[Finding] = field(default_factory=list)
    count: int = 0

    @property
    def failed(self) -> bool:
        return any(finding.verdict == FAIL for finding in self.findings)

    def look(self, name: str, check: Callable[[], list[Finding]]) -> bool:
        """Adds what `check` finds; what it raises, on whichever rank, is a failure of its own. Returns whether it came
        to an end. All ranks enter: one that stays away is named by the watch over the ranks.
        """
        self.count += 1
        rendezvous.peers().progress(self.count)
        found, problem = [], None
        with contextlib.ExitStack() as waiting:
            try:
                found = check()
            except Exception as error:
                if os.environ.get("DPO_DS_VERBOSE"):
                    traceback.print_exc()
                problem = (f"{type(error).__name__}: {first_line(error)}", "DPO_DS_VERBOSE=1 shows where")
                if isinstance(error, UserError):
                    problem = (first_line(error), "")  # it names the remedy itself
                waiting.enter_context(_telling_late(error))
            problems = collectives.gather_objects(problem)
        rank = next((rank for rank, problem in enumerate(problems) if problem is not None), None)
        if rank is not None:
            text, remedy = problems[rank]
            found = [Finding(name, FAIL, f"rank {rank} could not do it: {text}", remedy)]
        found = softened(found, self.lenient)
        self.findings += found
        self.say(finding.line(sys.stdout.isatty()) for finding in found)
        return rank is None

    def say(self, lines: Iterable[str]) -> None:
        if self.in_lines and self.launch.is_first:
            for line in lines:
                print(line, flush=True)


def _telling_late(error: Exception) -> contextlib.AbstractContextManager:
    """Ends the job with what this rank alone could not do, where the others still wait for it within the check."""
    return otherwise(ALONE_SECONDS, rendezvous.peers().fault, error)


def start(doctor: DoctorConfig) -> int:
    """Runs the command; 0 where nothing failed, 1 where something did.

    Raises:
        UserError: what `train` itself would refuse, before any check.
    """
    started, launch = time.monotonic(), from_environment()
    quiet_libraries()
    if launch.is_first and doctor.run.hub.push:
        hub.check_token(doctor.run.hub.push, "hub.push")
    run = as_examined(doctor.run)
    task, scratch = task_of(run), temporary_beside(Path(run.output_dir).absolute())
    visit = Visit(launch, doctor.lenient, in_lines=not doctor.as_json)
    with _scratch(scratch, launch):
        prepared = preflight.prepare(task, launch, scratch)
        with process_group(launch) as device:
            shared = collectives.from_rank_0(scratch)
            _look_at_cluster(visit, device)
            _look_at_data(visit, prepared, run)
            _look_at_model(visit, task, prepared, shared, device)
            collectives.barrier()
    seconds = time.monotonic() - started
    who = f"doctor of {run.command} on {launch.world_size} rank{'s' * (launch.world_size > 1)}"
    visit.say([f"dpo-ds: {who}: {summary(visit.findings, seconds)}"])
    if doctor.as_json and launch.is_first:
        print(as_json(visit.findings, run.command, launch.world_size, seconds), flush=True)
    return EXIT_FAILED if visit.failed else 0


def as_examined(run: SftConfig) -> SftConfig:
    """Returns the run as from its beginning, with a first step that has the full rate: warm-up begins with 0. It pushes
    nothing: a run that does makes its repository before it begins.
    """
    first_step = {"warmup_steps": 0, "warmup_ratio": 0.0, "schedule": "constant", "max_steps": 1}
    train = run.train.model_copy(update=first_step | {"profile_steps": None, "sample_every": 0})
    checkpoint = run.checkpoint.model_copy(update={"resume": "never", "asynchronous": False})
    hub_section = run.hub.model_copy(update={"push": None})
    return run.model_copy(update={"train": train, "checkpoint": checkpoint, "hub": hub_section})


@contextlib.contextmanager
def _scratch(folder: Path, launch: Launch) -> Iterator[None]:
    """Makes rank 0's folder beside output_dir, on its file system, and removes it with the folders above it that were
    not there, also where the watch over the ranks ends this process.

    Raises:
        ConfigError: it cannot be made.
    """
    if not launch.is_first:
        yield
        return
    new = [parent for parent in folder.parents if not parent.exists()]  # the deepest first

    def remove(*_) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody else has put something there meanwhile
            for parent in new:
                parent.rmdir()

    rendezvous.peers().on_end = remove
    try:
        make_writable(folder, "output_dir")
        yield
    finally:
        remove()


def _look_at_cluster(visit: Visit, device: torch.device) -> None:
    visit.look(versions.VERSIONS, versions.check)
    visit.look(network.CLOCKS, network.check_clocks)
    visit.look(network.COLLECTIVES, lambda: network.check_collectives(device))
    visit.look(network.PAIRS, lambda: network.check_pairs(device))


def _look_at_data(visit: Visit, prepared: Prepared, run: SftConfig) -> None:
    for split, data in (("train", prepared.data), ("eval", prepared.evaluation_data)):
        if data is not None:
            visit.look(rows.DATA, lambda split=split, data=data: rows.check_census(split, data.census))
    group = prepared.data[0]
    visit.look(rows.MASK, lambda: rows.check_mask(group))
    visit.say(rows.decoded(group, prepared.tokenizer, sys.stdout.isatty()))
    if prepared.data.census["message_lists"]:
        visit.look(rows.MASK, lambda: rows.check_template(prepared.tokenizer, run.data))


def _look_at_model(visit: Visit, task: Supervised, prepared: Prepared, scratch: Path, device: torch.device) -> None:
    """Goes through what training does until its first checkpoint. What needs the model is left out without it."""
    from dpo_ds.commands.doctor import saving, stepping
    from dpo_ds.training.trainer import Trainer

    run, parts, told = task.run, [], []
    meter = PeakMemory([]) if device.type == "cpu" else None
    with meter or contextlib.nullcontext():

        def load() -> list[Finding]:
            parts.append(assemble(task, prepared, device, speaker(visit.launch)))
            return []

        if not visit.look("model", load):
            return
        policy, objective, layout = parts[0]
        size = state_bytes(policy.engine)
        keep = run.checkpoint.keep + (run.checkpoint.best is not None)
        visit.look(disk.DISK, lambda: disk.check(scratch, visit.launch, size, keep))
        stop = StopFlag()
        writer = CheckpointWriter(
            scratch, run, prepared.identity, 0, stop.committing, told.append, lambda step: rendezvous.peers().progress()
        )
        trainer = Trainer(
            policy, objective, prepared.data, None, layout, run.train, writer, 0, None, stop, rendezvous.peers(),
            StepProfile(scratch, None, print),
        )  # fmt: skip
        size = run.train.global_batch_size
        _, first = next(global_batches(prepared.data.sources, run.train.seed, size, 1, trainer.counts))
        chosen = stepping.one_micro_batch(prepared.data, first, layout)
        batch, group = stepping.micro_batch(prepared.data, chosen, layout), prepared.data[int(chosen[0])]
        visit.look(stepping.LOSS, lambda: stepping.check_loss(trainer, objective, policy, chosen))
        visit.look(stepping.REFERENCE, lambda: stepping.check_reference(objective, policy, batch))
        visit.look(stepping.LEAK, lambda: stepping.check_cross_talk(policy, layout, group, run.is_classifier))
        peaks = []

        def step() -> list[Finding]:
            before = stepping.digests(policy)
            with stepping.measured(meter, device, peaks):
                trainer.step_on(chosen)
            return stepping.check_moved(policy, before, has_adapters=run.model.lora.r > 0)

        if not visit.look(stepping.MOVED, step):
            return
        visit.look(stepping.MEMORY, lambda: _check_memory(task, prepared, batch, peaks, device))
    visit.look(saving.SAVED, lambda: saving.check(policy, writer, trainer.state(), told))


def _check_memory(
    task: Supervised, prepared: Prepared, batch: Batch, peaks: list[int], device: torch.device
) -> list[Finding]:
    """Compares the step's peak with what dpo_ds.memory expects of the longest of the ranks' micro-batches."""
    from dpo_ds.commands.doctor import stepping

    run, launch = task.run, from_environment()
    measured = int(collectives.reduce_max(max(peaks), device))
    segments = max(collectives.gather_objects(batch.segments), key=lambda found: found[-1].end if found else 0)
    if not segments:
        text = f"{measured / 1e9:.2f} GB at the peak of a step; of the padded layout there is no estimate"
        return [Finding(stepping.MEMORY, PASS, text, figures={"measured_bytes": measured})]
    model = check_shape(run.model, run.model.path)
    reference = None
    if prepared.reference_config is not None:
        section = reference_section(run)
        reference = check_shape(section, section.path)
    nodes = max(1, launch.world_size // launch.local_world_size)
    policy, frozen = prepared.policy_config, prepared.reference_config
    try:
        memory = expected(
            run, model, this_machine(launch), nodes, policy, frozen, reference_config=reference, segments=segments
        )
    except ModelError as unknown:  # what was measured stands
        text = f"{measured / 1e9:.2f} GB at the peak of a step; {unknown}"
        return [Finding(stepping.MEMORY, PASS, text, figures={"measured_bytes": measured})]
    return stepping.judge_memory(measured, memory.allocated)
