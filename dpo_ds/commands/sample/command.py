"""`dpo-ds sample`: n completions of every prompt, scored, and the pairs that the scores make, by any number of ranks.

Prompts are cut into shards in their order. A shard is one rank's work, and its completions depend on nothing but its
prompts and the settings, so that its bytes are the same whoever draws them, and when.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from dpo_ds.cluster import collectives, signals
from dpo_ds.cluster.launch import Launch, from_environment
from dpo_ds.cluster.process_group import process_group, quiet_libraries, speaker, this_machine
from dpo_ds.cluster.shared_files import FolderLock, make_writable, refuse_foreign
from dpo_ds.commands.precompute import NO_DEEPSPEED
from dpo_ds.commands.preflight import check_room, tell_content
from dpo_ds.commands.sample.folder import Folder, begun_with, completion_rows, is_a_sample
from dpo_ds.config import SampleConfig
from dpo_ds.config import deepspeed as ds_config
from dpo_ds.data.chat.template import dated, set_date, set_template, settle_template
from dpo_ds.data.prompts import Prompt, read_prompts
from dpo_ds.data.tokenize import fingerprint
from dpo_ds.errors import ConfigError, UserError
from dpo_ds.models.fingerprint import weights_digest
from dpo_ds.models.generation import Completion, Generator, in_rounds
from dpo_ds.models.loading import check_model, load_tokenizer
from dpo_ds.models.scoring import Scorer, load_scorer
from dpo_ds.training.tracking import Progress

# What the completions and pairs depend on, beside the model, the prompts and the score.
KEYS = (
    "n", "max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "seed", "batch_size", "pairs",
    "pair_temperature", "unfinished", "engine", "shard_rows", "threads",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Holds what the checks found. engine: DeepSpeed's config, None for a replica a rank; folder: rank 0's, else None.
    """

    engine: dict | None
    precision: dict
    tokenizer: object
    scorer: Scorer | None
    prompts: list[Prompt]
    folder: Folder | None
    lock: FolderLock


def start(run: SampleConfig) -> int:
    """Runs the command on this rank; returns its exit code."""
    launch = from_environment()
    quiet_libraries()
    work = prepare(run, launch)
    kept = f"finished shards stay in {run.sample.to}, and the same command goes on from there"
    with signals.keeping(kept), contextlib.closing(work.lock), process_group(launch) as device:
        fill(run, work, launch, device)
    return 0


