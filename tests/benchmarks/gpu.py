"""One GPU in some minutes: is it right, and how fast are the head, the attention and a step, TRL's beside ours.

    python tests/benchmarks/gpu.py [correctness] [head] [attention] [step] [--out FOLDER] [--seconds 540] [--small]

A part that fails does not end the others; the exit code is 1 then. One for which too little of --seconds is left is
skipped, and that is said. FOLDER ($OUT, where it is set) gets gpu.json, gpu.md and the parts' output.

Step: (1) a Llama of 1.2 B parameters, a live reference, 16 pairs of ShareGPT's lengths in micro-batches of 8192 tokens,
against TRL, which gets by accumulation what fits; (2) a model of an 8B's shapes with 8 layers, a cached reference, 40
pairs in micro-batches of 16384 tokens, activation checkpointing. Both in bf16 under ZeRO-3, weights drawn on the GPU,
contenders one after another. MFU counts the FLOPs that a step needs: prompts once, no recomputation.
--small: the same in miniature, also without a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.benchmarks import jobs, machine  # noqa: E402

TESTS = (  # they use a GPU where there is one
    "tests/logprobs/test_triton.py", "tests/models/packed/test_on_gpu.py", "tests/models/layers/test_linear_4bit.py",
)  # fmt: skip
EIGHT_BILLION = dict(  # Llama 3 8B's, with 8 of its 32 layers
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=8, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip
TRL = "TRL, live reference"
LEAST_SECONDS = 30  # for a contender of a step: its models, compiling, the rounds
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=5000)


@dataclass(frozen=True)
class Run:
    """Where the output goes, and how much time there is."""

    out: Path
    ends: float  # time.monotonic()
    small: bool
    device: str

    @property
    def seconds(self) -> float:
        return max(0.0, self.ends - time.monotonic())


def correctness(run: Run) -> dict:
    """Runs the tests that use a GPU where there is one."""
    chosen = ["-k", "accuracy and float32"] if run.small else []
    options = ["-q", "--tb=short", "--durations=1", "--disable-warnings", "-p", "no:cacheprovider"]
    argv = [*options, *chosen, *(str(ROOT / name) for name in TESTS)]
    log = run.out / "correctness.log"
    jobs.call(run_tests, argv, log=log, seconds=run.seconds, shown=True)
    return {"table": log.read_text(errors="replace")}


def run_tests(argv: list[str]) -> None:
    """Runs tests on several cores: most of their time is the compiling of kernels. SystemExit if any fails."""
    shares = max(1, min(12, os.cpu_count()))
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{share}.log") for share in range(shares)]
        processes = [
            jobs.context().Process(target=run_share, args=(argv, share, shares, log)) for share, log in enumerate(logs)
        ]
        for process in processes:
            process.start()
        for process, log in zip(processes, logs, strict=True):
            process.join()
            text = log.read_text(errors="replace")
            print(text if process.exitcode else text.splitlines()[-1], flush=True)
    if any(process.exitcode for process in processes):
        raise SystemExit("tests failed")


def run_share(argv: list[str], share: int, shares: int, log: Path) -> None:
    import pytest

    class EveryNth:
        def pytest_collection_modifyitems(self, items: list) -> None:
            items[:] = items[share::shares]

    jobs.send_output(log)
    os.chdir(ROOT)  # where pytest's settings are
    code = pytest.main(argv, plugins=[EveryNth()])
    sys.exit(0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else code)


def head(run: Run) -> dict:
    """Runs the head's check on a GPU: errors, times, memory of ours and of others."""
    small = ["--shapes", "64,32,500", "--rounds", "1", "--methods", "ours", "naive"]
    return script(run, "logprobs.py", small if run.small else ["--gpu-check"])


def attention(run: Run) -> dict:
    """Runs the attention's comparison of its ways."""
    return script(run, "attention.py", ["--small"] if run.small else [])


