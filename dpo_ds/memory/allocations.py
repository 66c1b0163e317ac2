"""The memory a run will need, item by item, before any GPU is taken: `python -m dpo_ds.memory run.yaml --ranks 8`.

Parameters are counted one by one; what DeepSpeed allocates for them in stage 3 is arithmetic (zero3.py); activations
and gradients come from the model's own code on tensors without data (trace.py). tests/memory/test_memory.py compares
with what real runs allocate. What cannot be known beforehand (CUDA's context, NCCL's buffers, fragmentation) is one
stated constant.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dpo_ds.batch import Segment
from dpo_ds.cluster.foreign import refusing
from dpo_ds.cluster.process_group import quiet_libraries
from dpo_ds.config import DataSection, RlConfig, Section, critic_section, load
from dpo_ds.config import deepspeed as ds_config
from dpo_ds.config.deepspeed import Machine
from dpo_ds.errors import ConfigError, UserError, shorten
from dpo_ds.losses import with_reference_of_loss
from dpo_ds.memory import zero3
from dpo_ds.memory.drawing import critic_shape, drawing, judge_shape, longest_groups
from dpo_ds.memory.trace import Parameter, Pass, parameters, peaks, untraceable
from dpo_ds.models.layers.quantized import BITS
from dpo_ds.models.loading import check_shape
from dpo_ds.models.scoring import REWARD_BATCH

GIB = 1 << 30
OVERHEAD = 2 * GIB  # of a GPU: CUDA context, NCCL, cuBLAS workspaces, fragmentation; assumed, not measured
PROCESS = 4 * GIB  # of a host, for every rank: Python, torch, CUDA's part, data; assumed, not measured
MOST_RANKS = 1 << 20


@dataclass
class Memory:
    """Bytes. state: on a GPU all the time. phases: what is added while something runs; the largest decides.
    host: of a node, all its ranks together. disk: of a node's NVMe."""

    state: dict[str, int] = field(default_factory=dict)
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def allocated(self) -> int:
        """Returns what torch holds at the peak, as metrics.jsonl's peak_memory_bytes says after a step."""
        return sum(self.state.values()) + sum(self.phases[self.peak_phase].values())

    @property
    def device(self) -> int:
        return self.allocated + OVERHEAD

    def plain(self) -> dict:
        """Returns all bytes as one writes them into JSON."""
        parts = {"state": self.state, "phases": self.phases, "host_of_a_node": self.host, "nvme_of_a_node": self.disk}
        sums = {"peak_phase": self.peak_phase, "allocated": self.allocated, "overhead": OVERHEAD, "gpu": self.device}
        return parts | sums

    def lines(self) -> list[str]:
        rows = [("state, all the time", self.state), *self.phases.items()]
        rows += [("host memory of a node", self.host), ("NVMe of a node", self.disk)]
        lines = []
        for title, items in rows:
            if items:
                peak = " (the peak)" if title == self.peak_phase else ""
                lines.append(f"{gib(sum(items.values()))}  {title}{peak}")
                lines += [f"    {gib(size)}  {name}" for name, size in items.items()]
        lines.append(f"{gib(self.allocated)}  a GPU, allocated by torch at the peak (peak_memory_bytes)")
        return [*lines, f"{gib(self.device)}  a GPU, with {OVERHEAD // GIB} GiB for context, NCCL and fragmentation"]


def gib(size: float) -> str:
    return f"{size / GIB:8.1f} GiB"


