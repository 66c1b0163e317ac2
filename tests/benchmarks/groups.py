"""Six pairs of four completions as one group against six rows: seconds of a training step, two ranks under ZeRO-3.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 tests/benchmarks/groups.py [--rounds 9]

In a round each of the two runs the same global batch, forward of policy and live reference and backward; the ratio is
the median over rounds of the ratio within a round. A Llama of 6 layers, width 256 and 8k vocabulary, random weights.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

from dpo_ds.batch import Group  # noqa: E402
from dpo_ds.cluster import collectives, launch  # noqa: E402
from dpo_ds.cluster.process_group import enter, leave, quiet_libraries  # noqa: E402
from dpo_ds.config import ModelSection, ReferenceSection, TrainSection  # noqa: E402
from dpo_ds.config.deepspeed import Machine, fill_policy, fill_reference  # noqa: E402
from dpo_ds.data.batching import Layout, Lengths, plan  # noqa: E402
from dpo_ds.losses import DPO  # noqa: E402
from dpo_ds.models.causal_lm import LogProbModel  # noqa: E402
from dpo_ds.models.checks import settle_layout  # noqa: E402
from dpo_ds.models.engine import Policy, load_frozen  # noqa: E402
from dpo_ds.models.loading import load_causal_lm  # noqa: E402
from dpo_ds.reference.live import LiveReference  # noqa: E402
from dpo_ds.training.objectives.preference import PreferenceObjective  # noqa: E402

WIDTH, VOCABULARY = 256, 8192
SIX = np.array(list(itertools.combinations(range(4), 2)))


def groups_of(prompts: list[int], generator: np.random.Generator) -> list[Group]:
    """Four completions a prompt, of lengths like HH's: a median of 37 tokens."""
    made = []
    for length in prompts:
        sizes = np.maximum(3, generator.lognormal(3.6, 0.6, 4).astype(int))
        completions = tuple(generator.integers(3, VOCABULARY, n) for n in sizes)
        masks = tuple(np.ones(n, bool) for n in sizes)
        made.append(Group(generator.integers(3, VOCABULARY, length), completions, masks, SIX))
    return made


def as_pairs(groups: list[Group]) -> list[Group]:
    return [
        Group.pair(group.prompt, *(part[i] for part in (group.completions, group.masks) for i in two))
        for group in groups
        for two in group.comparisons.tolist()
    ]


def step(policy: Policy, objective: PreferenceObjective, rows: list[Group], comparisons: int) -> int:
    """Makes one step and returns this rank's tokens."""
    lengths = Lengths(
        np.array([len(row.prompt) for row in rows]), np.array([[len(ids) for ids in row.completions] for row in rows])
    )
    layout, ranks = Layout("packed", 4096, WIDTH), collectives.world_size()
    shares = plan(lengths, layout, ranks)[collectives.rank()]
    batches = [layout.collate([rows[i] for i in members]) for members in shares]
    for batch in batches:
        loss, _ = objective(policy, batch)
        policy.backward(loss * ranks / comparisons, is_last=batch is batches[-1])
    policy.step(0.0)
    return sum(batch.num_tokens for batch in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    place = launch.from_environment()
    quiet_libraries()
    device = enter(place)
    folder = Path(tempfile.gettempdir()) / "dpo_ds-groups-model"
    if place.is_first:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=WIDTH, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8, vocab_size=VOCABULARY
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    dist.barrier()
    machine, section = Machine(place.world_size, "cpu", False), ModelSection(path=str(folder))
    policy_config, _ = fill_policy({}, "benchmark", TrainSection(), machine, WIDTH)
    reference_config, _ = fill_reference({}, "benchmark", machine, WIDTH)
    policy = Policy(LogProbModel(load_causal_lm(section, policy_config)), policy_config, device)
    frozen = load_frozen(section, reference_config, device)
    assert settle_layout("packed", [policy, frozen])[0] == "packed"
    objective = PreferenceObjective(DPO(), LiveReference(frozen, policy, ReferenceSection()))
    generator = np.random.default_rng(0)
    like_hh = np.maximum(8, generator.lognormal(4.6, 0.7, 8).astype(int)).tolist()
    for name, prompts in (("like HH", like_hh), ("prompts of 1,000", [1000] * 4)):
        together = groups_of(prompts, generator)
        contenders = {"groups": together, "pairs": as_pairs(together)}
        ratios, tokens = [], {}
        for number in range(1 + rounds):
            seconds = {}
            for kind, rows in contenders.items():
                dist.barrier()
                started = time.perf_counter()
                tokens[kind] = step(policy, objective, rows, 6 * len(together))
                dist.barrier()
                seconds[kind] = time.perf_counter() - started
            ratios += [seconds["pairs"] / seconds["groups"]] if number else []  # the first warms up
        if place.is_first:
            rounded = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{name}: {statistics.median(ratios):.2f} times ({rounded}); tokens of rank 0 {tokens}", flush=True)
    leave()


if __name__ == "__main__":
    main()
