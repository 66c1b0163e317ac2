"""What to change in a run that does not fit its GPUs, the smallest change first; each is tried by a new estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from dpo_ds.config import RlConfig, SftConfig
from dpo_ds.errors import ConfigError, ModelError
from dpo_ds.losses import make_loss
from dpo_ds.memory.allocations import Memory, of_run
from dpo_ds.memory.cards import Card
from dpo_ds.models.packed.spread import refusal

GPUS_OF_A_NODE = 8
MOST_GPUS = 1024
ON_HOST = {"device": "cpu", "pin_memory": True}


def nodes_for(gpus: int) -> int:
    """Returns the fewest nodes of at most eight GPUs that `gpus` are spread over evenly."""
    return next(nodes for nodes in range(math.ceil(gpus / GPUS_OF_A_NODE), gpus + 1) if gpus % nodes == 0)


@dataclass(frozen=True)
class Proposal:
    """A run on `gpus` GPUs of `nodes` nodes; ds: DeepSpeed's JSON, as the user would write it. model_config and
    reference_config: transformers'. host: bytes of a node, None: not judged. completions: of the largest group, where
    rows are put together.
    """

    run: SftConfig | RlConfig
    ds: dict
    card: Card
    gpus: int
    nodes: int
    model_config: object
    reference_config: object
    host: float | None = None
    completions: int | None = None

    @cached_property
    def memory(self) -> Memory:
        return of_run(
            self.run, self.gpus, self.nodes, self.model_config, self.reference_config, self.ds, self.completions
        )

    @property
    def fits(self) -> bool:
        return self.excess <= 0

    @property
    def excess(self) -> float:
        """Returns the bytes that a GPU and a node's host lack together."""
        on_host = 0 if self.host is None else max(0, sum(self.memory.host.values()) - self.host)
        return max(0, self.memory.device - self.card.memory) + on_host

    @property
    def longest(self) -> int:
        """Returns the tokens of the longest prompt with its completions, which are computed together."""
        run, prompt = self.run, self.run.data.max_prompt_length
        if run.command == "rl":
            return prompt + run.rl.n * run.rl.max_new_tokens
        return prompt + (self.completions or len(run.sides)) * (run.data.max_length - prompt)

    def with_keys(self, **values) -> Proposal:
        """Returns it with other values of keys, their dots written as two underscores, checked as a config's are."""
        plain = self.run.model_dump(mode="json", exclude_unset=True)
        for name, value in values.items():
            section, key = name.split("__")
            plain[section] = plain.get(section, {}) | {key: value}
            if key == "activation_memory":
                plain[section].pop("activation_checkpointing", None)  # its other name
        return replace(self, run=type(self.run).model_validate(plain))

    def offloading(self, *parts: str) -> Proposal:
        zero = self.ds.get("zero_optimization", {}) | {f"offload_{part}": ON_HOST for part in parts}
        return replace(self, ds=self.ds | {"zero_optimization": zero})


@dataclass(frozen=True)
class Change:
    """What was turned, in words, and the proposal with it and all changes before."""

    what: str
    proposal: Proposal


