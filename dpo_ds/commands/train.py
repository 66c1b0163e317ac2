"""Runs a training command from its config to its exit code: checks, engines, loop, export. Rank 0 alone speaks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dpo_ds.checkpoint.resume import choose
from dpo_ds.cluster import collectives
from dpo_ds.cluster.launch import Launch
from dpo_ds.cluster.process_group import Say, speaker
from dpo_ds.cluster.stopping import StopFlag
from dpo_ds.cluster.watchdog import PeerWatch, Silent
from dpo_ds.commands import preflight
from dpo_ds.commands.opening import opened_output, run_job
from dpo_ds.config import SftConfig
from dpo_ds.training.course import COURSE, Course, return_to_best
from dpo_ds.training.tasks import Prepared, Supervised, task_of

if TYPE_CHECKING:
    from dpo_ds.data.batching import Layout
    from dpo_ds.models.engine import Policy
    from dpo_ds.training.objectives.objective import Objective


def start(run: SftConfig) -> int:
    """Runs `sft`, `reward` or `train` on this rank; returns its exit code.

    Raises:
        UserError: on every rank, for the caller to print on rank 0.
    """
    return run_job(task_of(run), preflight.prepare, train)


def assemble(task: Supervised, prepared: Prepared, device, say: Say) -> tuple[Policy, Objective, Layout]:
    """Brings models into engines and tries them: what trains, what it minimises, how groups become micro-batches. All
    ranks enter.
    """
    from dpo_ds.data.batching import Layout
    from dpo_ds.models.checks import layout_notes, settle_activations, settle_layout, settle_sequence
    from dpo_ds.models.engine import Policy
    from dpo_ds.models.layers.compile import settle_compilation
    from dpo_ds.training.objectives.balanced import with_balanced_routers

    run = task.run
    policy = Policy(task.load(prepared.policy_config), prepared.policy_config, device)
    objective, note = with_balanced_routers(task.objective(policy, prepared, device), policy, run.model.router_aux_loss)
    say(note)
    layout_name, refusal = settle_layout(run.train.layout, [policy, *objective.frozen_models()])
    say(layout_notes("train.layout", refusal))
    say(settle_activations(policy))
    settle_compilation(run.model.compile, [policy, *objective.frozen_models()], say)
    ranks = settle_sequence(run.train.sequence_parallel, refusal, [policy, *objective.frozen_models()])
    spread = ranks, collectives.sequence_place()
    return policy, objective, Layout(layout_name, ranks * run.train.micro_batch_tokens, prepared.hidden_size, spread)


def train(
    task: Supervised, prepared: Prepared, launch: Launch, output_dir: Path, device, stop: StopFlag,
    peers: PeerWatch | Silent,
) -> None:  # fmt: skip
    """Brings models into engines, runs the loop and exports the model; all ranks together."""
    from dpo_ds.checkpoint import shards
    from dpo_ds.reference.cached import spot_check
    from dpo_ds.training.samples import Sampler
    from dpo_ds.training.schedule import total_steps
    from dpo_ds.training.trainer import EVALUATION_DUE, Trainer

    run, say = task.run, speaker(launch)
    candidates = collectives.from_rank_0(prepared.candidates)  # ranks must never load different checkpoints
    resume, notes = choose(candidates)
    say(notes)
    policy, objective, layout = assemble(task, prepared, device, say)
    if prepared.cached is not None:
        say(spot_check(run, policy, prepared.cached, layout))
    evaluation_due, course, followed = False, Course.of(run, prepared.evaluation_data), None
    if resume is not None:
        saved = shards.load(policy.engine, resume)
        if saved[0]:
            objective.load_state([of_rank["objective"] for of_rank in saved])
        evaluation_due, followed = saved[0].get(EVALUATION_DUE, False), saved[0].get(COURSE)
        del saved  # it maps files that will be deleted

    last_step = total_steps(prepared.data.sources, run.train, objective.counts(prepared.data))
    with opened_output(
        task, prepared.identity, launch, output_dir, resume, last_step, stop, peers, task.watch()
    ) as output:
        if course is not None:
            say(course.load_state(followed, output.writer))
        sampler = Sampler(policy, prepared.tokenizer, prepared.prompts, run.sample) if prepared.prompts else None
        trainer = Trainer(
            policy, objective, prepared.data, prepared.evaluation_data, layout, run.train, output.writer,
            run.checkpoint.every, output.tracker, stop, peers, output.profile, sampler, course,
        )  # fmt: skip
        trainer.train(output.first_step, evaluation_due)
        if trainer.has_seen_enough:
            output.ends_early(course.reason)
        best = output.writer.best
        say(course.note(best) if course else [])
        if best not in (0, output.writer.newest):
            return_to_best(policy, output.writer)
            trainer.last_metrics = {}  # of a later step
        say(task.finish(trainer, prepared))
        output.hand_over(policy, prepared.tokenizer, objective.names, trainer.last_metrics, best)