def prepare(run: SampleConfig, launch: Launch) -> Work:
    """Checks and prompts.

    Raises:
        UserError: the first mistake found.
    """
    sample, say = run.sample, speaker(launch)
    torch.set_num_threads(launch.threads)
    if launch.is_first:
        refuse_foreign(Path(sample.to), "sample.to", is_a_sample)
    make_writable(Path(sample.to), "sample.to")
    lock = FolderLock(Path(sample.to), launch.rank, "sample.to")
    if launch.is_first:
        lock.take(say)
    if sample.engine == "vllm":
        check_vllm(run, launch)
    scorer = None if sample.score is None else load_scorer(sample.score, "sample.score", sample.score_timeout)
    model_config = check_model(run.model, run.model.path)
    tokenizer = load_tokenizer(run.model, model_config, run.model.path)
    set_template(tokenizer, run.data.chat_template)
    set_date(tokenizer, begun_with(Path(sample.to)))
    machine, engine = this_machine(launch), None
    if run.deepspeed.config != NO_DEEPSPEED:
        given = ds_config.read(run.deepspeed.config)
        width = model_config.get_text_config().hidden_size
        engine, notes = ds_config.fill_reference(given, run.deepspeed.config, machine, width)
        say(notes)
    precision = engine or {"bf16": {"enabled": machine.has_bf16 and machine.device == "cuda"}}
    prompts = read_prompts(sample.prompts, options=run.data, tokenizer=tokenizer, limit=run.data.limit)
    say([f"{sample.prompts}: {prompts.summary()}"])
    say(settle_template(tokenizer, prompts.census.message_lists > 0))
    check_room(prompts.rows, model_config.get_text_config(), "sample", sample.max_new_tokens, say)
    texts = [prompt.text for prompt in prompts.rows]
    tell_content(launch, {"model.path": run.model.path}, tokenizer, {}, {"the prompts": texts, "the engine": engine})
    folder = None
    if launch.is_first:
        settings = {
            "model.path": "random weights" if run.model.from_config else weights_digest(run.model, run.model.path)[:12],
            "tokenizer": _digest(fingerprint(tokenizer)),
            **dated(tokenizer),
            "sample.prompts": _digest("\0".join(texts)),
            "sample.score": None if scorer is None else scorer.identity(),
            **{f"sample.{key}": getattr(sample, key) for key in KEYS},
            "data.max_prompt_length": run.data.max_prompt_length,
            "the type": "bfloat16" if precision["bf16"]["enabled"] else "float32",
            "the device": machine.device,
            **{package: version(package) for package in ("torch", "transformers")},
        }
        folder = Folder(Path(sample.to), settings, -(-len(prompts.rows) // sample.shard_rows))
        folder.check_settings()
    return Work(engine, precision, tokenizer, scorer, prompts.rows, folder, lock)


def fill(run: SampleConfig, work: Work, launch: Launch, device: torch.device) -> None:
    """Model, missing shards, pairs and manifest; all ranks together."""
    from dpo_ds.cluster.collectives import from_rank_0, raising_together

    sample, say = run.sample, speaker(launch)
    work.lock.share(collectives.barrier)
    folder: Folder = from_rank_0(work.folder)
    complete, todo = from_rank_0(_left(folder) if launch.is_first else None)
    if todo:
        with raising_together():
            folder.check_shared()
        done = folder.shards - len(todo)
        say([f"{done} of {folder.shards} shards are there already"] if done else [])
        torch.set_num_threads(sample.threads)
        generator = _generator(run, work, device)
        stop_texts = {
            token: work.tokenizer.decode([token]) for token in generator.stops if token != work.tokenizer.eos_token_id
        }
        mine = [shard for shard in in_rounds(todo, launch.rank, launch.world_size) if shard is not None]
        size = sample.shard_rows
        count = sum(len(work.prompts[shard * size : (shard + 1) * size]) for shard in mine)
        progress = Progress(count * sample.n, launch.is_first, "completion", "tokens")
        generator.report = progress.add
        for shard in in_rounds(todo, launch.rank, launch.world_size):
            first = 0 if shard is None else shard * size
            prompts = [] if shard is None else work.prompts[first : first + size]
            with raising_together():
                drawn = generator([prompt.ids for prompt in prompts], sample.n, first)
                scores = _scores(work.scorer, prompts, drawn)
                rows = completion_rows(prompts, drawn, scores, first, sample.seed, stop_texts)
            if shard is not None:
                folder.write(shard, rows)
        progress.close()
        collectives.barrier()
    with raising_together():
        if launch.is_first:
            manifest = folder.manifest() if complete else folder.finish(sample)
            say(_summary(folder, manifest, complete, sample.score is not None))


def _left(folder: Folder) -> tuple[bool, list[int]]:
    """Tells whether the folder is complete, and the shards that are missing."""
    complete = folder.is_complete()
    return complete, [] if complete else folder.unfinished()


def _generator(run: SampleConfig, work: Work, device: torch.device):
    """The model, as the config says: in vLLM, under ZeRO-3 or whole on every rank. All ranks enter."""
    from dpo_ds.models.engine import load_frozen

    if run.sample.engine == "vllm":
        from dpo_ds.models.vllm import VllmGenerator

        return VllmGenerator(run.model, work.precision, work.tokenizer, run.sample)
    model = load_frozen(run.model, work.engine, device)
    return Generator(model, work.tokenizer, run.sample, together=work.engine is not None)


def _scores(scorer: Scorer | None, prompts: list[Prompt], drawn: list[list[Completion]]) -> np.ndarray | None:
    if scorer is None:
        return None
    texts = [(prompt.text, completion.text) for prompt, own in zip(prompts, drawn, strict=True) for completion in own]
    return scorer([prompt for prompt, _ in texts], [completion for _, completion in texts])


def _summary(folder: Folder, manifest: dict, was_complete: bool, has_scores: bool) -> list[str]:
    """Words what is there, what is not in the pairs and why, and where to go on.

    Raises:
        UserError: scores were asked for and no pair is left.
    """
    counts = f"{manifest['completions']} completions of {manifest['prompts']} prompts, {manifest['finished']} ended"
    lines = [f"{folder.path}: complete, nothing to draw"] if was_complete else []
    if not has_scores:
        return [*lines, counts, f"done: {folder.completions}"]
    score, dropped = manifest["score"], manifest["dropped"]
    lines.append(f"{counts}, score {score['mean']:.4g} (standard deviation {score['std']:.4g})")
    reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
    if not manifest["pairs"]:
        raise UserError(
            f"{folder.path}: no pair is left of {manifest['prompts']} prompts ({reasons}); raise sample.n or "
            "sample.max_new_tokens, or give --sample.unfinished keep, in another folder"
        )
    left_out = f"; {sum(dropped.values())} prompts give none: {reasons}" if dropped else ""
    return [*lines, f"{manifest['pairs']} pairs{left_out}", f"done: train on them with --data.train {folder.pairs}"]


def check_vllm(run: SampleConfig, launch: Launch) -> None:
    """Raises ConfigError where vLLM is asked for and cannot be used."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("--sample.engine vllm: vllm is not installed; pip install vllm, or leave sample.engine out")
    if run.deepspeed.config != NO_DEEPSPEED:
        raise ConfigError("--sample.engine vllm takes DeepSpeed's place; give it --deepspeed.config none")
    if launch.world_size > 1:
        raise ConfigError("--sample.engine vllm uses all GPUs from one process; start it without a launcher")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