def fewest(start: Proposal, spread_over: int | None = None) -> Proposal | None:
    """Returns `start` on as few GPUs as it fits, up to 1024; None where it fits on none. spread_over: nodes, if given.

    Up to a node's eight GPUs any number is tried, then whole nodes. The least comes first: one GPU gathers no weights,
    and may hold what a few cannot. Of several, more never take more memory each.
    """
    step = math.lcm(spread_over or 1, start.run.train.sequence_parallel)
    counts = [*range(step, GPUS_OF_A_NODE * (spread_over or 1) + 1, step)]
    if spread_over is None:
        whole = math.lcm(step, GPUS_OF_A_NODE)
        counts = sorted({*counts, *range(whole, MOST_GPUS + 1, whole)})

    def on(gpus: int) -> Proposal:
        return replace(start, gpus=gpus, nodes=spread_over or nodes_for(gpus))

    if counts and _fits(least := on(counts[0])):
        return least
    low, high, found = 1, len(counts), None
    while low < high:
        middle = min((low + high) // 2, 2 * low + 1)  # few GPUs are likelier than many
        if _fits(trial := on(counts[middle])):
            high, found = middle, trial
        else:
            low = middle + 1
    return found


def changes(start: Proposal) -> list[Change]:
    """Returns what makes it fit, the smallest change first; its last proposal does not fit where nothing helps.

    Each way is taken as far as it goes before the next one; what turns out not to be needed in the end is given back,
    the smallest change first to be kept.
    """
    taken: list[tuple[Callable, int]] = []  # a way, and how far it is gone
    current = start
    for way in WAYS:
        steps = list(way(current))
        for far, change in enumerate(steps, 1):
            if _fits(change.proposal):
                return _redone(start, _less(start, [*taken, (way, far)]))
        if steps and _excess(steps[-1].proposal) < _excess(current):
            taken.append((way, len(steps)))
            current = steps[-1].proposal
    return _redone(start, taken)


def _less(start: Proposal, taken: list[tuple[Callable, int]]) -> list[tuple[Callable, int]]:
    """Returns each way but the last gone no farther than is needed, the largest change given back first."""
    for position in range(len(taken) - 2, -1, -1):
        way, far = taken[position]
        for less in range(far):
            trial = [*taken[:position], (way, less), *taken[position + 1 :]]
            done = _redone(start, trial)
            if done and _fits(done[-1].proposal):
                taken = trial
                break
    return taken


def _redone(start: Proposal, taken: list[tuple[Callable, int]]) -> list[Change]:
    done, current = [], start
    for way, far in taken:
        steps = list(way(current))[:far]
        if steps:
            done.append(steps[-1])
            current = steps[-1].proposal
    return done


def _fits(proposal: Proposal) -> bool:
    try:
        return proposal.fits
    except (ConfigError, ModelError):  # a file made for another number of ranks, layers that cannot be recomputed
        return False


def _excess(proposal: Proposal) -> float:
    try:
        return proposal.excess
    except (ConfigError, ModelError):
        return math.inf


def _recompute(proposal: Proposal) -> Iterator[Change]:
    """Keeps ever less of a layer for backward."""
    stronger = {"none": ("selective", "checkpoint"), "selective": ("checkpoint",)}
    for how in stronger.get(proposal.run.train.activations, ()):
        yield Change(f"train.activation_memory {how}", proposal.with_keys(train__activation_memory=how))


def _micro_batch(proposal: Proposal) -> Iterator[Change]:
    """Halves the budget down to the longest group's tokens, which are computed together whatever it is."""
    run = proposal.run
    least = math.ceil(proposal.longest / run.train.sequence_parallel)
    budget = run.train.micro_batch_tokens
    while budget > least:
        budget = max(budget // 2, least)
        yield Change(f"train.micro_batch_tokens {budget}", proposal.with_keys(train__micro_batch_tokens=budget))


def _drawing(proposal: Proposal) -> Iterator[Change]:
    """Draws from the policy itself, and fewer completions together, down to those of one prompt."""
    run = proposal.run
    if run.command != "rl":
        return
    words, keys = "", {}
    if run.rl.replica:
        words, keys = "rl.replica false, ", {"rl__replica": False}
        yield Change("rl.replica false", proposal.with_keys(**keys))
    size = run.rl.batch_size
    while size > run.rl.n:
        size = max(size // 2, run.rl.n)
        yield Change(f"{words}rl.batch_size {size}", proposal.with_keys(rl__batch_size=size, **keys))


def _host_copy(proposal: Proposal) -> Iterator[Change]:
    if proposal.host is not None and proposal.run.checkpoint.asynchronous:
        yield Change("checkpoint.asynchronous false", proposal.with_keys(checkpoint__asynchronous=False))


def _reference(proposal: Proposal) -> Iterator[Change]:
    run = proposal.run
    if run.command not in ("train", "rl") or run.reference.kind != "live" or run.reference.update_every:
        return
    if run.model.lora.r and run.reference.path in (None, run.model.path):
        yield Change("reference.kind adapter", proposal.with_keys(reference__kind="adapter"))
        return
    if run.command == "rl" or make_loss(run.loss).needs_kl:
        return  # of completions that are new, or completions of other prompts, which no cache has
    cache = run.reference.cache or f"{run.output_dir}-reference"
    words = f"reference.kind cached, reference.cache {cache} (filled beforehand by dpo-ds precompute)"
    yield Change(words, proposal.with_keys(reference__kind="cached", reference__cache=cache))


def _offload(proposal: Proposal) -> Iterator[Change]:
    """Each change is tried with a checkpoint's copy beside it on the host, and without."""
    for change in _to_the_host(proposal):
        yield change
        for more in _host_copy(change.proposal):
            yield Change(f"{change.what}, {more.what}", more.proposal)


def _to_the_host(proposal: Proposal) -> Iterator[Change]:
    zero = proposal.ds.get("zero_optimization", {})
    if "offload_optimizer" not in zero:
        yield Change("DeepSpeed's offload_optimizer cpu", proposal.offloading("optimizer"))
    if "offload_param" not in zero:
        yield Change("DeepSpeed's offload_optimizer and offload_param cpu", proposal.offloading("optimizer", "param"))
        proposal = proposal.offloading("optimizer", "param")
    if proposal.run.train.activations != "offload":
        what = "DeepSpeed's offload_optimizer and offload_param cpu, train.activation_memory offload"
        yield Change(what, proposal.with_keys(train__activation_memory="offload"))


def _sequence_parallel(proposal: Proposal) -> Iterator[Change]:
    """Computes pairs together: else the longest one is the least that a rank holds."""
    text, run = proposal.model_config.get_text_config(), proposal.run
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    if run.command == "rl":
        return  # it has none
    for ranks in range(run.train.sequence_parallel + 1, proposal.gpus // proposal.nodes + 1):
        if proposal.gpus % ranks or refusal(heads, key_heads, ranks) or run.train.layout != "packed":
            continue
        budget = min(run.train.micro_batch_tokens, math.ceil(proposal.longest / ranks))
        keys = {"train__sequence_parallel": ranks, "train__micro_batch_tokens": budget}
        words = f"train.sequence_parallel {ranks}, train.micro_batch_tokens {budget}"
        yield Change(words, proposal.with_keys(**keys))


def _more_gpus(proposal: Proposal) -> Iterator[Change]:
    gpus = proposal.gpus
    while gpus < MOST_GPUS:
        gpus *= 2
        more = replace(proposal, gpus=gpus, nodes=max(proposal.nodes, nodes_for(gpus)))
        yield Change(f"--gpus {gpus}", more)


WAYS = (_host_copy, _recompute, _micro_batch, _drawing, _reference, _offload, _sequence_parallel, _more_gpus)