def expected(
    run: Section,
    model_config,
    machine: Machine,
    nodes: int,
    policy: dict | None,
    reference: dict | None,
    *,
    reference_config=None,
    segments: Sequence[Segment] = (),
) -> Memory:
    """Adds up what `run` (train, sft, reward or precompute) needs on machine.ranks ranks, as many on each of the nodes.

    model_config, reference_config: transformers', the latter where it is another model. policy, reference: DeepSpeed's
    configs, filled; None for an engine that the run does not have. segments: of the largest micro-batch; if not given,
    pairs as long as the data section allows, up to the budget of tokens.
    """
    memory = Memory()
    budget, spread = (run.train if run.trains else run.precompute).micro_batch_tokens, _spread(run)
    segments = tuple(segments) or longest_pairs(run.data, budget * spread, len(run.sides))
    segments = segments if spread == 1 else _part(segments, spread)
    targets = sum(sum(segment.completions) for segment in segments)
    quantized = run.model.quantize is not None
    gathered = {}
    if policy is not None:
        gathered = _add_policy(memory, run, model_config, machine, nodes, policy, segments, targets, run.is_classifier)
    if reference is not None:
        how = {"quantized": quantized}
        _add_frozen(memory, reference_config or model_config, machine, nodes, reference, segments, targets, **how)
    elif not run.trains:
        _add_replica(memory, reference_config or model_config, machine, segments, targets, quantized)
    if policy is not None and run.command == "rl":
        with refusing(lambda what: untraceable(model_config, what)):  # as recurrent layers, which keep no keys
            drawn = drawing(run, model_config, 2 if ds_config.is_bf16(policy) else 4)
        memory.phases["drawing"] = drawn if run.rl.replica else gathered | drawn
    if machine.device == "cuda":
        memory.host["processes"] = PROCESS * machine.ranks // nodes
    return memory


def _spread(run) -> int:
    return run.train.sequence_parallel if run.trains else 1


def _part(segments: Sequence[Segment], ranks: int) -> tuple[Segment, ...]:
    """Returns a row as long as what one of so many ranks has of these segments."""
    parts, start = [], 0
    for segment in segments:
        lengths = [math.ceil(length / ranks) for length in (segment.prompt, *segment.completions)]
        parts.append(Segment(start, lengths[0], tuple(lengths[1:])))
        start = parts[-1].end
    return tuple(parts)


def longest_pairs(section: DataSection, budget: int, sides: int) -> tuple[Segment, ...]:
    """A packed row of `budget` tokens of the longest prompts with so many of the longest completions, two of a pair;
    one such group if that is longer.
    """
    longest = section.max_length - section.max_prompt_length
    whole = section.max_prompt_length + longest * sides
    segments, start = [], 0
    while not segments or start + sides < budget:
        share = min(1.0, (budget - start) / whole) if segments else 1.0
        completion = max(1, int(longest * share))
        prompt = max(1, int(section.max_prompt_length * share))
        segment = Segment(start, prompt, (completion,) * sides)
        segments.append(segment)
        start = segment.end
    return tuple(segments)


