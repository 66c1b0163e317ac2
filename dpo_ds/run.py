"""A training command from its config to its exit code: checks, engines, loop, export. Rank 0 alone speaks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from dpo_ds import checkpoint, launch, lora, preflight, stopping
from dpo_ds.checkpoint import versions
from dpo_ds.config import RECORDED, Section, TrainConfig, to_plain
from dpo_ds.errors import ConfigError, UserError
from dpo_ds.launch import Launch
from dpo_ds.peers import PeerWatch, Silent
from dpo_ds.stopping import StopFlag, Stopped
from dpo_ds.tracking import Tracker, write_status

PIDS = "pids"  # folder in output_dir: a file HOST-RANK for every running rank, for scripts that signal them
GRACE_SECONDS = 30  # a rank that finds a user's mistake before rank 0 does leaves it the time to say so


def start(command: str, run: Section) -> int:
    """Runs `command` on this rank; returns its exit code.

    Raises:
        UserError: on every rank, for the caller to print on rank 0.
    """
    place = launch.from_environment()
    output_dir = Path(run.output_dir)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    started = time.time()
    try:
        with _status(output_dir, place):
            with stopping.at_once():
                prepared = preflight.prepare(run, place, output_dir)
                if not torch.accelerator.is_available():
                    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed warns that it found nothing better
                from dpo_ds import engine  # deepspeed comes in here, after every check

                engine.quiet_libraries()
                device = engine.initialize_distributed(place)
            stop = stopping.StopFlag(stopping.deadline(run.checkpoint, started))
            try:
                with _watched(output_dir, place, stop) as peers:
                    train(command, run, prepared, place, output_dir, device, stop, peers)
            finally:
                engine.finish_distributed()
    except Stopped:
        return stopping.EXIT_STOPPED
    except UserError:
        if not place.is_first:
            time.sleep(GRACE_SECONDS)  # leaving first would make the launcher stop rank 0 before its line
        raise
    return 0


def train(
    command: str, run: Section, prepared: preflight.Prepared, place: Launch, output_dir: Path, device, stop: StopFlag,
    peers: PeerWatch | Silent,
) -> None:  # fmt: skip
    """Models into engines, the loop, the exported model; all ranks together."""
    from dpo_ds import elastic, export
    from dpo_ds.data.batching import Layout
    from dpo_ds.engine import FrozenModel, Policy, from_rank_0, settle_layout
    from dpo_ds.losses import make_loss
    from dpo_ds.model import LogProbModel, load_causal_lm
    from dpo_ds.reference.cached import spot_check
    from dpo_ds.trainer import PreferenceObjective, SupervisedObjective, Trainer, total_steps

    resume, notes = checkpoint.choose(from_rank_0(prepared.candidates))  # ranks must never load different checkpoints
    say = preflight.speaker(place)
    say(notes)
    causal_lm = load_causal_lm(run.model, prepared.policy_config)
    if run.model.lora.r:
        lora.add_adapters(causal_lm, run.model.lora, run.train.seed)
    if run.train.activation_checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(LogProbModel(causal_lm), prepared.policy_config, device)
    if isinstance(run, TrainConfig):
        reference = _reference(run, prepared, policy, device)
        objective = PreferenceObjective(make_loss(run.loss), reference)
    else:
        reference, objective = None, SupervisedObjective()
    live = [reference] if isinstance(reference, FrozenModel) else []
    layout_name, note = settle_layout(run.train.layout, [policy, *live])
    say([note] if note else [])
    layout = Layout(layout_name, objective.sides, run.train.micro_batch_tokens, prepared.hidden_size)
    if prepared.cached is not None:
        say(spot_check(run, policy, prepared.cached, layout))
    if resume is not None:
        elastic.load(policy.engine, resume)
    first_step = 1 if resume is None else resume.step + 1

    used = versions()
    tracker = None
    if place.is_first:
        if run.checkpoint.resume == "never":
            _set_aside(output_dir)
        _write_config(output_dir, run, used, place)
        tracker = Tracker(output_dir, first_step - 1, total_steps(prepared.data.sources, run.train))
        if resume is not None:
            say(checkpoint.set_aside_newer(output_dir, resume))
            tracker.say(f"resumed from {resume.path}")
    tell = tracker.say if tracker else print
    writer = checkpoint.CheckpointWriter(output_dir, run, prepared.identity, first_step - 1, stop.committing, tell)
    trainer = Trainer(
        policy, objective, prepared.data, prepared.evaluation_data, layout, run.train, writer, tracker, stop, peers
    )
    trainer.train(first_step, run.checkpoint.every)
    card = export.model_card(command, to_plain(run), trainer.last_metrics, used)
    export.export(policy.causal_lm, prepared.tokenizer, output_dir / "final", card)
    if tracker:
        tracker.say(f"done: {output_dir / 'final'}")
        tracker.close()


def _reference(run: TrainConfig, prepared: preflight.Prepared, policy, device):
    """The reference strategy of reference.kind; all ranks together."""
    from dpo_ds.reference.adapter import AdapterReference
    from dpo_ds.reference.cached import CachedReference
    from dpo_ds.reference.live import live_reference

    if run.reference.kind == "cached":
        return CachedReference(prepared.cached, device)
    if run.reference.kind == "adapter":
        return AdapterReference(policy)
    return live_reference(preflight.reference_section(run), prepared.reference_config, device)


@contextlib.contextmanager
def _watched(output_dir: Path, place: Launch, stop: StopFlag) -> Iterator[PeerWatch | Silent]:
    """The ranks watch each other, and signals set the flag; a rank that fails alone ends all of them by name."""
    from dpo_ds.trainer import TrainingError

    def failed(reason: str) -> None:
        if place.is_first or (place.rank == 1 and reason.startswith("rank 0 ")):  # then nobody else is left to write it
            write_status(output_dir, "failed", reason, _last_step(output_dir), exit_code=1)

    peers = PeerWatch(failed) if place.world_size > 1 else Silent()
    if place.is_first:
        shutil.rmtree(output_dir / PIDS, ignore_errors=True)
        (output_dir / PIDS).mkdir()
    dist.barrier()
    pid = output_dir / PIDS / f"{socket.gethostname()}-{place.rank}"
    pid.write_text(f"{os.getpid()}\n", encoding="utf-8")
    with stop.taking_signals(lambda: failed("interrupted twice, without a checkpoint of the last steps")):
        try:
            yield peers
        except (UserError, TrainingError, Stopped):  # all ranks alike
            raise
        except Exception as fault:
            peers.fault(fault)
            raise
        finally:
            peers.close()
            pid.unlink(missing_ok=True)


@contextlib.contextmanager
def _status(output_dir: Path, place: Launch):
    """STATUS.json from running to done or failed, on rank 0."""
    if not place.is_first:
        yield
        return
    _make_writable(output_dir)
    write_status(output_dir, "running")
    try:
        yield
    except Stopped as stopped:
        write_status(output_dir, "stopped", str(stopped), stopped.step, stopping.EXIT_STOPPED)
        print(f"dpo-ds: stopped after step {stopped.step}: {stopped}", flush=True)
        raise
    except UserError as mistake:
        write_status(output_dir, "failed", str(mistake), _last_step(output_dir), exit_code=2)
        raise
    except BaseException as fault:
        write_status(output_dir, "failed", f"{type(fault).__name__}: {fault}", _last_step(output_dir), exit_code=1)
        raise
    write_status(output_dir, "done", step=_last_step(output_dir), exit_code=0)


def _make_writable(output_dir: Path) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"--output_dir {output_dir}: not writable ({error.strerror}); choose another folder"
        ) from None


def _set_aside(output_dir: Path) -> None:
    """checkpoint.resume never in a folder that holds a run: what is there moves into a folder of its own."""
    names = ("checkpoints", "metrics.jsonl", "config.yaml", "tensorboard", "final")
    there = [output_dir / name for name in names if (output_dir / name).exists()]
    if there:
        aside = output_dir / f"before-{datetime.now():%Y%m%d-%H%M%S}"
        aside.mkdir()
        for path in there:
            shutil.move(path, aside / path.name)
        print(f"dpo-ds: starting over; the run that was in {output_dir} is now in {aside}", flush=True)


def _write_config(output_dir: Path, run: Section, used: dict, place: Launch) -> None:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        commit = None  # no git on this machine
    environment = {"versions": used, "git_commit": commit, "ranks": place.world_size, "threads": place.threads}
    text = yaml.safe_dump(to_plain(run) | {RECORDED: environment}, sort_keys=False)
    (output_dir / "config.yaml").write_text(text, encoding="utf-8")


def _last_step(output_dir: Path) -> int:
    """The last step that metrics.jsonl holds."""
    path = output_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines[-2:] if line.endswith("\n")]  # a process may have died while writing the last one
    return json.loads(whole[-1])["step"] if whole else 0
