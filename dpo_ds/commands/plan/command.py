"""`dpo-ds plan RUN.YAML --gpus N --gpu CARD`: what a training run will take, before any GPU is taken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import yaml

from dpo_ds import config
from dpo_ds.cluster.foreign import refusing
from dpo_ds.cluster.launch import ALONE
from dpo_ds.cluster.process_group import quiet_libraries
from dpo_ds.commands.plan.counting import Groups, groups_of, steps_of
from dpo_ds.commands.plan.fitting import Change, Proposal, changes, fewest, nodes_for
from dpo_ds.commands.plan.forecast import step_of
from dpo_ds.commands.plan.iteration import iteration_of
from dpo_ds.commands.plan.table import lines
from dpo_ds.commands.preflight import check_sequence
from dpo_ds.config import PlanConfig, reference_section
from dpo_ds.config import deepspeed as ds_config
from dpo_ds.config.deepspeed import Machine
from dpo_ds.errors import ConfigError
from dpo_ds.memory.allocations import GIB
from dpo_ds.memory.cards import card_named
from dpo_ds.memory.trace import untraceable
from dpo_ds.models.loading import check_shape

EXIT_FITS, EXIT_DOES_NOT = 0, 1


def start(plan: PlanConfig) -> int:
    """Prints the plan; returns 0 where the run fits as it is, else 1.

    Raises:
        UserError: no such card, model config or file; a number of GPUs that cannot be.
    """
    quiet_libraries()
    if plan.write and Path(plan.write).exists():
        raise ConfigError(f"--write {plan.write}: exists already; choose a new file")
    groups, note = groups_of(plan.run)
    given = _proposal(plan, groups)
    turned = [] if given.fits else changes(given)
    told = _facts(plan, given, turned, groups)
    told["notes"] += [note] * (note is not None)
    fitting = turned[-1].proposal if turned else given
    if plan.write and fitting.fits:
        told["written"] = _write(Path(plan.write), plan, fitting)
    print(json.dumps(told) if plan.as_json else "\n".join(lines(plan, given, told)))
    return EXIT_FITS if given.fits else EXIT_DOES_NOT


def _proposal(plan: PlanConfig, groups: Groups | None) -> Proposal:
    """Returns the run as it is; with --gpus auto on as few as it fits, on a node of eight where it fits on none."""
    run, card = plan.run, card_named(plan.gpu)
    if run.command == "rl" and card.bandwidth is None:
        problem = "rl draws as fast as the card's memory is read; add its bandwidth"
        raise ConfigError(f"--gpu {plan.gpu}: {problem}, as {plan.gpu}:2TB/s")
    model_config = check_shape(run.model, run.model.path, classifier=True)
    reference_config = model_config
    if hasattr(run, "reference") and run.reference.path not in (None, run.model.path):
        section = reference_section(run)
        reference_config = check_shape(section, section.path, "reference.path", classifier=True)
    gpus = plan.gpus or 8 * (plan.nodes or 1)
    nodes = plan.nodes or nodes_for(gpus)
    if gpus % nodes:
        raise ConfigError(f"--gpus {gpus}: not a multiple of --nodes {nodes}")
    ds = ds_config.read(run.deepspeed.config)
    host = None if plan.host_memory is None else plan.host_memory * GIB
    most = None if groups is None else int(groups.completions.max())
    given = Proposal(run, ds, card, gpus, nodes, model_config, reference_config, host, most)
    if plan.gpus is None:
        given = fewest(given, plan.nodes) or given
    of_so_many = replace(ALONE, world_size=given.gpus)
    check_sequence("train", run.train.sequence_parallel, model_config.get_text_config(), of_so_many)
    return given


def _facts(plan: PlanConfig, given: Proposal, turned: list[Change], groups: Groups | None) -> dict:
    """Returns all that is known, as JSON has it: bytes, FLOPs, seconds; null for what is not known."""
    run, card = given.run, given.card
    machine = Machine(given.gpus, "cuda", True)
    filled, notes = ds_config.fill_policy(
        given.ds, run.deepspeed.config, run.train, machine, given.model_config.get_text_config().hidden_size
    )
    if run.train.layout == "padded":
        notes = [*notes, "train.layout padded: memory and FLOPs are the packed layout's; padding comes on top"]
    what = run, filled, given.gpus, given.model_config, given.reference_config, plan.lengths
    with refusing(lambda problem: untraceable(given.model_config, problem)):
        step = iteration_of(*what) if run.command == "rl" else step_of(*what, groups)
    seconds = step.seconds(card, plan.efficiency)
    steps, counted = steps_of(run, groups)
    hours = None if steps is None else steps * seconds * given.gpus / 3600
    cost = None if hours is None or plan.price is None else hours * plan.price
    return {
        "config": plan.file,
        "command": run.command,
        "gpus": given.gpus,
        "nodes": given.nodes,
        "gpu": {"name": plan.gpu, "memory": card.memory, "peak_flops": card.peak, "bandwidth": card.bandwidth},
        "host_memory": given.host,
        "fits": given.fits,
        "memory": given.memory.plain(),
        "step": {
            "flops": step.flops,
            "received_bytes_of_a_gpu": step.received,
            "tokens": step.tokens,
            "micro_batches": step.micro_batches,
            "efficiency": plan.efficiency,
            "seconds": seconds,
            "tokens_per_second": step.tokens / seconds,
            "phases": {
                name: {
                    "flops": phase.flops,
                    "received_bytes_of_a_gpu": int(phase.received),
                    "read_bytes_of_a_gpu": int(phase.read),
                    "seconds": phase.seconds(card, plan.efficiency),
                }
                for name, phase in step.phases.items()
            },
        },
        "run": {"steps": steps, "counted_from": counted, "gpu_hours": hours, "price": plan.price, "cost": cost},
        "changes": [_told(each) for each in turned],
        "fits_with_changes": (turned[-1].proposal if turned else given).fits,
        "written": None,
        "notes": notes,
    }


def _told(change: Change) -> dict:
    memory = change.proposal.memory
    host = sum(memory.host.values())
    return {"change": change.what, "gpus": change.proposal.gpus, "memory": memory.device, "host_of_a_node": host}


def _write(path: Path, plan: PlanConfig, fitting: Proposal) -> list[str]:
    """Writes the run's config, and DeepSpeed's beside it where it is another; returns the files.

    Raises:
        ConfigError: the folder cannot be written into.
    """
    files = [str(path)]
    try:
        if fitting.ds != ds_config.read(plan.run.deepspeed.config):
            beside = path.with_suffix(".deepspeed.json")
            with beside.open("x", encoding="utf-8") as file:
                file.write(json.dumps(fitting.ds, indent=2) + "\n")
            fitting = fitting.with_keys(deepspeed__config=str(beside))
            files.append(str(beside))
        command = f"dpo-ds {fitting.run.command} --config {path}"
        head = f"# Fits {fitting.gpus} {plan.gpu} on {fitting.nodes} node(s), by dpo-ds plan; {command}\n"
        keys = fitting.run.model_dump(mode="json", exclude_unset=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(head + yaml.safe_dump(keys, sort_keys=False, allow_unicode=True))
    except OSError as error:
        problem = f"{error.filename}: {error.strerror or error}"
        raise ConfigError(f"--write {plan.write}: {problem}; choose a new file") from None
    config.load(fitting.run.command, str(path), {})
    return files