def _add_policy(
    memory: Memory, run, config, machine: Machine, nodes: int, ds: dict, segments, targets: int, is_reward: bool
) -> dict[str, int]:
    """Returns the weights that a forward gathers."""
    zero, ranks = ds["zero_optimization"], machine.ranks
    bf16 = ds_config.is_bf16(ds)
    width = 2 if bf16 else 4
    communication = zero3.width_of(ds.get("communication_data_type"), width)
    accumulation = zero3.width_of(ds.get("data_types", {}).get("grad_accum_dtype"), width)
    bucket = int(zero3.setting(zero, "reduce_bucket_size"))
    how = Pass(
        segments,
        targets,
        torch.bfloat16 if bf16 else torch.float32,
        machine.device,
        activations=run.train.activations,
        is_reward=is_reward,
        lora=run.model.lora,
        quantized=run.model.quantize is not None,
        bucket=bucket if zero3.setting(zero, "contiguous_gradients") else 1,
        communication={2: torch.bfloat16, 4: torch.float32}[communication],
        ranks=ranks,
        units="leaf_module" not in zero,
    )
    found = parameters(config, how)
    trained = [p for p in found if p.is_trained]
    subgroups = zero3.subgroups(trained, int(zero3.setting(zero, "sub_group_size")), ranks)
    own = zero3.shard(trained, ranks)  # elements
    per_node = ranks // nodes
    _place_weights(memory, "policy", found, zero, width, ranks, per_node)
    packed = [p.packed for p in found if p.packed]

    offload = zero3.device_of(zero, "offload_optimizer")
    state = {"fp32 master weights": 4 * own, "Adam's moments": 8 * own}
    if offload == "none":
        memory.state |= state | {"gradient shards": accumulation * own}
    else:
        where = memory.host if offload == "cpu" else memory.disk
        pinned = zero3.pinned if zero["offload_optimizer"].get("pin_memory", True) else int
        swapped = {"their gradients": sum(pinned(4 * size) for size in subgroups)}
        for name, size in (state | swapped).items():
            where[f"{name}"] = size * per_node
        memory.host["gradient shards"] = pinned(accumulation * own) * per_node
        if offload == "nvme":
            count = (zero3.NVME_OPTIMIZER | zero["offload_optimizer"])["buffer_count"]
            memory.host["buffers to the NVMe"] = zero3.pinned(int(count) * 4 * max(subgroups)) * per_node
    if zero3.setting(zero, "contiguous_gradients"):
        memory.state["reduce bucket"] = communication * bucket

    recomputes = run.train.activations != "none"
    gathered = zero3.gathered(found, zero, width, ranks, recomputes=recomputes, is_classifier=is_reward)
    of_a_forward = dict(gathered["forward"])
    hpz = min(int(zero3.setting(zero, "zero_hpz_partition_size")), ranks)
    traced = peaks(config, how)
    names = {
        "forward": "operators of the forward",
        "head": "head: log-probs and their gradient",
        "layers": "backward of a layer, gradients being reduced",
    }
    for phase, what in names.items():
        if hpz > 1:  # made when a weight is given back the first time, dropped with the update
            gathered[phase]["hpZ: the node's own copy of the weights"] = width * zero3.shard(found, hpz)
        gathered[phase] |= {"activations kept for backward": traced["saved"], what: traced[phase] - traced["saved"]}
        if packed and phase != "head":
            gathered[phase]["a weight out of its 4 bits"] = width * max(packed)
    memory.phases["forward and backward"] = max(gathered.values(), key=lambda items: sum(items.values()))
    text = config.get_text_config()
    if (spread := _spread(run)) > 1:
        traded = how.tokens * width * _heads(text, spread)
        memory.phases["forward and backward"]["heads, traded for tokens"] = traded
    if run.train.activations == "offload" and machine.device == "cuda":
        kept = text.num_hidden_layers * zero3.pinned(how.tokens * text.hidden_size * width)
        memory.host["layers' inputs (train.activation_memory offload)"] = kept * per_node
    if offload == "none":
        flat = 4 * max(subgroups) + (accumulation * max(subgroups) if accumulation != 4 else 0)
        norm = 8 * max(math.ceil(p.numel / ranks) for p in trained)  # norms are taken in float64
        memory.phases["optimizer step"] = {"gradients of a sub-group, flattened": max(flat, norm)}
    whole = width * sum(p.numel for p in found) + _blocks(found)
    if packed and (more := whole - sum(memory.state.values())) > 0:
        memory.phases["loading"] = {"the whole model on every GPU, beyond the state": more}
    if machine.device == "cuda" and run.checkpoint.asynchronous:
        memory.host["checkpoint being written (checkpoint.asynchronous)"] = (12 + width) * own * per_node
    return of_a_forward


def _heads(text_config, ranks: int) -> int:
    """Numbers that a token has in a layer's queries, keys and values, keys repeated for so many ranks."""
    heads = text_config.num_attention_heads
    width = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    return width * (heads + 2 * max(getattr(text_config, "num_key_value_heads", None) or heads, ranks))


