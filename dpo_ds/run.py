"""A training command from its config to its exit code: checks, engines, loop, export. Rank 0 alone speaks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from dpo_ds import checkpoint, launch, preflight
from dpo_ds.config import RECORDED, Section, TrainConfig, to_plain
from dpo_ds.errors import ConfigError, UserError
from dpo_ds.launch import Launch
from dpo_ds.tracking import Tracker, write_status

GRACE_SECONDS = 30  # a rank that finds a user's mistake before rank 0 does leaves it the time to say so
PACKAGES = ("torch", "deepspeed", "transformers", "datasets")


def start(command: str, run: Section) -> int:
    """Runs `command` on this rank; returns its exit code.

    Raises:
        UserError: on every rank, for the caller to print on rank 0.
    """
    place = launch.from_environment()
    output_dir = Path(run.output_dir)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with _status(output_dir, place):
        try:
            prepared = preflight.prepare(run, place, output_dir)
        except UserError:
            if not place.is_first:
                time.sleep(GRACE_SECONDS)  # leaving first would make the launcher stop rank 0 before its line
            raise
        if not torch.accelerator.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed warns that it found nothing better
        from dpo_ds import engine  # deepspeed comes in here, after every check

        engine.quiet_libraries()
        device = engine.initialize_distributed(place)
        try:
            train(command, run, prepared, place, output_dir, device)
        finally:
            engine.finish_distributed()
    return 0


def train(command: str, run: Section, prepared: preflight.Prepared, place: Launch, output_dir: Path, device) -> None:
    """Models into engines, the loop, the exported model; all ranks together."""
    from dpo_ds import export
    from dpo_ds.data.batching import Layout
    from dpo_ds.engine import Policy, from_rank_0, settle_layout
    from dpo_ds.losses import make_loss
    from dpo_ds.model import LogProbModel, load_causal_lm
    from dpo_ds.reference.live import live_reference
    from dpo_ds.trainer import PreferenceObjective, SupervisedObjective, Trainer, total_steps

    resume = from_rank_0(prepared.resume)  # ranks must never load different checkpoints
    causal_lm = load_causal_lm(run.model, run.model.path, prepared.policy_config, run.model.attn)
    if run.train.activation_checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(LogProbModel(causal_lm), prepared.policy_config, device)
    models = [policy]
    if isinstance(run, TrainConfig):
        path = run.reference.path or run.model.path
        reference = live_reference(run.model, path, prepared.reference_config, run.model.attn, device)
        models.append(reference)
        objective = PreferenceObjective(make_loss(run.loss), reference)
    else:
        objective = SupervisedObjective()
    layout_name, note = settle_layout(run.train.layout, models)
    if note and place.is_first:
        print(f"dpo-ds: {note}", flush=True)
    if resume is not None:
        checkpoint.load(policy.engine, resume)
    first_step = 1 if resume is None else resume.step + 1

    used = versions()
    tracker = None
    if place.is_first:
        if run.checkpoint.resume == "never":
            _set_aside(output_dir)
        _write_config(output_dir, run, used, place)
        tracker = Tracker(output_dir, first_step - 1, total_steps(prepared.data.sources, run.train))
        if resume is not None:
            tracker.say(f"resumed from {resume.path}")
    layout = Layout(layout_name, objective.sides, run.train.micro_batch_tokens, prepared.hidden_size)
    writer = checkpoint.CheckpointWriter(output_dir, run, used)
    trainer = Trainer(policy, objective, prepared.data, prepared.evaluation_data, layout, run.train, writer, tracker)
    trainer.train(first_step, run.checkpoint.every)
    card = export.model_card(command, to_plain(run), trainer.last_metrics, used)
    export.export(policy.causal_lm, prepared.tokenizer, output_dir / "final", card)
    if tracker:
        tracker.say(f"done: {output_dir / 'final'}")
        tracker.close()


def versions() -> dict[str, str]:
    """Of dpo_ds and of what decides its numbers."""
    return {"dpo_ds": version("dpo-ds")} | {package: version(package) for package in PACKAGES}


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
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0
