"""Pairs a second and peak memory of training steps: ours against TRL's DPOTrainer and against the bare model.

    python tests/benchmarks/train_throughput.py [--data FOLDER] [--rounds 5] [--steps 2] [--only NAME ...] [--out FILE]

Every contender is a job of its own (jobs.py) that stays alive between rounds; in a round each of them in turn
runs the same steps: same pairs, global batches, model and DeepSpeed JSON (ZeRO-3), no activation checkpointing. Of
`precompute`, a step is a pass over a global batch (precompute_pass.py).
Ratios are medians over rounds of the ratio within a round. The losses of all that train by DPO are compared.

On a CPU: two ranks, one thread each, fp32, a Llama of 6 layers, width 256 and 8k vocabulary. With CUDA: a rank a GPU,
bf16, a Llama of 1.2 B parameters drawn there, and tokens/s and MFU besides; gpu.py does this and more on one GPU.
Weights are random: speed does not depend on them. Pairs are HH-harmless from --data (default $DPO_DS_DATA, else
../shared/data), generated reviews where that is absent.
Memory is the most rank 0 holds beyond its imports (CPU: resident; CUDA: allocated). Tokens count each prompt once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.benchmarks.machine import HAS_GPU, environment  # noqa: E402, I001  before all that asks for a GPU

import torch  # noqa: E402

from dpo_ds.commands import cli  # noqa: E402
from dpo_ds.data.batching import Lengths  # noqa: E402
from dpo_ds.data.sources import open_source  # noqa: E402
from dpo_ds.demo.corpus import preference_rows, write_jsonl  # noqa: E402
from dpo_ds.demo.tiny import train_tokenizer  # noqa: E402
from dpo_ds.memory.cards import card_of_device  # noqa: E402
from dpo_ds.training.mfu import ModelFlops  # noqa: E402
from tests.benchmarks import jobs  # noqa: E402
from tests.benchmarks.contenders import CONTENDERS  # noqa: E402
from tests.benchmarks.workload import Workload  # noqa: E402

HH = "hh_harmless_train.jsonl.gz"
SMALL = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8, vocab_size=8192)
ONE_BILLION = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, tie_word_embeddings=True,
)  # fmt: skip
BARS = (  # (faster, than, times); 1 / 1.2 is 1.2 times the seconds
    ("packed, live reference", "TRL, live reference", 6.0),
    ("packed, cached reference", "TRL, precomputed reference", 7.5),
    ("packed, no reference", "bare forward+backward", 1 / 1.2),
    ("precompute", "TRL, precompute", 3.0),
)


AT_FIRST_USE = (  # what the trainers import only then: before the forks it is paid once
    "dpo_ds.checkpoint.shards", "dpo_ds.models.engine", "dpo_ds.models.export", "dpo_ds.reference.live",
    "dpo_ds.training.objectives.reward", "dpo_ds.training.trainer", "transformers.models.llama.modeling_llama",
    "transformers.integrations", "torch._functorch.aot_autograd", "torch._inductor.codecache",
    "trl.trainer.dpo_trainer",
)  # fmt: skip


def preload() -> None:
    """Imports what contenders will; TRL where it is installed."""
    for name in AT_FIRST_USE:
        if find_spec(name.split(".")[0]):
            import_module(name)


def build(folder: Path, args: argparse.Namespace) -> Workload:
    """Pairs, tokenizer, model and DeepSpeed JSON on disk, for all contenders."""
    work = Workload(
        folder=str(folder), pairs=str(pairs_file(folder, args.data)),
        ranks=torch.cuda.device_count() if HAS_GPU else 2, pairs_per_rank=args.pairs_per_rank,
        micro_batch_tokens=args.micro_batch_tokens, peer_pairs=args.peer_pairs or args.pairs_per_rank, bf16=HAS_GPU,
        from_config=HAS_GPU, warm_up=args.warm_up, steps=args.steps, rounds=args.rounds,
    )  # fmt: skip
    texts = (text for _, row in open_source(work.pairs).rows() for text in row.values())
    work.make(train_tokenizer(texts, vocab_size=8192), ONE_BILLION if HAS_GPU else SMALL)
    return work


def fill_cache(work: Workload) -> int:
    """`dpo-ds precompute` of the workload's pairs; returns its exit code."""
    sections = {"model.path": work.model, "data.train": work.pairs, "reference.cache": work.cache}
    flags = [word for key, value in sections.items() for word in (f"--{key}", value)]
    flags += ["--data.on_bad_row", "skip", "--deepspeed.config", "none", "--precompute.threads", "2"]
    return cli.main(["precompute", *flags])


def pairs_file(folder: Path, data: Path) -> Path:
    if (data / HH).exists():
        return data / HH
    write_jsonl(folder / "reviews.jsonl", preference_rows(2000))
    return folder / "reviews.jsonl"