def _add_frozen(
    memory: Memory, config, machine: Machine, nodes: int, ds: dict, segments, targets: int, whose: str = "reference",
    is_reward: bool = False, quantized: bool = False,
) -> None:  # fmt: skip
    zero, ranks = ds["zero_optimization"], machine.ranks
    bf16 = ds_config.is_bf16(ds)
    width = 2 if bf16 else 4
    dtype, units = torch.bfloat16 if bf16 else torch.float32, "leaf_module" not in zero
    kind = {"units": units, "is_reward": is_reward, "quantized": quantized}
    how = Pass(segments, targets, dtype, machine.device, training=False, **kind)
    found = parameters(config, how)
    _place_weights(memory, whose, found, zero, width, ranks, ranks // nodes)
    gathered = zero3.gathered(found, zero, width, ranks, is_classifier=is_reward)["forward"]
    memory.phases[f"{whose}'s forward"] = gathered | {"operators of the forward": peaks(config, how)["forward"]}


def _add_replica(memory: Memory, config, machine: Machine, segments, targets: int, quantized: bool) -> None:
    """A whole copy on every rank: --deepspeed.config none."""
    dtype = torch.bfloat16 if machine.has_bf16 else torch.float32
    how = Pass(segments, targets, dtype, machine.device, training=False, quantized=quantized)
    found = parameters(config, how)
    memory.state["reference: weights"] = dtype.itemsize * sum(p.numel for p in found)
    _add_blocks(memory, "reference", found)
    memory.phases["reference's forward"] = {"operators of the forward": peaks(config, how)["forward"]}


def _place_weights(
    memory: Memory, whose: str, found: list[Parameter], zero: dict, width: int, ranks: int, per_node: int
) -> None:
    offload = zero3.device_of(zero, "offload_param")
    own = width * zero3.shard(found, ranks)
    _add_blocks(memory, whose, found)
    if offload == "none":
        memory.state[f"{whose}: weights"] = own
    elif offload == "cpu":
        flat = zero3.pinned(width * zero3.shard([p for p in found if p.is_trained], ranks))
        pinned = zero3.pinned if zero["offload_param"].get("pin_memory", True) else int
        one_by_one = sum(pinned(width * math.ceil(p.numel / ranks)) for p in found if not p.is_trained)
        memory.host[f"{whose}: weights"] = (flat + one_by_one) * per_node
    else:
        section = zero3.NVME_PARAM | zero["offload_param"]
        in_host = min(own, width * int(section["max_in_cpu"]))
        buffers = width * int(section["buffer_count"] * section["buffer_size"])
        memory.disk[f"{whose}: weights"] = (own - in_host) * per_node
        memory.host[f"{whose}: weights (offload_param.max_in_cpu)"] = zero3.pinned(in_host) * per_node
        memory.host[f"{whose}: buffers to the NVMe"] = zero3.pinned(buffers) * per_node
    if ranks > 1 or offload != "none":  # else a weight is its slice
        threshold = zero3.setting(zero, "param_persistence_threshold")
        memory.state[f"{whose}: small weights, whole"] = width * sum(p.numel for p in found if p.numel <= threshold)


def _add_blocks(memory: Memory, whose: str, found: list[Parameter]) -> None:
    if size := _blocks(found):
        memory.state[f"{whose}: values of its 4-bit weights' blocks, whole"] = size


def _blocks(found: list[Parameter]) -> int:
    """Returns the bytes that ZeRO-3 does not see beside packed weights."""
    return int(sum(p.packed for p in found) * (BITS - 4) / 8)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dpo_ds.memory", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a run config, as for --config")
    parser.add_argument("--command", default="train", choices=("train", "sft", "reward", "rl", "precompute"))
    parser.add_argument("--ranks", type=int, default=1, help="GPUs in all")
    parser.add_argument("--nodes", type=int, default=1, help="that they are spread over evenly")
    given = parser.parse_args(argv)
    quiet_libraries()
    try:
        for key in ("ranks", "nodes"):
            if not 0 < getattr(given, key) <= MOST_RANKS:
                raise ConfigError(f"--{key} {shorten(getattr(given, key))}: must be from 1 to {MOST_RANKS}")
        if given.ranks % given.nodes:
            raise ConfigError(f"--ranks {given.ranks}: not a multiple of --nodes {given.nodes}")
        run, _ = load(given.command, given.config, {})
        if given.command == "train":
            run = with_reference_of_loss(run)
        policy_shape = check_shape(run.model, run.model.path)
        memory = of_run(run, given.ranks, given.nodes, policy_shape)
    except UserError as mistake:
        parser.exit(2, f"dpo-ds: error: {mistake}\n")
    print("\n".join([f"{given.config}: expected on {given.ranks} GPUs, not measured", *memory.lines()]))


