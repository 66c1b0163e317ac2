"""Pairs a second and peak memory of training steps: ours against TRL's DPOTrainer and against the bare model.

    python tests/benchmarks/train_throughput.py [--data FOLDER] [--rounds 5] [--steps 2] [--only NAME ...] [--out FILE]

Every contender is a job of its own that stays alive between rounds (contenders.py); in a round each of them in turn
runs the same steps: same pairs, global batches, model and DeepSpeed JSON (ZeRO-3), no activation checkpointing. Of
`precompute`, a step is a pass over a global batch (precompute_pass.py).
Ratios are medians over rounds of the ratio within a round. The losses of all that train by DPO are compared.

On a CPU: two ranks, one thread each, fp32, a Llama of 6 layers, width 256 and 8k vocabulary. With CUDA: a rank a GPU,
bf16, a Llama of 1.2 B parameters, and tokens/s and MFU besides. Weights are random: speed does not depend on them.
Pairs are HH-harmless from --data (default $DPO_DS_DATA, else ../shared/data), generated reviews where that is absent.
Memory is the most a rank holds beyond its imports (CPU: resident; CUDA: allocated). Tokens count each prompt once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from dpo_ds.batch import PAIR  # noqa: E402
from dpo_ds.cluster.launch import free_port  # noqa: E402
from dpo_ds.config import DataSection  # noqa: E402
from dpo_ds.config.deepspeed import LEAST_BUCKET  # noqa: E402
from dpo_ds.data import prepare  # noqa: E402
from dpo_ds.data.sources import open_source  # noqa: E402
from dpo_ds.demo.corpus import preference_rows, write_jsonl  # noqa: E402
from dpo_ds.demo.tiny import special_ids, train_tokenizer  # noqa: E402
from tests.benchmarks.contenders import CONTENDERS  # noqa: E402
from tests.benchmarks.workload import Workload  # noqa: E402

HH = "hh_harmless_train.jsonl.gz"
SMALL = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8, vocab_size=8192)
ONE_BILLION = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, tie_word_embeddings=True,
)  # fmt: skip
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}  # dense bf16, a GPU
BARS = (  # (faster, than, times); 1 / 1.3 is 1.3 times the seconds
    ("packed, live reference", "TRL, live reference", 5.0),
    ("packed, cached reference", "TRL, precomputed reference", 5.0),
    ("packed, no reference", "bare forward+backward", 1 / 1.3),
    ("precompute", "TRL, precompute", 3.0),
)
AUTO = "auto"
DEEPSPEED = {  # both trainers fill what is auto, from the same hyper-parameters
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": LEAST_BUCKET,  # what dpo_ds takes for auto; TRL is given the same
        "stage3_prefetch_bucket_size": LEAST_BUCKET,
        "stage3_param_persistence_threshold": AUTO,  # ten times the width in both
    },
    "optimizer": {"type": "AdamW", "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO}},
    "gradient_clipping": AUTO,
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
    "gradient_accumulation_steps": AUTO,
}


def build(folder: Path, args: argparse.Namespace) -> Workload:
    """Pairs, tokenizer, model and DeepSpeed JSON on disk, for all contenders."""
    cuda = torch.cuda.is_available()
    ranks = torch.cuda.device_count() if cuda else 2
    work = Workload(
        model=str(folder / "model"), pairs=str(pairs_file(folder, args.data)), tokens="", folder=str(folder),
        deepspeed=str(folder / "zero3.json"), ranks=ranks, pairs_per_rank=args.pairs_per_rank,
        micro_batch_tokens=args.micro_batch_tokens, learning_rate=1e-4, bf16=cuda,
        warm_up=args.warm_up, steps=args.steps, rounds=args.rounds,
    )  # fmt: skip
    tokenizer = train_tokenizer((text for row in rows_of(work.pairs) for text in row.values()), vocab_size=8192)
    tokenizer.save_pretrained(work.model)
    config = LlamaConfig(**(ONE_BILLION if cuda else SMALL), max_position_embeddings=4096, **special_ids(tokenizer))
    torch.manual_seed(0)
    dtype = torch.bfloat16 if cuda else torch.float32
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(work.model)

    adamw = DEEPSPEED["optimizer"]["params"] | ({} if cuda else {"torch_adam": True, "fused": True})
    deepspeed = DEEPSPEED | {"optimizer": {"type": "AdamW", "params": adamw}, "bf16": {"enabled": cuda}}
    Path(work.deepspeed).write_text(json.dumps(deepspeed, indent=1))

    os.environ["DPO_DS_CACHE"] = str(folder / "tokens")
    options = DataSection(train=work.pairs, on_bad_row="skip")
    data = prepare(work.pairs, options=options, tokenizer=tokenizer, sides=PAIR, split="train", build=True)
    work = Workload(**asdict(work) | {"tokens": str(next((folder / "tokens").rglob("pairs.arrow")).parent)})
    pairs = (data[int(row)] for rows in work.batches(data) for row in rows)
    columns = ({f"{part}_ids": getattr(pair, part).tolist() for part in ("prompt", *PAIR)} for pair in pairs)
    Dataset.from_list(list(columns)).save_to_disk(str(folder / "trl"))
    (folder / "workload.json").write_text(json.dumps(asdict(work)))
    if any("cached" in name for name in args.only):
        sections = {"model.path": work.model, "data.train": work.pairs, "reference.cache": work.cache}
        flags = [word for key, value in sections.items() for word in (f"--{key}", value)]
        flags += ["--data.on_bad_row", "skip", "--deepspeed.config", "none", "--precompute.threads", "2"]
        subprocess.run([sys.executable, "-m", "dpo_ds", "precompute", *flags], cwd=ROOT, check=True)
    return work


def pairs_file(folder: Path, data: Path) -> Path:
    if (data / HH).exists():
        return data / HH
    print(f"{data / HH} is not there: generated reviews instead, which are short; give --data FOLDER", flush=True)
    write_jsonl(folder / "reviews.jsonl", preference_rows(2000))
    return folder / "reviews.jsonl"


def rows_of(path: str):
    return (row for _, row in open_source(path).rows())


class Job:
    """A contender's ranks, waiting."""

    def __init__(self, name: str, work: Workload):
        self.name, self.folder, port = name, Path(work.folder), str(free_port())
        self.ranks, self.results = [], []
        for rank in range(work.ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(work.ranks), "MASTER_PORT": port}
            place |= {"LOCAL_WORLD_SIZE": str(work.ranks), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
            here, there = os.pipe()
            script = str(Path(__file__).with_name("contenders.py"))
            command = [sys.executable, script, name, f"{work.folder}/workload.json", str(there)]
            files = {"stdin": subprocess.PIPE, "stderr": subprocess.STDOUT, "pass_fds": [there]}
            with self.log(rank).open("wb") as log:
                self.ranks.append(subprocess.Popen(command, stdout=log, text=True, env=os.environ | place, **files))
            os.close(there)
            self.results.append(os.fdopen(here))

    def log(self, rank: int) -> Path:
        return self.folder / f"{self.name}-{rank}.log"

    def reports(self) -> list[dict]:
        """What every rank says of the round that it ran."""
        lines = [pipe.readline() for pipe in self.results]
        if not all(lines):
            raise SystemExit(f"{self.name} ended early:\n{self.log(lines.index('')).read_text()[-3000:]}")
        return [json.loads(line) for line in lines]

    def run_round(self) -> list[dict]:
        for process in self.ranks:
            process.stdin.write("go\n")
            process.stdin.flush()
        return self.reports()

    def end(self) -> None:
        for process in self.ranks:
            process.stdin.close()
        for process in self.ranks:
            process.wait(60)


def measure(work: Workload, names: list[str]) -> dict[str, list[dict]]:
    """Every contender's rounds: seconds of the slowest rank, memory of the largest, losses. Round 0 is warm-up."""
    jobs, rounds = [], {}
    try:
        for name in names:  # one after the other: each warms up undisturbed
            jobs.append(Job(name, work))
            rounds[name] = [summary(jobs[-1].reports())]
            print(f"ready: {name}", flush=True)
        for number in range(1, work.rounds + 1):
            for job in jobs:
                rounds[job.name].append(summary(job.run_round()))
            times = ", ".join(f"{name} {seen[-1]['seconds']:.2f}" for name, seen in rounds.items())
            print(f"round {number}, seconds: {times}", flush=True)
        for job in jobs:
            job.end()
    finally:
        for process in (process for job in jobs for process in job.ranks):
            process.kill()
    return rounds


def summary(reports: list[dict]) -> dict:
    slowest = {key: max(report[key] for report in reports) for key in ("seconds", "cpu_seconds", "memory_bytes")}
    return slowest | {"losses": reports[0]["losses"]}


def evaluate(work: Workload, rounds: dict[str, list[dict]]) -> dict:
    """Medians and ratios, for people and for JSON. Round 0, the warm-up, counts for the losses only."""
    flops, tokens = work_of_rounds(work)
    name = torch.cuda.get_device_name() if work.bf16 else ""
    peak = next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in name), None)
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
            "times": {
                other: statistics.median(np.array([each["seconds"] for each in theirs[1:]]) / seconds)
                for other, theirs in rounds.items()
            },
        }
    told: dict[str, list] = {}
    for name, seen in rounds.items():
        told.setdefault(CONTENDERS[name].told, []).append(sum((each["losses"] for each in seen), []))
    differences = {what: float(np.ptp(values, axis=0).max()) for what, values in told.items() if len(values) > 1}
    return {"results": results, "largest_differences": differences}


