"""A plan as one reads it on a terminal."""

from __future__ import annotations

from dpo_ds.commands.plan.arguments import EFFICIENCY, MEASURED
from dpo_ds.commands.plan.fitting import Proposal
from dpo_ds.config import PlanConfig
from dpo_ds.errors import shorten
from dpo_ds.memory.allocations import GIB


def lines(plan: PlanConfig, given: Proposal, told: dict) -> list[str]:
    """told: the facts that --json prints."""
    card, step = told["gpu"], told["step"]
    where = f"{_count(told['gpus'], 'GPU')} on {_count(told['nodes'], 'node')}"
    head = f"{plan.file or 'the command line'} ({told['command']}) on {where}: {plan.gpu}"
    found = [f"{head}, {_gib(card['memory'])} and {card['peak_flops'] / 1e12:g} TFLOP/s each; expected, not measured"]
    found += ["", "Memory", *given.memory.lines()]
    found += _verdicts(given)
    found += ["", *_step(plan, step), "", *_run(told["run"])]
    found += ["", *_changes(told)] if not told["fits"] else []
    if told["written"]:
        found += ["", f"written: {', '.join(told['written'])}"]
    elif plan.write:
        found += ["", f"--write {plan.write}: nothing written, since nothing fits"]
    return found + [f"dpo-ds: {note}" for note in told["notes"]]


def _verdicts(given: Proposal) -> list[str]:
    held = [(given.memory.device, given.card.memory, "")]
    if given.host is not None:
        held.append((sum(given.memory.host.values()), given.host, " of host memory a node"))
    return [f"  {'FITS' if need <= limit else 'DOES NOT FIT'} into {_gib(limit)}{of}" for need, limit, of in held]


def _step(plan: PlanConfig, step: dict) -> list[str]:
    run, prompt = plan.run, plan.run.data.max_prompt_length
    is_rl = run.command == "rl"
    longest = run.rl.max_new_tokens if is_rl else run.data.max_length - prompt
    prompt, completion = plan.lengths or (prompt, longest)
    each = f"prompts with {_count(run.rl.n, 'completion')} each" if is_rl else "comparisons"
    assumed = "" if plan.lengths else ", the longest allowed; give your data's means"
    shown = f"--lengths {prompt},{completion}{assumed}"
    apart = step["phases"].get("generation", {}).get("received_bytes_of_a_gpu", 0)
    received = _gib(step["received_bytes_of_a_gpu"] - apart)
    reached = f"{step['efficiency']:g} of the peak"
    reached += f" (--efficiency; {MEASURED})" if step["efficiency"] == EFFICIENCY else ""
    return [
        f"A step, of {run.train.global_batch_size} {each} ({shown})",
        f"  {step['tokens']:,} tokens, {step['micro_batches']} micro-batches a GPU",
        f"  {step['flops'] / 1e15:.3g} PFLOP on all GPUs, recomputation not counted",
        f"  {received} that a GPU gets from others at most (in the efficiency)",
        f"  {step['seconds']:.3g} s, {step['tokens_per_second']:,.0f} tokens/s at {reached}",
        *(_phases(plan, step["phases"]) if is_rl else []),
    ]


def _phases(plan: PlanConfig, phases: dict) -> list[str]:
    """Tells an iteration's phases, and what is not known of their time."""
    found = []
    for name, phase in phases.items():
        read = f", reading {_gib(phase['read_bytes_of_a_gpu'])}" if phase["read_bytes_of_a_gpu"] else ""
        found.append(f"    {phase['seconds']:8.3g} s  {name}{read}")
    drawing = phases["generation"]["received_bytes_of_a_gpu"]
    found.append("  generation: at least, since all weights are read for every token, at all of the memory's bandwidth")
    if drawing and not plan.run.rl.replica:
        found.append(f"  {_gib(drawing)} of that come from other GPUs, which takes longer; --rl.replica true spares it")
    if "scoring" not in phases:
        found.append(f"  scoring: rl.score {shorten(plan.run.rl.score)} takes its own time, which is not counted")
    return found


def _run(run: dict) -> list[str]:
    if run["steps"] is None:
        return [f"The run: steps not known, {run['counted_from']}"]
    cost = "" if run["cost"] is None else f", costs {run['cost']:,.2f} at {run['price']:g} a GPU and hour"
    return [
        f"The run: {run['steps']:,} steps ({run['counted_from']})",
        f"  {run['gpu_hours']:,.2f} GPU hours{cost}; evaluation, checkpoints and start-up not counted",
    ]


def _changes(told: dict) -> list[str]:
    ends = "fits" if told["fits_with_changes"] else "does not fit yet, and nothing that is known here helps"
    title = "What to change, the smallest first; memory of a GPU, and of a node's host, with it and those above"
    sizes = [(_gib(change["memory"]), _gib(change["host_of_a_node"]), change["change"]) for change in told["changes"]]
    return [title, *(f"  {gpu:>10}  {host:>11}  {what}" for gpu, host, what in sizes), f"  so it {ends}"]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
