"""What a step costs the CPU beside its arithmetic: a Llama of 16 layers and width 64, where all is overhead.

    python tests/benchmarks/host_overhead.py [--rounds 9] [--steps 10] [--set KEY=VALUE ...] [--out FILE]

CPU milliseconds of the process a step, medians over rounds in which all take turns, one rank: the plain model with its
AdamW, `dpo-ds train` without a reference, the same with every module fetched alone by ZeRO-3; and, for each --set, with
this key of the run's config. A GPU waits for as much Python as this, whatever its own work is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks import jobs, machine  # noqa: E402, I001  before all that asks for a GPU
from dpo_ds.demo.corpus import write_jsonl  # noqa: E402
from tests.benchmarks.contenders import bare, ours  # noqa: E402
from tests.benchmarks.train_throughput import preload  # noqa: E402
from tests.benchmarks.workload import Workload, rows_of_lengths, word_tokenizer  # noqa: E402

SHAPE = dict(
    hidden_size=64, intermediate_size=172, num_hidden_layers=16, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=4100,
)  # fmt: skip
PAIRS = [(8, 8, 8)] * 32  # tokens of prompt, chosen and rejected
BARE, OURS = "bare model and AdamW", "dpo-ds train"


def build(folder: str, steps: int, rounds: int) -> Workload:
    pairs = Path(folder) / "pairs.jsonl"
    write_jsonl(pairs, rows_of_lengths(PAIRS))
    work = Workload(
        folder=folder, pairs=str(pairs), ranks=1, pairs_per_rank=4, micro_batch_tokens=256, peer_pairs=4,
        bf16=machine.HAS_GPU, warm_up=5, steps=steps, rounds=rounds, from_config=True,
    )  # fmt: skip
    work.make(word_tokenizer(), SHAPE)
    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="a contender with this key")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    train = partial(ours, layout="packed", reference="none")
    contenders = {
        BARE: partial(bare, update=True),
        OURS: train,
        f"{OURS}, modules fetched alone": partial(train, zero={"leaf_module": {"classes": []}}),
    }
    for given in args.set:
        key, value = given.split("=", 1)
        contenders[f"{OURS}, {given}"] = partial(train, changes={key: value})
    with tempfile.TemporaryDirectory(prefix="dpo-ds-host-") as folder:
        os.environ["DPO_DS_CACHE"] = f"{folder}/tokens"
        preload()
        where = jobs.call(machine.environment, log=Path(folder, "environment.log"))
        print(json.dumps(where), flush=True)
        work = jobs.call(build, folder, args.steps, args.rounds, log=Path(folder, "build.log"))
        rounds = jobs.measure(work, contenders, Path(folder), together=True)
    cpu = {name: [each["cpu_seconds"] / work.steps for each in seen[1:]] for name, seen in rounds.items()}
    print("| | CPU ms a step | least | times bare |\n| --- | ---: | ---: | ---: |")
    for name, seconds in cpu.items():
        times = statistics.median(mine / plain for mine, plain in zip(seconds, cpu[BARE], strict=True))
        print(f"| {name} | {1e3 * statistics.median(seconds):.1f} | {1e3 * min(seconds):.1f} | {times:.2f} |")
    if args.out:
        args.out.write_text(json.dumps({"environment": where, "cpu_seconds": cpu, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
