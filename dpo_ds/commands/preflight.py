"""Everything that can be checked before a model is loaded is checked here: no deepspeed, no process group.

Every rank runs it; the first of each node prepares the data, the others wait for its files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dpo_ds import data
from dpo_ds.checkpoint import resume
from dpo_ds.checkpoint.manifest import Checkpoint
from dpo_ds.cluster import rendezvous, stopping
from dpo_ds.cluster.launch import Launch
from dpo_ds.cluster.process_group import Say, speaker, this_machine
from dpo_ds.config import (
    DataSection,
    PrecomputeConfig,
    RlConfig,
    SftConfig,
    TrainConfig,
    reference_section,
)
from dpo_ds.config import deepspeed as ds_config
from dpo_ds.data.batching import steps_per_epoch
from dpo_ds.data.chat.template import BUILT_IN, DATE, TEMPLATE, dated, set_date, set_template, settle_template
from dpo_ds.data.prompts import Prompt, Prompts, read_prompts
from dpo_ds.data.tokenize import fingerprint
from dpo_ds.errors import ConfigError
from dpo_ds.models.fingerprint import file_digests
from dpo_ds.models.layers.quantized import check_gathering, check_quantize
from dpo_ds.models.loading import check_model, has_table_of_positions, load_tokenizer
from dpo_ds.models.lora import check_lora
from dpo_ds.models.packed import spread
from dpo_ds.reference import cached
from dpo_ds.training import hub
from dpo_ds.training.tasks import Prepared, Supervised

CACHE = "the cache in reference.cache"  # among what a checkpoint remembers
CALIBRATION = "calibration"  # beside train and eval


def prepare(task: Supervised, launch: Launch, output_dir: Path) -> Prepared:
    """Checks DeepSpeed's JSON, models, tokenizer, checkpoint and data, in this order, cheapest first.

    Raises:
        UserError: the first mistake found.
    """
    run, say = task.run, speaker(launch)
    if launch.is_first and run.hub.push:
        hub.check_token(run.hub.push, "hub.push")
    torch.set_num_threads(launch.threads)
    given = ds_config.read(run.deepspeed.config)
    model_config = check_model(run.model, run.model.path, classifier=run.is_classifier)
    text_config = model_config.get_text_config()
    check_lora(run.model.lora, text_config.hidden_size)
    machine = this_machine(launch)
    check_quantize(run.model, machine, model_config)
    task.check_model(model_config)
    check_sequence("train", run.train.sequence_parallel, text_config, launch)
    tokenizer = load_tokenizer(run.model, model_config, run.model.path)
    set_template(tokenizer, run.data.chat_template)
    policy_config, notes = ds_config.fill_policy(
        given, run.deepspeed.config, run.train, machine, text_config.hidden_size
    )
    say(notes)
    check_gathering(run.model, policy_config, run.deepspeed.config)
    reference_config = manifest = None
    if task.reference is not None:
        reference_text_config = check_reference_model(run, text_config)
        if task.reference.kind == "live":
            check_sequence("train", run.train.sequence_parallel, reference_text_config, launch, "reference.path")
            reference_config = fill_reference(run, reference_text_config, given, machine, policy_config, say)
        if task.reference.kind == "cached":
            manifest = cached.check_cache(run, tokenizer, launch)

    candidates, recorded = find_checkpoints(run, output_dir, launch)
    set_date(tokenizer, recorded, None if manifest is None else manifest.values)
    prompts = _prompts_to_show(run, tokenizer, text_config, say)

    prepared = prepare_data(run.data, tokenizer, run.sides, launch, task.margin_column, task.calibration)
    if launch.is_first:
        for split, of_split in prepared.items():
            task.check_data(split, of_split.census)
    censuses = [pairs.census["message_lists"] for pairs in prepared.values()]
    notes = settle_template(tokenizer, any([*censuses, prompts.census.message_lists]))
    say(notes)
    check_fit(prepared, text_config, say)
    _check_an_epoch(prepared["train"].sources, run)
    if launch.is_first:
        write_census({split: pairs.census for split, pairs in prepared.items()}, output_dir)
    known = {TEMPLATE: BUILT_IN} if notes and prepared["train"].census["message_lists"] else {}
    known |= dated(tokenizer) if DATE in recorded or not candidates else {}
    known = _check_identity(run, launch, model_config, policy_config, prepared["train"], candidates, manifest, known)
    reference = getattr(run, "reference", None)
    models = {"model.path": run.model.path, "reference.path": None if reference is None else reference.path}
    texts = [prompt.text for prompt in prompts.rows]
    others = {"DeepSpeed's configuration": policy_config, "the prompts in sample.prompts": texts}
    tell_content(launch, models, tokenizer, prepared, others)
    rows = None if manifest is None else cached.find_rows(run, manifest, list(prepared.values()), launch)
    if launch.is_first and run.hub.push:
        say(hub.prepare(run.hub.push, run.hub.private, "hub.push"))
    return Prepared(
        tokenizer,
        text_config.hidden_size,
        policy_config,
        reference_config,
        prepared["train"],
        prepared.get("eval"),
        candidates,
        known,
        rows,
        prepared.get(CALIBRATION),
        prompts.rows,
    )


def find_checkpoints(run: SftConfig | RlConfig, output_dir: Path, launch: Launch) -> tuple[list[Checkpoint], dict]:
    """Returns the checkpoints to resume from, best first, and the identity that the best one has recorded.

    Raises:
        UserError: none where one is asked for, or of a run whose config differs in what may not change.
    """
    say = speaker(launch)
    stopping.check_end(run.checkpoint)
    candidates, notes = resume.find(output_dir, run.checkpoint.resume)
    say(notes)
    if not candidates:
        return [], {}
    say(resume.check_config(candidates[0], run, launch.world_size))
    return candidates, candidates[0].manifest["identity"]


def _prompts_to_show(run: SftConfig, tokenizer, text_config, say: Say) -> Prompts:
    """Returns the prompts that the policy completes while it trains, none where train.sample_every asks for none."""
    if not run.train.sample_every:
        return Prompts()
    if run.is_classifier:
        say([f"train.sample_every {run.train.sample_every}: a reward model completes nothing"])
        return Prompts()
    prompts = read_prompts(run.sample.prompts, options=run.data, tokenizer=tokenizer, limit=run.train.sample_prompts)
    say([f"{run.sample.prompts}: {prompts.summary()}, completed every {run.train.sample_every} steps"])
    check_room(prompts.rows, text_config, "sample", run.sample.max_new_tokens, say)
    return prompts


def _check_identity(
    run: SftConfig, launch: Launch, model_config, policy_config: dict, pairs, candidates: Sequence[Checkpoint],
    manifest, besides: dict[str, str],
) -> dict[str, str]:  # fmt: skip
    """Returns what a checkpoint will remember, `besides` included, after comparing it with the one to resume from.

    Every byte of models and data is read, once on a machine, so the first rank of each node alone does.
    """
    if not launch.is_first_on_node:
        return {}
    known = besides | resume.identity_of(run, model_config, policy_config, pairs)
    recorded = candidates[0].manifest["identity"] if candidates else {}
    if manifest is not None:
        cache = recorded.get(CACHE)
        known[CACHE] = cache if cache in manifest.ids else manifest.id  # a cache may have grown since
    if candidates:
        alike = resume.identity_of(run, model_config, policy_config, pairs, recorded)
        resume.check_identity(candidates[0], known | alike)
    return known


def tell_content(
    launch: Launch, models: Mapping[str, str | None], tokenizer, datasets: Mapping[str, data.GroupDataset],
    others: Mapping[str, object] | None = None,
) -> None:  # fmt: skip
    """Notes what this node has, by content, before the ranks compare it (rendezvous.wait_for_all).

    models: their paths by key. others: anything that must be equal, by what it is.
    """
    if not launch.is_first_on_node or launch.local_world_size >= launch.world_size:
        return
    for key, path in models.items():
        for name, digest in file_digests(path).items() if path is not None else ():
            rendezvous.found(f"--{key} {Path(path) / name}", digest[:16])
    rendezvous.found("the tokenizer", _short(fingerprint(tokenizer)))
    for split, pairs in datasets.items():
        rendezvous.found(f"the tokenised {split} data", f"{len(pairs)} rows {pairs.content()[:16]}")
    for what, value in (others or {}).items():
        rendezvous.found(what, _short(json.dumps(value, sort_keys=True)))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare_data(
    section: DataSection, tokenizer, sides: tuple[str, ...], launch: Launch, margin_column: str | None = None,
    calibration=None,
) -> dict[str, data.GroupDataset]:  # fmt: skip
    """The tokenised pairs of data.train and, if given, data.eval and `calibration`; rank 0 prints what was kept and
    dropped.
    """
    given = {"train": section.train, "eval": section.eval, CALIBRATION: calibration}
    given = {split: source for split, source in given.items() if source is not None}
    unlimited = section.model_copy(update={"limit": None})  # limit is for training
    options = {"train": section, "eval": unlimited, CALIBRATION: unlimited}
    prepared, rows = {}, 0
    for split, source in given.items():
        prepared[split] = data.prepare(
            source,
            options=options[split],
            tokenizer=tokenizer,
            sides=sides,
            split="eval" if split == "eval" else "train",
            build=launch.is_first_on_node,
            margin_column=None if split == CALIBRATION else margin_column,
        )
        prepared[split].first_index = rows
        rows += len(prepared[split])
        if launch.is_first:
            print(f"{split} data: {data.format_census(prepared[split].census)}", flush=True)
    return prepared


def check_fit(prepared: dict[str, data.GroupDataset], text_config, say: Say) -> None:
    """The tokens and the lengths that the data really has, against what the model has room for."""
    for split, pairs in prepared.items():
        token, longest = pairs.census["largest_token"], pairs.census["longest"]
        if token >= text_config.vocab_size:
            raise ConfigError(
                f"{split} data holds token {token}, the model's vocab_size is {text_config.vocab_size}; "
                "its tokenizer belongs to another model"
            )
        positions = getattr(text_config, "max_position_embeddings", None)
        if positions is None or longest <= positions:
            continue
        if has_table_of_positions(text_config):
            raise ConfigError(
                f"{split} data has a completion that ends at token {longest}, the model knows {positions} positions; "
                f"cut with --data.max_length {positions}"
            )
        factor = math.ceil(longest / positions)
        remedy = f"cut with --data.max_length {positions}, or scale its positions: rope_parameters in its config.json, "
        remedy += f"rope_type yarn with factor {factor}, say"
        say([f"{split} data is up to {longest} tokens long, the model was made for {positions}; {remedy}"])


def check_room(prompts: Sequence[Prompt], text_config, key: str, max_new_tokens: int, say: Say) -> None:
    """Prompt and completion of `key`.max_new_tokens against the positions that the model knows."""
    positions = getattr(text_config, "max_position_embeddings", None)
    longest = max(len(prompt.ids) for prompt in prompts) + max_new_tokens
    if positions is None or longest <= positions:
        return
    what = f"the longest prompt and {key}.max_new_tokens are {longest} tokens, the model"
    if has_table_of_positions(text_config):
        room = positions - max_new_tokens
        cut = f"cut prompts with --data.max_prompt_length {room}" if room > 0 else f"lower {key}.max_new_tokens"
        raise ConfigError(f"{what} knows {positions} positions; {cut}")
    say([f"{what} was made for {positions}"])


def check_sequence(section: str, ranks: int, text_config, launch: Launch, model: str = "") -> None:
    """Raises ConfigError where so many ranks cannot compute a row together. section: train or precompute, the key's;
    model: the key of the one that text_config is of, where it is not the only one.
    """
    given = f"--{section}.sequence_parallel {ranks}{model and f' --{model}'}"
    if launch.world_size % ranks:
        divisors = ", ".join(str(n) for n in range(1, launch.world_size + 1) if launch.world_size % n == 0)
        raise ConfigError(f"{given}: the run has {launch.world_size} ranks; take one of {divisors}")
    heads = getattr(text_config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return  # layers that differ are looked at when they run
    key_heads = getattr(text_config, "num_key_value_heads", None)
    key_heads = key_heads if isinstance(key_heads, int) else heads
    if reason := spread.refusal(heads, key_heads, ranks):
        fitting = [n for n in range(2, ranks) if launch.world_size % n == 0 and not spread.refusal(heads, key_heads, n)]
        raise ConfigError(f"{given}: {reason}; take {fitting[-1] if fitting else 1}")


def _check_an_epoch(sources, run: SftConfig) -> None:
    if steps_per_epoch(sources, run.train.global_batch_size) == 0:
        raise ConfigError(f"data.train: the weights {[weight for *_, weight in sources]} leave no pair in an epoch")


def check_reference_model(run: TrainConfig | RlConfig | PrecomputeConfig, policy_config):
    """The reference's text config.

    Raises:
        UserError: no usable model, or one of another vocabulary than the policy's.
    """
    section = reference_section(run)
    path = section.path
    config = check_model(section, path, key="reference.path").get_text_config()
    if config.vocab_size != policy_config.vocab_size:
        raise ConfigError(
            f"--reference.path {path}: its vocabulary has {config.vocab_size} tokens, model.path's "
            f"{policy_config.vocab_size}; policy and reference must read the same tokens"
        )
    return config


def fill_reference(
    run: TrainConfig | RlConfig, config, given: dict, machine: ds_config.Machine, policy_config: dict, say: Say
) -> dict:
    """DeepSpeed's config of the reference's engine: its own file's, else derived from the policy's."""
    source = run.deepspeed.reference_config or run.deepspeed.config
    if run.deepspeed.reference_config is not None:
        given = ds_config.read(source, "deepspeed.reference_config")
    filled, notes = ds_config.fill_reference(given, source, machine, config.hidden_size)
    if run.deepspeed.reference_config is not None:
        say(notes)
    if ds_config.is_bf16(filled) != ds_config.is_bf16(policy_config):
        say([f"{source}: policy and reference compute in different types, so margins do not start at 0"])
    return filled


def write_census(census: dict[str, dict], output_dir: Path) -> None:
    path = output_dir / "data_census.json"
    text = json.dumps(census, indent=1, ensure_ascii=False) + "\n"
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        problem = f"{error.strerror or error}; make room there, or choose another folder"
        raise ConfigError(f"--output_dir {output_dir}: {path.name} cannot be written: {problem}") from None
