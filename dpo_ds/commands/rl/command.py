"""`dpo-ds rl`: a policy draws completions, a score says what they are worth, and the policy is updated with them.

From config to exit code: checks, engines, loop, export. Rank 0 alone speaks.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

from dpo_ds.checkpoint.manifest import versions
from dpo_ds.checkpoint.resume import choose
from dpo_ds.cluster import collectives, stopping
from dpo_ds.cluster.launch import Launch, from_environment
from dpo_ds.cluster.process_group import process_group, speaker
from dpo_ds.cluster.stopping import StopFlag
from dpo_ds.cluster.watchdog import PeerWatch, Silent
from dpo_ds.commands.opening import opened_output
from dpo_ds.commands.rl.preparation import Prepared, prepare
from dpo_ds.config import RlConfig, to_plain
from dpo_ds.errors import TrainingError
from dpo_ds.training.hub import Push
from dpo_ds.training.output_dir import keeping_status, last_metrics_of, watched
from dpo_ds.training.rl.task import Reinforcement
from dpo_ds.training.tracking import Shown

SHOWN = Shown(
    {"score": "score", "kl": "kl", "tokens": "completion_tokens", "drawn/s": "generation_tokens_per_second"},
    {"score": "eval_score", "kl": "eval_kl", "tokens": "eval_completion_tokens"},
)


def start(run: RlConfig) -> int:
    """Runs the command on this rank; returns its exit code.

    Raises:
        UserError: on every rank, for the caller to print on rank 0.
    """
    launch = from_environment()
    output_dir, task = Path(run.output_dir), Reinforcement(run)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    started = time.time()
    with keeping_status(output_dir, launch) as lock:
        prepared = prepare(task, launch, output_dir)
        stop = StopFlag(stopping.deadline(run.checkpoint, started))
        with process_group(launch) as device:
            lock.share(collectives.barrier)
            with watched(output_dir, launch, stop) as peers:
                train(task, prepared, launch, output_dir, device, stop, peers)
    return 0


def train(
    task: Reinforcement, prepared: Prepared, launch: Launch, output_dir: Path, device, stop: StopFlag,
    peers: PeerWatch | Silent,
) -> None:  # fmt: skip
    """Brings models into engines, runs the loop and exports the policy; all ranks together."""
    from dpo_ds.checkpoint import shards
    from dpo_ds.data.batching import Layout
    from dpo_ds.models import export
    from dpo_ds.models.checks import layout_notes, settle_layout, settle_tiles
    from dpo_ds.models.engine import Policy
    from dpo_ds.models.layers.compile import settle_compilation
    from dpo_ds.training.rl.reward_model import LiveRewardModel
    from dpo_ds.training.rl.rollouts import Sampler
    from dpo_ds.training.rl.trainer import CRITIC, TOLD, RlTrainer
    from dpo_ds.training.trainer import total_steps

    run, engines, say = task.run, prepared.engines, speaker(launch)
    candidates = collectives.from_rank_0(prepared.candidates)  # ranks must never load different checkpoints
    resume, notes = choose(candidates)
    say(notes)
    policy = Policy(task.load(engines.policy), engines.policy, device)
    reference = task.load_reference(policy, engines.reference, device)
    models = task.load_models(policy, reference, engines.critic, device)
    layout_name, refusal = settle_layout(run.train.layout, models.all())
    say(layout_notes("train.layout", refusal))
    for trained in models.trained():
        say(settle_tiles(trained))
    settle_compilation(run.model.compile, models.all(), say)
    task.set_temperature(models.of_language())
    layout = Layout(layout_name, run.train.micro_batch_tokens, prepared.hidden_size)
    scorer = prepared.scorer
    if engines.reward is not None:
        scorer = LiveRewardModel(scorer, engines.reward, device)
    replica = task.load_replica(engines.policy, device)
    saved = [] if resume is None else shards.load(policy.engine, resume)
    if resume is not None and models.critic is not None:
        shards.load(models.critic.engine, resume, CRITIC)

    used, sources = versions(), [(0, len(prepared.prompts), 1.0)]
    with opened_output(
        run, prepared.identity, launch, output_dir, resume, total_steps(sources, run.train), used, stop, peers,
        shown=SHOWN,
    ) as output:  # fmt: skip
        tracker, writer = output.tracker, output.writer
        sampler = Sampler(policy, prepared.tokenizer, scorer, run.rl, run.train.seed, replica)
        trainer = RlTrainer(
            models, sampler, task.learner(models, layout), prepared.prompts, prepared.held_out, layout, run, writer,
            tracker, stop, peers, output.profile,
        )  # fmt: skip
        if saved:
            trainer.load_state(saved)
        del saved  # it maps files that will be deleted
        try:
            trainer.train(output.first_step)
        except TrainingError:
            writer.finish()  # the checkpoint that is being written stays, too
            raise
        metrics = last_metrics_of(output_dir, (*trainer.learner.names, *TOLD)) | trainer.last_metrics
        card = export.model_card(run.command, to_plain(run), metrics, used)
        getting_on, final = partial(peers.progress, trainer.total_steps), output_dir / "final"
        export.export(policy.causal_lm, prepared.tokenizer, final, card, task.merges_adapters, getting_on)
        push = Push(final, run.hub) if launch.is_first and run.hub.push else None
        if tracker:
            tracker.final(metrics)
            tracker.say(f"done: {final}")
    if push:
        say([push.outcome(getting_on, lambda: any(stop.told()))])
