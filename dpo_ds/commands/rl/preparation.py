"""Everything of `dpo-ds rl` that can be checked before a model is loaded: no deepspeed, no process group."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dpo_ds.checkpoint import resume
from dpo_ds.checkpoint.manifest import Checkpoint
from dpo_ds.cluster.launch import Launch
from dpo_ds.cluster.process_group import Say, speaker, this_machine
from dpo_ds.commands import preflight
from dpo_ds.config import RlConfig
from dpo_ds.config import deepspeed as ds_config
from dpo_ds.data.chat.template import DATE, dated, set_date, set_template, settle_template
from dpo_ds.data.prompts import Prompt, Prompts, read_prompts
from dpo_ds.errors import ConfigError
from dpo_ds.models.fingerprint import model_digest
from dpo_ds.models.loading import check_model, load_tokenizer
from dpo_ds.models.lora import check_lora
from dpo_ds.models.reward_model import check_reward_model
from dpo_ds.models.scoring import Scorer, ScoringModel, load_scorer
from dpo_ds.training import hub
from dpo_ds.training.rl.task import Reinforcement

PROMPTS, SCORE, CRITIC = "the prompts in rl.prompts", "the score in rl.score", "the model in rl.critic"


@dataclass(frozen=True)
class Engines:
    """DeepSpeed's configs, filled; None for a model that the run does not have under ZeRO-3."""

    policy: dict
    reference: dict | None
    critic: dict | None
    reward: dict | None


@dataclass(frozen=True)
class Prepared:
    """Holds all that a run needs but its models. candidates: checkpoints to resume from, best first; identity: what a
    checkpoint remembers that the config's paths stand for.
    """

    tokenizer: object
    hidden_size: int
    engines: Engines
    scorer: Scorer
    prompts: list[Prompt]
    held_out: list[Prompt]
    candidates: list[Checkpoint]
    identity: dict[str, str]


def prepare(task: Reinforcement, launch: Launch, output_dir: Path) -> Prepared:
    """Checks the score, models, DeepSpeed's JSON, checkpoint and prompts, in this order.

    Raises:
        UserError: the first mistake found.
    """
    run, say = task.run, speaker(launch)
    if launch.is_first and run.hub.push:
        hub.check_token(run.hub.push, "hub.push")
    torch.set_num_threads(launch.threads)
    scorer = load_scorer(run.rl.score, "rl.score", run.rl.score_timeout)
    model_config = check_model(run.model, run.model.path)
    text_config = model_config.get_text_config()
    check_lora(run.model.lora, text_config.hidden_size)
    task.check_model(model_config)
    critic_config = check_critic(task, text_config)
    tokenizer = load_tokenizer(run.model, model_config, run.model.path)
    set_template(tokenizer, run.data.chat_template)
    engines = fill_engines(task, scorer, text_config, critic_config, this_machine(launch), say)

    candidates, recorded = preflight.find_checkpoints(run, output_dir, launch)
    set_date(tokenizer, recorded)
    prompts, held_out = read_all_prompts(run, tokenizer, text_config, launch, output_dir)

    known: dict[str, str] = {}
    if launch.is_first_on_node:  # every byte of the models is read, once on a machine
        known = {PROMPTS: _digest(prompts), SCORE: scorer.identity()}
        known |= dated(tokenizer) if DATE in recorded or not candidates else {}
        known |= {} if critic_config is None else {CRITIC: model_digest(task.critic.path, critic_config)}
        known |= resume.identity_of_models(run, model_config, engines.policy, recorded)
        if candidates:
            resume.check_identity(candidates[0], known)
    models = {"model.path": run.model.path, "reference.path": run.reference.path}
    models |= {} if task.critic is None else {"rl.critic": task.critic.path}
    others = {what: known[what] for what in (PROMPTS, SCORE) if known}
    preflight.tell_content(launch, models, tokenizer, {}, others | {"DeepSpeed's configuration": engines.policy})
    if launch.is_first and run.hub.push:
        say(hub.prepare(run.hub.push, run.hub.private, "hub.push"))
    return Prepared(tokenizer, text_config.hidden_size, engines, scorer, prompts, held_out, candidates, known)