def evaluate(work: Workload, rounds: dict[str, list[dict]], gpu: str = "") -> dict:
    """Medians and ratios, for people and for JSON. Round 0, the warm-up, counts for the losses only."""
    flops, tokens = work_of_rounds(work)
    card = card_of_device(gpu)
    peak = card and card.peak
    results = {}
    for name, seen in rounds.items():
        seconds = np.array([each["seconds"] for each in seen[1:]])
        results[name] = {
            "pairs_per_second": work.steps * work.global_batch_size / statistics.median(seconds),
            "step_seconds": statistics.median(seconds) / work.steps,
            "step_cpu_seconds": statistics.median(each["cpu_seconds"] for each in seen[1:]) / work.steps,
            "memory_bytes": max(each["memory_bytes"] for each in seen[1:]),
            "tokens_per_second": statistics.median(tokens / seconds),
            "mfu": statistics.median(CONTENDERS[name].forwards * flops / seconds) / peak / work.ranks if peak else None,
            "warm_up_seconds": seen[0]["seconds"],
            "first_loss": seen[0]["losses"][0],
            "times": {
                other: statistics.median(np.array([each["seconds"] for each in theirs[1:]]) / seconds)
                for other, theirs in rounds.items()
            },
        }
    told: dict[str, list] = {}
    for name, seen in rounds.items():
        told.setdefault(CONTENDERS[name].told, []).append(sum((each["losses"] for each in seen), []))
    differences = {what: float(np.ptp(values, axis=0).max()) for what, values in told.items() if len(values) > 1}
    return {"results": results, "largest_differences": {} if work.from_config else differences}


def work_of_rounds(work: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Returns of each round the FLOPs of one forward over its pairs, and their tokens; prompts count once."""
    data = work.dataset()
    with torch.device("meta"):  # shapes without numbers
        model = ModelFlops.of(work.drawn_model())
    flops, tokens = [], []
    for rows in np.split(np.array(work.batches(data)[work.warm_up :]), work.rounds):
        lengths = Lengths.of(data, rows.ravel())
        completions = int(lengths.completions.sum())
        tokens.append(completions + lengths.prompt.sum())
        flops.append(model.forward(lengths, completions))
    return np.array(flops), np.array(tokens)


def table(report: dict) -> str:
    results = report["results"]
    peer = "TRL, live reference" if "TRL, live reference" in results else None
    columns = "| | pairs/s | times TRL live | s a step | host CPU s | memory MiB | tokens/s | MFU |"
    lines = [columns, "| --- |" + " ---: |" * 7]
    for name, r in results.items():
        times = f"{r['times'][peer]:.2f}" if peer else "-"
        mfu = f"{100 * r['mfu']:.1f} %" if r["mfu"] else "-"
        speed = f"{r['pairs_per_second']:.2f} | {times} | {r['step_seconds']:.3f} | {r['step_cpu_seconds']:.3f}"
        lines.append(f"| {name} | {speed} | {r['memory_bytes'] / 2**20:.0f} | {r['tokens_per_second']:.0f} | {mfu} |")
    return "\n".join(lines)


def bars(report: dict) -> list[str]:
    """The speeds that this project promises on a CPU, and whether this run has them."""
    lines = []
    for mine, other, least in BARS:
        if {mine, other} <= report["results"].keys():
            times = report["results"][mine]["times"][other]
            verdict = "reached" if times >= least else "MISSED"
            lines.append(f"{mine}: {times:.2f} times the speed of {other}; promised {least:.2f}, {verdict}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("DPO_DS_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of a round")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the first round")
    parser.add_argument("--pairs-per-rank", type=int, default=16 if HAS_GPU else 8)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384 if HAS_GPU else 8192, help="ours")
    parser.add_argument("--peer-pairs", type=int, help="pairs in a forward of TRL's; all of a rank's if not given")
    usual = [name for name, contender in CONTENDERS.items() if contender.usual]
    parser.add_argument("--only", nargs="+", default=usual, choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--in-turn", action="store_true", help="one contender after the other, for want of memory")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory(prefix="dpo-ds-bench-") as name:
        folder = Path(name)
        os.environ["DPO_DS_CACHE"] = str(folder / "tokens")
        report = {"environment": jobs.call(environment, log=folder / "environment.log")}
        print(json.dumps(report["environment"]), flush=True)
        if not (args.data / HH).exists():
            print(f"{args.data / HH} is not there: generated reviews instead, which are short; give --data FOLDER")
        work = jobs.call(build, folder, args, log=folder / "build.log")
        if any("cached" in name for name in args.only) and not work.from_config:
            assert jobs.call(fill_cache, work, log=folder / "precompute.log") == 0
        report["workload"] = asdict(work)
        runs = {name: CONTENDERS[name].run for name in args.only}
        rounds = jobs.measure(work, runs, folder, together=not args.in_turn)
        report |= evaluate(work, rounds, report["environment"]["device"]) | {"rounds": rounds}
    print("\n".join([table(report), *bars(report)]))
    for what, difference in report["largest_differences"].items():
        print(f"{what} of the same step differs by {difference:.1e} at most")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