def script(run: Run, name: str, argv: list[str]) -> dict:
    """Runs a script beside this one and returns all that it prints."""
    log = run.out / f"{Path(name).stem}.log"
    path = str(Path(__file__).with_name(name))
    jobs.call(run_script, [path, *argv], log=log, seconds=run.seconds, shown=True)
    return {"table": log.read_text(errors="replace")}


def run_script(argv: list[str]) -> None:
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


@dataclass(frozen=True)
class Case:
    """Contenders of one step: names in contenders.py, the model's shape, and what its Workload differs in."""

    title: str
    contenders: tuple[str, ...]
    shape: dict
    workload: dict


def cases(small: bool) -> list[Case]:
    from tests.benchmarks.train_throughput import ONE_BILLION

    live = {"pairs_per_rank": 16, "micro_batch_tokens": 8192, "peer_pairs": 2, "warm_up": 2, "rounds": 4}
    cached = {"pairs_per_rank": 40, "micro_batch_tokens": 16384, "peer_pairs": 2, "warm_up": 2, "rounds": 3}
    if small:
        live = cached = {"pairs_per_rank": 4, "micro_batch_tokens": 256, "peer_pairs": 2, "warm_up": 1, "rounds": 2}
    return [
        Case(
            "1.2B, live reference, 16 pairs a step",
            ("packed, live reference", TRL, "packed, live reference, not compiled"),
            TINY if small else ONE_BILLION,
            live,
        ),
        Case(
            "8B's shapes with 8 layers, cached reference, 40 pairs a step, activation checkpointing",
            ("packed, cached reference", "packed, cached reference, attention kept"),
            TINY if small else EIGHT_BILLION,
            cached | {"activation_checkpointing": True},
        ),
    ]


def step(run: Run) -> dict:
    """Measures training steps; a contender that fails, or has no time left, leaves the others' figures."""
    from tests.benchmarks import train_throughput as harness

    harness.preload()
    results, tables, problems = [], [], []
    for case in cases(run.small):
        with tempfile.TemporaryDirectory(prefix="dpo-ds-gpu-") as folder:
            os.environ["DPO_DS_CACHE"] = f"{folder}/tokens"
            work = jobs.call(build, case, folder, run.small, log=Path(folder, "build.log"), seconds=run.seconds)
            rounds = {}
            for name in case.contenders:
                if name == TRL and not find_spec("trl"):
                    print("TRL is not installed: left out", flush=True)
                    continue
                try:
                    rounds |= contend(harness.CONTENDERS[name].run, name, work, run)
                    first = rounds[name][0]["losses"][0]
                    if "live" in name and abs(first - math.log(2)) > 1e-3:
                        problems.append(f"{case.title}, {name}: the first loss is {first}, policy and reference differ")
                except (jobs.JobFailed, TimeoutError) as problem:
                    print(problem, flush=True)
                    problems.append(f"{case.title}, {name}: {str(problem).splitlines()[0]}")
            report = harness.evaluate(work, rounds, run.device)
        results.append({"title": case.title, "shape": case.shape, "workload": asdict(work), "rounds": rounds} | report)
        tables.append(f"{case.title}\n\n{table(report['results'])}\n")
        print(f"\n{tables[-1]}", flush=True)
    found = {"cases": results, "table": "\n".join(tables)}
    return found | ({"failed": "; ".join(problems)} if problems else {})


def contend(contender: Callable, name: str, work, run: Run) -> dict[str, list[dict]]:
    """Measures one contender; what it printed is added to step.log.

    Raises:
        TimeoutError: too little time is left to begin.
    """
    if run.seconds < LEAST_SECONDS:
        raise TimeoutError(f"skipped, {run.seconds:.0f} s are left and it needs {LEAST_SECONDS}")
    folder = Path(work.folder)
    try:
        return jobs.measure(work, {name: contender}, folder, together=False, seconds=run.seconds)
    finally:
        with (run.out / "step.log").open("a") as log:
            log.write(f"--- {name}\n{(folder / f'{name}.log').read_text(errors='replace')}\n")


