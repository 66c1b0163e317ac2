"""Long pairs over two ranks under ZeRO-3: what a rank holds at most, and how long a step takes.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 tests/benchmarks/sequences.py [--rounds 5]

A pair is a prompt and two completions of half its length. Apart: rank 0 computes it and rank 1 an empty micro-batch;
together: each half of its tokens (train.sequence_parallel 2). In a round each runs once; ratios are medians over
rounds of the ratio within a round. Memory is of the tensors that torch's operators make in a step, less what a step on
64 tokens makes: activations, without weights and gradients. A Llama of random weights, the reference's log-probs given.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

from dpo_ds.batch import Batch, Group, packed_batch  # noqa: E402
from dpo_ds.cluster import collectives, launch  # noqa: E402
from dpo_ds.cluster.process_group import enter, leave, quiet_libraries  # noqa: E402
from dpo_ds.config import ModelSection, TrainSection  # noqa: E402
from dpo_ds.config.deepspeed import Machine, fill_policy  # noqa: E402
from dpo_ds.losses import DPO  # noqa: E402
from dpo_ds.memory.trace import PeakMemory  # noqa: E402
from dpo_ds.models.causal_lm import LogProbModel  # noqa: E402
from dpo_ds.models.checks import settle_activations, settle_layout, settle_sequence  # noqa: E402
from dpo_ds.models.engine import Policy  # noqa: E402
from dpo_ds.models.layers.activations import save_activation_memory  # noqa: E402
from dpo_ds.models.loading import load_causal_lm  # noqa: E402

MIB = 1 << 20


def pair_of(tokens: int, vocabulary: int) -> Group:
    generator = np.random.default_rng(0)
    prompt, *sides = (generator.integers(3, vocabulary, n) for n in (tokens // 2, tokens // 4, tokens // 4))
    return Group.pair(prompt, *sides, *(np.ones(len(side), bool) for side in sides))


def step(policy: Policy, batch: Batch) -> None:
    logps = batch.pair_logps(policy.token_logps(batch))
    zeros = replace(logps, chosen=torch.zeros_like(logps.chosen), rejected=torch.zeros_like(logps.rejected))
    policy.backward(DPO()(logps, zeros).sum(), is_last=True)
    policy.step(0.0)


def batch_of(group: Group, together: bool) -> Batch:
    if together:
        return packed_batch([group]).spread(collectives.world_size(), collectives.rank())
    return packed_batch([group] if collectives.rank() == 0 else [])


def peak_of(policy: Policy, batch: Batch) -> float:
    """MiB that a step adds to one on 64 tokens, on the rank that holds most."""
    peaks = []
    for each in [batch_of(pair_of(64, 64), True)] * 2 + [batch]:
        gc.collect()
        with PeakMemory([]) as meter:
            meter.begin("step")
            step(policy, each)
            peaks.append(meter.peaks["step"])
    return collectives.reduce_max((peaks[2] - peaks[1]) / MIB, policy.device)


def seconds_of(policy: Policy, batch: Batch) -> float:
    dist.barrier()
    started = time.perf_counter()
    step(policy, batch)
    dist.barrier()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16384, help="of the pair whose step is timed; memory: twice that")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1024)
    given = parser.parse_args()
    place = launch.from_environment()
    quiet_libraries()
    device = enter(place)
    folder = Path(tempfile.gettempdir()) / "dpo_ds-sequences-model"
    if place.is_first:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=given.width, intermediate_size=int(given.width * 8 / 3), num_hidden_layers=given.layers,
            num_attention_heads=4, num_key_value_heads=2, vocab_size=given.vocabulary, max_position_embeddings=1 << 20,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    dist.barrier()
    machine = Machine(place.world_size, "cpu", False)
    policies = {}
    for how in ("none", "selective", "checkpoint", "offload"):
        ds_config, _ = fill_policy({}, "benchmark", TrainSection(), machine, given.width)
        model = load_causal_lm(ModelSection(path=str(folder)), ds_config)
        save_activation_memory(model, how)
        policies[how] = Policy(LogProbModel(model), ds_config, device)
        assert settle_layout("packed", [policies[how]])[0] == "packed" and settle_activations(policies[how]) == []
        settle_sequence(place.world_size, "", [policies[how]])
    group, longer = (pair_of(n * given.tokens, given.vocabulary) for n in (1, 2))

    def say(line: str) -> None:
        if place.is_first:
            print(line, flush=True)

    apart, together = (peak_of(policies["none"], batch_of(group, kind)) for kind in (False, True))
    told = f"apart {apart:.0f}, together {together:.0f}: {apart / together:.2f}"
    say(f"{given.tokens} tokens, MiB a rank at most: {told}")
    peaks = {how: peak_of(policy, batch_of(longer, True)) for how, policy in policies.items()}
    told = ", ".join(f"{how} {peak:.0f} ({peak / peaks['none']:.2f})" for how, peak in peaks.items())
    say(f"{2 * given.tokens} tokens together, MiB a rank at most: {told}")
    ratios, seconds = [], []
    for _ in range(1 + given.rounds):
        times = [seconds_of(policies["none"], batch_of(group, kind)) for kind in (False, True)]
        seconds.append(times)
        ratios.append(times[1] / times[0])
    medians = [statistics.median(column) for column in zip(*seconds[1:], strict=True)]
    told = f"{statistics.median(ratios[1:]):.3f} times as long ({min(ratios[1:]):.3f} to {max(ratios[1:]):.3f})"
    say(f"{given.tokens} tokens, a step: apart {medians[0]:.2f} s, together {medians[1]:.2f} s; {told}")
    rounds = [[seconds_of(policy, batch_of(group, True)) for policy in policies.values()] for _ in range(given.rounds)]
    ratios = [statistics.median(times[way] / times[0] for times in rounds) for way in range(len(policies))]
    told = ", ".join(f"{how} {ratio:.2f}" for how, ratio in zip(policies, ratios, strict=True))
    say(f"{given.tokens} tokens together, times as long a step as with none: {told}")
    leave()


if __name__ == "__main__":
    main()