def of_run(
    run: Section, ranks: int, nodes: int, model_config, reference_config=None, ds: dict | None = None,
    completions: int | None = None,
) -> Memory:  # fmt: skip
    """`expected` on GPUs with bf16, of the DeepSpeed files that the run names; ds: what stands in for the first.
    completions: of the largest group, where rows are put together.
    """
    machine = Machine(ranks, "cuda", True)
    hidden = model_config.get_text_config().hidden_size
    name = run.deepspeed.config
    if not run.trains:
        frozen = None if name == "none" else ds_config.fill_reference(ds_config.read(name), name, machine, hidden)[0]
        return expected(run, model_config, machine, nodes, None, frozen, reference_config=reference_config)
    given = ds_config.read(name) if ds is None else ds
    policy, _ = ds_config.fill_policy(given, name, run.train, machine, hidden)
    frozen = None
    reference = getattr(run, "reference", None)  # sft and reward have no such section
    if reference is not None and reference.kind == "live":
        source = run.deepspeed.reference_config
        given = given if source is None else ds_config.read(source)
        width = (reference_config or model_config).get_text_config().hidden_size
        frozen, _ = ds_config.fill_reference(given, source or name, machine, width)
    segments = ()
    if run.command == "rl":
        segments = longest_groups(run)
    elif completions:
        segments = longest_pairs(run.data, run.train.micro_batch_tokens * _spread(run), completions)
    memory = expected(
        run, model_config, machine, nodes, policy, frozen, reference_config=reference_config, segments=segments
    )
    if run.command == "rl":
        _add_critic_and_reward(memory, run, model_config, machine, nodes, segments, ds)
    return memory


def _add_critic_and_reward(
    memory: Memory, run: RlConfig, model_config, machine: Machine, nodes: int, segments, ds: dict | None
) -> None:
    """Adds the models that dpo-ds rl has beside policy and reference, as far as it has them."""
    name, targets = run.deepspeed.config, sum(sum(segment.completions) for segment in segments)
    given = ds_config.read(name) if ds is None else ds
    if run.rl.replica:
        how = Pass(segments, targets, torch.bfloat16, machine.device, training=False)
        memory.state["replica: weights"] = 2 * sum(p.numel for p in parameters(model_config, how))
    if (config := critic_shape(run, model_config)) is not None:
        filled = ds_config.fill_critic(given, name, run.train, machine, config.get_text_config().hidden_size)
        own, whole = Memory(), run.model_copy(update={"model": critic_section(run)})
        _add_policy(own, whole, config, machine, nodes, filled, segments, targets, is_reward=True)
        for part in ("state", "phases", "host", "disk"):
            found = {f"critic: {what.removeprefix('policy: ')}": size for what, size in getattr(own, part).items()}
            getattr(memory, part).update(found)
    if (config := judge_shape(run)) is not None:
        width = config.get_text_config().hidden_size
        filled, _ = ds_config.fill_reference(given, name, machine, width, "reward")
        length = run.data.max_prompt_length + run.rl.max_new_tokens
        texts = tuple(Segment(row * length, length, ()) for row in range(REWARD_BATCH))
        _add_frozen(memory, config, machine, nodes, filled, texts, REWARD_BATCH, "reward model", is_reward=True)