def build(case: Case, folder: str, small: bool):
    """Pairs, tokenizer, config and DeepSpeed JSON of a case on disk; returns its Workload."""
    from dpo_ds.demo.corpus import write_jsonl
    from tests.benchmarks.workload import SHAREGPT_LENGTHS, Workload, rows_of_lengths, word_tokenizer

    lengths = json.loads(SHAREGPT_LENGTHS.read_text())
    if small:
        lengths = [[max(2, length // 20) for length in row] for row in lengths[:12]]
    pairs = Path(folder) / "pairs.jsonl"
    write_jsonl(pairs, rows_of_lengths(lengths))
    fixed = {"folder": folder, "pairs": str(pairs), "ranks": 1, "bf16": machine.HAS_GPU, "from_config": True}
    work = Workload(**fixed | {"steps": 1} | case.workload)
    work.make(word_tokenizer(), case.shape)
    return work


def table(results: dict) -> str:
    """One line a contender; tokens/s count each prompt once."""
    columns = "| | s a step | host CPU s | tokens/s | MFU | peak GiB | times TRL | warm-up s | first loss |"
    lines = [columns, "| --- |" + " ---: |" * 8]
    for name, r in results.items():
        mfu = f"{100 * r['mfu']:.1f} %" if r["mfu"] else "-"
        speed = f"{r['step_seconds']:.3f} | {r['step_cpu_seconds']:.3f} | {r['tokens_per_second']:.0f} | {mfu}"
        times = f"{r['times'][TRL]:.2f}" if TRL in r["times"] else "-"
        rest = f"{r['memory_bytes'] / 2**30:.1f} | {times} | {r['warm_up_seconds']:.0f} | {r['first_loss']:.4f}"
        lines.append(f"| {name} | {speed} | {rest} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Part:
    """One of the command's parts; `needs`: seconds without which it is not begun."""

    run: Callable[[Run], dict]
    needs: int


PARTS = {
    "correctness": Part(correctness, 40),
    "head": Part(head, 40),
    "attention": Part(attention, 30),
    "step": Part(step, 120),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all if none is given")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT", "gpu-benchmark"), help="folder")
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    parser.add_argument("--small", action="store_true", help="in miniature")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        where = jobs.call(machine.environment, log=Path(folder, "environment.log"))
    print(json.dumps(where), flush=True)
    run = Run(args.out.absolute(), started + args.seconds, args.small, where["device"])
    report: dict = {"environment": where, "parts": {}}
    for name in args.parts or PARTS:
        report["parts"][name] = take(name, run)
        (args.out / "gpu.json").write_text(json.dumps(report, indent=1))
        (args.out / "gpu.md").write_text(markdown(report))
    print("\n" + summary(report), flush=True)
    return 1 if any("failed" in found for found in report["parts"].values()) else 0


def take(name: str, run: Run) -> dict:
    """What a part found, "failed" or "skipped" with why among it, and the seconds that it took."""
    part, left = PARTS[name], run.seconds
    if left < part.needs and not run.small:
        print(f"{name}: skipped, {left:.0f} s are left and it needs {part.needs}", flush=True)
        return {"skipped": f"{left:.0f} s were left, it needs {part.needs}"}
    print(f"\n## {name}\n", flush=True)
    try:
        found = part.run(run)
    except Exception as error:  # whatever it is, the other parts have their turn
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"}
    return found | {"seconds": round(left - run.seconds, 1)}


def summary(report: dict) -> str:
    lines = []
    for name, found in report["parts"].items():
        outcome = next((f"{word}: {found[word]}" for word in ("failed", "skipped") if word in found), "done")
        lines.append(f"{name}: {outcome.splitlines()[0]}, {found.get('seconds', 0)} s")
    return "\n".join(lines)


def markdown(report: dict) -> str:
    parts = [f"{json.dumps(report['environment'])}\n"]
    for name, found in report["parts"].items():
        problem = "".join(f"{word}: {found[word]}\n" for word in ("failed", "skipped") if word in found)
        parts.append(f"## {name}\n\n{found.get('table', '')}\n{problem}")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
