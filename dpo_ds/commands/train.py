"""A training command from its config to its exit code: checks, engines, loop, export. Rank 0 alone speaks."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dpo_ds.checkpoint.manifest import versions
from dpo_ds.checkpoint.resume import choose, set_aside_newer
from dpo_ds.checkpoint.writer import CheckpointWriter
from dpo_ds.cluster import collectives, launch, stopping
from dpo_ds.cluster.launch import Launch
from dpo_ds.cluster.process_group import process_group, speaker
from dpo_ds.cluster.stopping import StopFlag, Stopped
from dpo_ds.cluster.watchdog import PeerWatch, Silent
from dpo_ds.commands import preflight
from dpo_ds.config import RewardConfig, Section, SftConfig, TrainConfig, reference_section, to_plain
from dpo_ds.errors import UserError
from dpo_ds.models import lora
from dpo_ds.training.output_dir import (
    PIDS,
    keeping_status,
    last_metrics_of,
    last_step,
    set_aside,
    write_config,
    write_status,
)
from dpo_ds.training.tracking import ChosenFalls, Tracker


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
        with keeping_status(output_dir, place), contextlib.ExitStack() as stack:
            with stopping.at_once():
                prepared = preflight.prepare(run, place, output_dir)
                device = stack.enter_context(process_group(place))
            stop = stopping.StopFlag(stopping.deadline(run.checkpoint, started))
            with _watched(output_dir, place, stop) as peers:
                train(command, run, prepared, place, output_dir, device, stop, peers)
    except Stopped:
        return stopping.EXIT_STOPPED
    return 0


def train(
    command: str, run: Section, prepared: preflight.Prepared, place: Launch, output_dir: Path, device, stop: StopFlag,
    peers: PeerWatch | Silent,
) -> None:  # fmt: skip
    """Models into engines, the loop, the exported model; all ranks together."""
    from dpo_ds.checkpoint import shards
    from dpo_ds.cluster.collectives import from_rank_0
    from dpo_ds.data.batching import Layout
    from dpo_ds.models import export
    from dpo_ds.models.engine import settle_layout
    from dpo_ds.reference.cached import spot_check
    from dpo_ds.reference.live import LiveReference
    from dpo_ds.training import reward
    from dpo_ds.training.trainer import EVALUATION_DUE, Trainer, TrainingError, total_steps

    resume, notes = choose(from_rank_0(prepared.candidates))  # ranks must never load different checkpoints
    say = speaker(place)
    say(notes)
    policy = _policy(run, prepared, device)
    reference = _reference(run, prepared, policy, device) if isinstance(run, TrainConfig) else None
    objective = _objective(run, prepared, reference, device)
    live = [reference.model] if isinstance(reference, LiveReference) else []
    layout_name, note = settle_layout(run.train.layout, [policy, *live])
    say([note] if note else [])
    layout = Layout(layout_name, objective.sides, run.train.micro_batch_tokens, prepared.hidden_size)
    if prepared.cached is not None:
        say(spot_check(run, policy, prepared.cached, layout))
    evaluation_due = False
    if resume is not None:
        saved = shards.load(policy.engine, resume)
        if saved[0]:
            objective.load_state([of_rank["objective"] for of_rank in saved])
        evaluation_due = saved[0].get(EVALUATION_DUE, False)
        del saved  # it maps files that will be deleted
    first_step = 1 if resume is None else resume.step + 1

    used = versions()
    tracker = None
    if place.is_first:
        if run.checkpoint.resume == "never":
            set_aside(output_dir)
        write_config(output_dir, run, used, place)
        watch = ChosenFalls(run.loss.beta, reference is not None) if isinstance(run, TrainConfig) else None
        tracker = Tracker(output_dir, first_step - 1, total_steps(prepared.data.sources, run.train), watch)
        if resume is not None:
            say(set_aside_newer(output_dir, resume))
            tracker.say(f"resumed from {resume.path}")
    tell = tracker.say if tracker else print
    writer = CheckpointWriter(output_dir, run, prepared.identity, first_step - 1, stop.committing, tell, peers.progress)
    trainer = Trainer(
        policy, objective, prepared.data, prepared.evaluation_data, layout, run.train, writer, tracker, stop, peers
    )
    try:
        trainer.train(first_step, run.checkpoint.every, evaluation_due)
    except TrainingError:
        writer.finish()  # the checkpoint that is being written stays, too
        raise
    if isinstance(run, RewardConfig):
        data = prepared.data if prepared.calibration_data is None else prepared.calibration_data
        say(reward.finish(trainer, run.reward, data, prepared.tokenizer))
    metrics = last_metrics_of(output_dir, objective.names) | trainer.last_metrics
    card = export.model_card(command, to_plain(run), metrics, used)
    merge = isinstance(run, RewardConfig)  # adapters alone would lack the head
    getting_on = partial(peers.progress, trainer.total_steps)
    export.export(policy.causal_lm, prepared.tokenizer, output_dir / "final", card, merge, getting_on)
    if tracker:
        tracker.say(f"done: {output_dir / 'final'}")
        tracker.close()


def _policy(run: SftConfig, prepared: preflight.Prepared, device):
    """The model that is trained, in its engine; all ranks together."""
    from dpo_ds.models.causal_lm import LogProbModel
    from dpo_ds.models.engine import Policy
    from dpo_ds.models.loading import load_causal_lm
    from dpo_ds.models.reward_model import RewardModel, load_classifier

    is_reward = isinstance(run, RewardConfig)
    if is_reward:
        model = load_classifier(run.model, prepared.policy_config, run.train.seed)
    else:
        model = load_causal_lm(run.model, prepared.policy_config)
    if run.model.lora.r:
        lora.add_adapters(model, run.model.lora, run.train.seed, "SEQ_CLS" if is_reward else "CAUSAL_LM")
    if run.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy((RewardModel if is_reward else LogProbModel)(model), prepared.policy_config, device)


def _objective(run: SftConfig, prepared: preflight.Prepared, reference, device):
    from dpo_ds.losses import make_loss
    from dpo_ds.training.preference import PreferenceObjective
    from dpo_ds.training.reward import RewardObjective
    from dpo_ds.training.shaping import Shaping
    from dpo_ds.training.supervised import SupervisedObjective

    if isinstance(run, TrainConfig):
        return PreferenceObjective(make_loss(run.loss), reference, Shaping.of(run.loss))
    if isinstance(run, RewardConfig):
        return RewardObjective.of(run.reward, [prepared.data, prepared.evaluation_data], device)
    return SupervisedObjective()


def _reference(run: TrainConfig, prepared: preflight.Prepared, policy, device):
    """The reference strategy of reference.kind, None for none; all ranks together."""
    from dpo_ds.reference.adapter import AdapterReference
    from dpo_ds.reference.cached import CachedReference
    from dpo_ds.reference.live import LiveReference, frozen_model

    if run.reference.kind == "none":
        return None
    if run.reference.kind == "cached":
        return CachedReference(prepared.cached, device)
    if run.reference.kind == "adapter":
        return AdapterReference(policy)
    frozen = frozen_model(reference_section(run), prepared.reference_config, device)
    return LiveReference(frozen, policy, run.reference)


@contextlib.contextmanager
def _watched(output_dir: Path, place: Launch, stop: StopFlag) -> Iterator[PeerWatch | Silent]:
    """The ranks watch each other, and signals set the flag; a rank that fails alone ends all of them by name."""
    from dpo_ds.training.trainer import TrainingError

    def failed(reason: str) -> None:
        if place.is_first or (place.rank == 1 and reason.startswith("rank 0 ")):  # then nobody else is left to write it
            write_status(output_dir, "failed", reason, last_step(output_dir), exit_code=1)

    peers = PeerWatch(failed) if place.world_size > 1 else Silent()
    if place.is_first:
        shutil.rmtree(output_dir / PIDS, ignore_errors=True)
        (output_dir / PIDS).mkdir()
    collectives.barrier()
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