def fill_engines(
    task: Reinforcement, scorer: Scorer, text_config, critic_config, machine: ds_config.Machine, say: Say
) -> Engines:
    """Returns every engine's config of the run's DeepSpeed files.

    Raises:
        UserError: a mistake in them, or no usable reference.
    """
    run, path = task.run, task.run.deepspeed.config
    given = ds_config.read(path)
    policy, notes = ds_config.fill_policy(given, path, run.train, machine, text_config.hidden_size)
    say(notes)
    reference = critic = reward = None
    if task.reference is not None:
        reference_config = preflight.check_reference_model(run, text_config)
        if task.reference.kind == "live":
            reference = preflight.fill_reference(run, reference_config, given, machine, policy, say)
    if critic_config is not None:
        width = critic_config.get_text_config().hidden_size
        critic = ds_config.fill_critic(given, path, run.train, machine, width)
    if isinstance(scorer, ScoringModel):
        width = scorer.config.get_text_config().hidden_size
        reward = ds_config.fill_reference(given, path, machine, width, "reward")[0]
    return Engines(policy, reference, critic, reward)


def read_all_prompts(
    run: RlConfig, tokenizer, text_config, launch: Launch, output_dir: Path
) -> tuple[list[Prompt], list[Prompt]]:
    """Returns those to learn from and the held-out ones; rank 0 says what was kept and writes the census.

    Raises:
        UserError: a row that is wrong, no prompt, or no room for one.
    """
    say, found = speaker(launch), {}
    for split, source in {"train": run.rl.prompts, "eval": run.rl.eval_prompts}.items():
        if source is not None:
            limit = run.data.limit if split == "train" else None
            found[split] = read_prompts(source, options=run.data, tokenizer=tokenizer, split=split, limit=limit)
            say([f"{source}: {found[split].summary()}"])
    say(settle_template(tokenizer, any(prompts.census.message_lists for prompts in found.values())))
    check_prompts([prompt for prompts in found.values() for prompt in prompts.rows], text_config, run, say)
    if launch.is_first:
        preflight.write_census({split: census(prompts) for split, prompts in found.items()}, output_dir)
    return found["train"].rows, found["eval"].rows if "eval" in found else []


def check_critic(task: Reinforcement, text_config):
    """Returns the transformers config of what the critic begins as; None where there is none.

    Raises:
        UserError: it is no model of the policy's tokens that can have a score for each.
    """
    section = task.critic
    if section is None:
        return None
    config = check_model(section, section.path, key="rl.critic", classifier=True)
    check_reward_model(section, config, key="rl.critic")
    vocabulary = config.get_text_config().vocab_size
    if vocabulary != text_config.vocab_size:
        raise ConfigError(
            f"--rl.critic {section.path}: its vocabulary has {vocabulary} tokens, model.path's "
            f"{text_config.vocab_size}; a critic must read the policy's tokens: give --rl.critic {task.run.model.path}"
        )
    return config


def check_prompts(prompts: list[Prompt], text_config, run: RlConfig, say: Say) -> None:
    """Raises ConfigError for tokens or lengths that the model has no room for."""
    largest = max(int(prompt.ids.max()) for prompt in prompts)
    if largest >= text_config.vocab_size:
        raise ConfigError(
            f"rl.prompts holds token {largest}, the model's vocab_size is {text_config.vocab_size}; its tokenizer "
            "belongs to another model"
        )
    preflight.check_room(prompts, text_config, "rl", run.rl.max_new_tokens, say)


def census(prompts: Prompts) -> dict:
    """Returns what data_census.json says of prompts."""
    return prompts.census.summary({"prompt": np.array([len(prompt.ids) for prompt in prompts.rows])})


def _digest(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{len(prompt.ids)} ".encode() + prompt.ids.tobytes())
    return digest.hexdigest()
