"""Everything that can be checked before a model is loaded is checked here: no deepspeed, no process group.

Every rank runs it; the first of each node prepares the data, the others wait for its files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_ds import checkpoint, data, ds_config
from dpo_ds.batch import CHOSEN_ONLY, PAIR
from dpo_ds.checkpoint import Checkpoint
from dpo_ds.config import Section, TrainConfig
from dpo_ds.errors import ConfigError
from dpo_ds.launch import Launch
from dpo_ds.model import check_model, load_tokenizer

Say = Callable[[Iterable[str]], None]


@dataclass(frozen=True)
class Prepared:
    """What the checks found and made: everything a run needs but its models.

    policy_config and reference_config are DeepSpeed's, filled; reference_config is None where no reference is used.
    """

    tokenizer: object
    hidden_size: int
    policy_config: dict
    reference_config: dict | None
    data: object
    evaluation_data: object | None
    resume: Checkpoint | None


def prepare(run: Section, place: Launch, output_dir: Path) -> Prepared:
    """Checks DeepSpeed's JSON, models, tokenizer, checkpoint and data, in this order, cheapest first.

    Raises:
        UserError: the first mistake found.
    """

    def say(lines: Iterable[str]) -> None:
        if place.is_first:
            for line in lines:
                print(f"dpo-ds: {line}", flush=True)

    torch.set_num_threads(place.threads)
    given = ds_config.read(run.deepspeed.config)
    model_config = check_model(run.model, run.model.path)
    text_config = model_config.get_text_config()
    tokenizer = load_tokenizer(run.model, model_config, run.model.path)
    has_cuda = torch.cuda.is_available()
    machine = ds_config.Machine(
        place.world_size, "cuda" if has_cuda else "cpu", has_cuda and torch.cuda.is_bf16_supported()
    )
    policy_config, notes = ds_config.fill_policy(
        given, run.deepspeed.config, run.train, machine, text_config.hidden_size
    )
    say(notes)
    reference_config = None
    if isinstance(run, TrainConfig):
        reference_config = _check_reference(run, text_config.vocab_size, given, machine, policy_config, say)

    resume, notes = checkpoint.find(output_dir, run.checkpoint.resume)
    say(notes)
    if resume is not None:
        say(checkpoint.check_compatible(resume, run, place.world_size))

    splits = {"train": run.data.train} | ({} if run.data.eval is None else {"eval": run.data.eval})
    options = {"train": run.data, "eval": run.data.model_copy(update={"limit": None})}  # limit is for training
    sides = PAIR if isinstance(run, TrainConfig) else CHOSEN_ONLY
    prepared = {
        split: data.prepare(
            source, options=options[split], tokenizer=tokenizer, sides=sides, split=split, build=place.is_first_on_node
        )
        for split, source in splits.items()
    }
    if place.is_first:
        _report_census({split: pairs.census for split, pairs in prepared.items()}, output_dir)
    return Prepared(
        tokenizer,
        text_config.hidden_size,
        policy_config,
        reference_config,
        prepared["train"],
        prepared.get("eval"),
        resume,
    )


def _check_reference(
    run: TrainConfig, vocabulary: int, given: dict, machine: ds_config.Machine, policy_config: dict, say: Say
) -> dict:
    """DeepSpeed's config of the reference's engine: its own file's, else derived from the policy's."""
    path = run.reference.path or run.model.path
    config = check_model(run.model, path, key="reference.path").get_text_config()
    if config.vocab_size != vocabulary:
        raise ConfigError(
            f"--reference.path {path}: its vocabulary has {config.vocab_size} tokens, model.path's {vocabulary}; "
            "policy and reference must read the same tokens"
        )
    source = run.deepspeed.reference_config or run.deepspeed.config
    if run.deepspeed.reference_config is not None:
        given = ds_config.read(source, "deepspeed.reference_config")
    filled, notes = ds_config.fill_reference(given, source, machine, config.hidden_size)
    if run.deepspeed.reference_config is not None:
        say(notes)
    if ds_config.is_bf16(filled) != ds_config.is_bf16(policy_config):
        say([f"{source}: policy and reference compute in different types, so margins do not start at 0"])
    return filled


def _report_census(census: dict[str, dict], output_dir: Path) -> None:
    for split, counts in census.items():
        print(f"{split} data: {data.format_census(counts)}", flush=True)
    (output_dir / "data_census.json").write_text(
        json.dumps(census, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