def work_of_rounds(work: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Of each round: FLOPs of one forward over its pairs (prompts once, the head on completions), and tokens."""
    data, config = work.dataset(), LlamaConfig.from_pretrained(work.model)
    width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = 4 * width * (width + kv_width) + 6 * width * config.intermediate_size  # matmuls of a token
    flops, tokens = [], []
    for rows in np.split(np.array(work.batches(data)[work.warm_up :]), work.rounds):
        prompt, chosen, rejected = (
            lengths[rows].astype(float) for lengths in (data.prompt_lengths, data.chosen_lengths, data.rejected_lengths)
        )
        attended = (prompt + chosen) ** 2 / 2 + rejected * prompt + rejected**2 / 2
        tokens.append((prompt + chosen + rejected).sum())
        layers = config.num_hidden_layers * (layer * tokens[-1] + 4 * width * attended.sum())
        flops.append(layers + 2 * width * config.vocab_size * (chosen + rejected).sum())
    return np.array(flops), np.array(tokens)


def table(report: dict) -> str:
    results = report["results"]
    peer = "TRL, live reference" if "TRL, live reference" in results else None
    lines = ["| | pairs/s | times TRL live | s a step | memory MiB | tokens/s | MFU |", "| --- |" + " ---: |" * 6]
    for name, r in results.items():
        times = f"{r['times'][peer]:.2f}" if peer else "-"
        mfu = f"{100 * r['mfu']:.1f} %" if r["mfu"] else "-"
        speed = f"{r['pairs_per_second']:.2f} | {times} | {r['step_seconds']:.3f}"
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


def environment(work: Workload) -> dict:
    packages = ("dpo-ds", "torch", "deepspeed", "transformers", "trl")
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "CPU")
    machine = {
        "device": torch.cuda.get_device_name() if work.bf16 else cpu,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
    }
    return machine | {package: version(package) for package in packages}


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("DPO_DS_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of a round")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the first round")
    parser.add_argument("--pairs-per-rank", type=int, default=16 if cuda else 8)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384 if cuda else 8192, help="ours")
    training = [name for name, contender in CONTENDERS.items() if contender.forwards > 1]
    parser.add_argument("--only", nargs="+", default=training, choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dpo-ds-bench-") as folder:
        work = build(Path(folder), args)
        report = {"environment": environment(work), "workload": asdict(work)}
        print(json.dumps(report["environment"]), flush=True)
        rounds = measure(work, args.only)
        report |= evaluate(work, rounds) | {"rounds": rounds}
    print("\n".join([table(report), *bars(report)]))
    for what, difference in report["largest_differences"].items():
        print(f"{what} of the same step differs by {difference:.1e} at most")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
