"""`dpo-ds rl`: a policy draws completions, a score says what they are worth, and the policy is updated with them.

From config to exit code: checks, engines, loop, export. Rank 0 alone speaks.
"""

from __future__ import annotations

from pathlib import Path

from dpo_ds.checkpoint.resume import choose
from dpo_ds.cluster import collectives
from dpo_ds.cluster.launch import Launch
from dpo_ds.cluster.process_group import speaker
from dpo_ds.cluster.stopping import StopFlag
from dpo_ds.cluster.watchdog import PeerWatch, Silent
from dpo_ds.commands.opening import opened_output, run_job
from dpo_ds.commands.rl.preparation import Prepared, prepare
from dpo_ds.config import RlConfig
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
    return run_job(Reinforcement(run), prepare, train)


def train(
    task: Reinforcement, prepared: Prepared, launch: Launch, output_dir: Path, device, stop: StopFlag,
    peers: PeerWatch | Silent,
) -> None:  # fmt: skip
    """Brings models into engines, runs the loop and exports the policy; all ranks together."""
    from dpo_ds.checkpoint import shards
    from dpo_ds.data.batching import Layout
    from dpo_ds.models.checks import layout_notes, settle_activations, settle_layout
    from dpo_ds.models.engine import Policy
    from dpo_ds.models.layers.compile import settle_compilation
    from dpo_ds.training.rl.reward_model import LiveRewardModel
    from dpo_ds.training.rl.rollouts import Sampler
    from dpo_ds.training.rl.trainer import CRITIC, TOLD, RlTrainer
    from dpo_ds.training.schedule import total_steps

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
        say(settle_activations(trained))
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

    last_step = total_steps([(0, len(prepared.prompts), 1.0)], run.train)
    with opened_output(
        task, prepared.identity, launch, output_dir, resume, last_step, stop, peers, shown=SHOWN
    ) as output:
        sampler = Sampler(policy, prepared.tokenizer, scorer, run.rl, run.train.seed, replica)
        trainer = RlTrainer(
            models, sampler, task.learner(models, layout), prepared.prompts, prepared.held_out, layout, run,
            output.writer, output.tracker, stop, peers, output.profile,
        )  # fmt: skip
        if saved:
            trainer.load_state(saved)
        del saved  # it maps files that will be deleted
        trainer.train(output.first_step)
        output.hand_over(policy, prepared.tokenizer, (*trainer.learner.names, *TOLD), trainer.last_metrics)
