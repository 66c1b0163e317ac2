"""A command from its config to its exit code: everything that can be checked first is, then the engines start.

Rank 0 alone speaks. Until `_check` is through, neither deepspeed is imported nor a process group made.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import yaml

from dpo_ds import checkpoint, ds_config, launch
from dpo_ds.checkpoint import Checkpoint
from dpo_ds.config import RECORDED, Section, TrainConfig, to_plain
from dpo_ds.errors import ConfigError, UserError
from dpo_ds.tracking import Tracker, write_status

GRACE_SECONDS = 30  # a rank that finds a user's mistake before rank 0 does leaves it the time to say so
PACKAGES = ("torch", "deepspeed", "transformers", "datasets")


@dataclass(frozen=True)
class Prepared:
    """What the checks found and made: everything a run needs but its models."""

    tokenizer: object
    hidden_size: int
    policy_config: dict
    reference_config: dict | None
    data: object
    evaluation_data: object | None
    resume: Checkpoint | None


def start(command: str, run: Section) -> int:
    """Runs `command` on this rank; returns its exit code.

    Raises:
        UserError: on every rank, for the caller to print on rank 0.
    """
    place = launch.from_environment()
    output_dir = Path(run.output_dir)
    with _status(output_dir, place):
        try:
            prepared = _check(run, place, output_dir)
        except UserError:
            if not place.is_first:
                time.sleep(GRACE_SECONDS)  # leaving first would make the launcher stop rank 0 before its line
            raise
        _run(command, run, prepared, place, output_dir)
    return 0


def versions() -> dict[str, str]:
    return {"dpo_ds": version("dpo-ds")} | {package: version(package) for package in PACKAGES}


@contextlib.contextmanager
def _status(output_dir: Path, place: launch.Launch):
    """STATUS.json from running to done or failed, on rank 0."""
    if not place.is_first:
        yield
        return
    _make_writable(output_dir)
    write_status(output_dir, "running")
    try:
        yield
    except UserError as mistake:
        write_status(output_dir, "failed", str(mistake), exit_code=2)
        raise
    except BaseException as fault:
        write_status(output_dir, "failed", f"{type(fault).__name__}: {fault}", _last_step(output_dir), exit_code=1)
        raise
    write_status(output_dir, "done", step=_last_step(output_dir), exit_code=0)


def _check(run: Section, place: launch.Launch, output_dir: Path) -> Prepared:
    """All that can go wrong before a model is loaded; no deepspeed, no process group."""
    import logging

    import torch

    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from dpo_ds import data, model
    from dpo_ds.batch import CHOSEN_ONLY, PAIR

    def say(lines) -> None:
        if place.is_first:
            for line in lines:
                print(f"dpo-ds: {line}", flush=True)

    torch.set_num_threads(place.threads)
    given = ds_config.read(run.deepspeed.config)
    model_config = model.check_model(run.model, run.model.path)
    tokenizer = model.load_tokenizer(run.model, model_config, run.model.path)
    hidden_size = model_config.get_text_config().hidden_size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = ds_config.Machine(place.world_size, device, device != "cpu" and torch.cuda.is_bf16_supported())
    policy_config, notes = ds_config.fill_policy(given, run.deepspeed.config, run.train, machine, hidden_size)
    say(notes)
    reference_config = None
    if isinstance(run, TrainConfig):
        reference_config = _check_reference(run, model, given, machine, policy_config, say)

    resume, notes = checkpoint.find(output_dir, run.checkpoint.resume)
    say(notes)
    if resume is not None:
        say(checkpoint.check_compatible(resume, run, place.world_size))

    def prepare(source, split: str):
        return data.prepare(
            source,
            options=run.data,
            tokenizer=tokenizer,
            sides=PAIR if isinstance(run, TrainConfig) else CHOSEN_ONLY,
            split=split,
            build=place.is_first_on_node,
        )

    training = prepare(run.data.train, "train")
    evaluation = None if run.data.eval is None else prepare(run.data.eval, "eval")
    if place.is_first:
        census = {"train": training.census} | ({"eval": evaluation.census} if evaluation is not None else {})
        for split, counts in census.items():
            print(f"{split} data: {data.format_census(counts)}", flush=True)
        _write_json(output_dir / "data_census.json", census)
    return Prepared(tokenizer, hidden_size, policy_config, reference_config, training, evaluation, resume)


def _check_reference(run: TrainConfig, model, given: dict, machine, policy_config: dict, say) -> dict:
    path = run.reference.path or run.model.path
    config = model.check_model(run.model, path, key="reference.path")
    policy_vocabulary = model.check_model(run.model, run.model.path).get_text_config().vocab_size
    vocabulary = config.get_text_config().vocab_size
    if vocabulary != policy_vocabulary:
        raise ConfigError(
            f"--reference.path {path}: its vocabulary has {vocabulary} tokens, model.path's {policy_vocabulary}; "
            "policy and reference must read the same tokens"
        )
    source, own = run.deepspeed.config, given
    if run.deepspeed.reference_config is not None:
        source = run.deepspeed.reference_config
        own = ds_config.read(source, "deepspeed.reference_config")
    filled, notes = ds_config.fill_reference(own, source, machine, config.get_text_config().hidden_size)
    if run.deepspeed.reference_config is not None:
        say(notes)
    if ds_config.is_bf16(filled) != ds_config.is_bf16(policy_config):
        say([f"{source}: policy and reference compute in different types, so margins do not start at 0"])
    return filled


def _run(command: str, run: Section, prepared: Prepared, place: launch.Launch, output_dir: Path) -> None:
    """Engines, loop, export; all ranks together."""
    from dpo_ds import engine

    engine.quiet_deepspeed()
    device = engine.initialize_distributed(place)
    try:
        _train(command, run, prepared, place, output_dir, device)
    finally:
        engine.finish_distributed()


def _train(command, run, prepared: Prepared, place: launch.Launch, output_dir: Path, device) -> None:
    import torch.distributed as dist

    from dpo_ds import export
    from dpo_ds.data.batching import Layout
    from dpo_ds.engine import Policy
    from dpo_ds.losses import make_loss
    from dpo_ds.model import LogProbModel, load_causal_lm
    from dpo_ds.reference.live import live_reference
    from dpo_ds.trainer import PreferenceObjective, SupervisedObjective, Trainer, total_steps

    resume = _from_rank_0(prepared.resume)
    if place.is_first and run.checkpoint.resume == "never":
        _set_aside(output_dir)
    dist.barrier()

    causal_lm = load_causal_lm(run.model, run.model.path, prepared.policy_config, run.model.attn)
    if run.train.activation_checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(LogProbModel(causal_lm), prepared.policy_config, device)
    if isinstance(run, TrainConfig):
        reference = live_reference(
            run.model, run.reference.path or run.model.path, prepared.reference_config, run.model.attn, device
        )
        objective = PreferenceObjective(make_loss(run.loss), reference)
    else:
        objective = SupervisedObjective()
    if resume is not None:
        checkpoint.load(policy.engine, resume)
    first_step = 1 if resume is None else resume.step + 1

    used = versions()
    tracker = None
    if place.is_first:
        _write_config(output_dir, run, used, place)
        tracker = Tracker(output_dir, first_step - 1, total_steps(prepared.data.sources, run.train))
        if resume is not None:
            tracker.say(f"resumed from {resume.path}")
    layout = Layout(run.train.layout, objective.sides, run.train.micro_batch_tokens, prepared.hidden_size)
    trainer = Trainer(
        policy,
        objective,
        prepared.data,
        prepared.evaluation_data,
        layout,
        run.train,
        checkpoint.CheckpointWriter(output_dir, run, used),
        tracker,
    )
    trainer.train(first_step, run.checkpoint.every)
    card = export.model_card(command, to_plain(run), trainer.last_evaluation, used)
    export.export(policy.causal_lm, prepared.tokenizer, output_dir / "final", card)
    if tracker:
        tracker.say(f"done: {output_dir / 'final'}")
        tracker.close()


def _from_rank_0(value):
    """Rank 0's choice, so that ranks never load different checkpoints."""
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _make_writable(output_dir: Path) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--output_dir {output_dir}: not writable ({error.strerror}); choose another folder") from None


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


def _write_config(output_dir: Path, run: Section, used: dict, place: launch.Launch) -> None:
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    environment = {"versions": used, "git_commit": commit or None, "ranks": place.world_size, "threads": place.threads}
    text = yaml.safe_dump(to_plain(run) | {RECORDED: environment}, sort_keys=False)
    (output_dir / "config.yaml").write_text(text, encoding="utf-8")


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _last_step(output_dir: Path) -> int:
    """The last step that metrics.jsonl holds."""
    path = output_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0
