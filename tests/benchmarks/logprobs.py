"""Token log-probs: time, memory and error of ours against what others offer, on the CPU or a CUDA GPU.

    python tests/benchmarks/logprobs.py [--shapes 4096,512,131072 ...] [--rounds 3] [--json FILE]
    python tests/benchmarks/logprobs.py --gpu-check [--shapes 16384,4096,131072]      (one minute: head_check.py)

It runs on the GPU where there is one. Opponents: naive log_softmax + gather, torch.compile of it, torch's
linear_cross_entropy, TRL's fused head (extra `bench`), Liger's fused cross-entropy; one that is not installed or cannot
run here is listed with the reason. A CPU case is a process of its own (OMP_NUM_THREADS sets its threads), rounds go
through all methods in turn, and the table shows medians. Logits are peaked: the target has about half of the
probability. Memory is the rise of the peak over inputs and gradients. TFLOP/s counts 2 NVD forward and 6 NVD forward
and backward, also for methods that do 8.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
CPU_SHAPES = ["300,64,1000", "1000,256,8000", "2000,512,32000", "4096,512,131072", "65536,512,131072"]
HEADS = [(2048, 128256), (4096, 131072), (3584, 152064), (2304, 256000)]
CUDA_SHAPES = [f"{n},{d},{v}" for (d, v), n in product(HEADS, [4096, 16384, 65536, 131072])]
LARGE = 20e9  # NVD above which a process on the CPU measures once
ERROR_ROWS = 64  # compared with float64


def naive(hidden, weight, targets):
    return torch.log_softmax((hidden @ weight.t()).float(), -1).gather(1, targets[:, None]).squeeze(1)


def ours(hidden, weight, targets):
    from dpo_ds.logprobs import token_logps

    return token_logps(hidden, weight, targets)


def ours_with_statistics(hidden, weight, targets):
    from dpo_ds.logprobs import token_statistics

    return token_statistics(hidden, weight, targets).logps


def torch_compile(hidden, weight, targets):
    if hidden.device.type == "cpu" and not shutil.which("g++"):
        raise RuntimeError("needs a C++ compiler")
    return torch.compile(naive)(hidden, weight, targets)


def linear_cross_entropy(hidden, weight, targets):
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none")


def trl(hidden, weight, targets):
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]


def liger(hidden, weight, targets):
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)(weight, hidden, targets)


METHODS = {m.__name__: m for m in (ours, ours_with_statistics, naive, torch_compile, linear_cross_entropy, trl, liger)}
FULL_MATRICES = {"naive": 3, "torch_compile": 2}  # [N, V] float32 matrices alive at once


def inputs(shape, device, dtype):
    N, D, V = shape
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.empty(V, D, device=device, dtype=dtype).normal_(0, D**-0.5, generator=generator)
    hidden = torch.empty(N, D, device=device, dtype=dtype).normal_(generator=generator)
    targets = torch.randint(V, (N,), device=device, generator=generator)
    grad = torch.empty(N, device=device).normal_(generator=generator)
    for start in range(0, N, 1024):  # in blocks: no large temporary
        hidden[start : start + 1024] += 12 * weight[targets[start : start + 1024]]
    return hidden.requires_grad_(), weight.requires_grad_(), targets, grad


def largest_error(logps, hidden, weight, targets):
    logits = [hidden[:ERROR_ROWS].double() @ chunk.double().t() for chunk in weight.split(16384)]
    exact = torch.log_softmax(torch.cat(logits, 1), -1).gather(1, targets[:ERROR_ROWS, None]).squeeze(1)
    return (logps - exact).abs().max().item()


def measure(method, shape, device, dtype) -> dict:
    """Seconds of passes without a gradient (None for a large case on the CPU), of forward, and of forward and backward;
    bytes; largest error."""
    function, data = METHODS[method], inputs(shape, device, dtype)
    once = device == "cpu" and shape[0] * shape[1] * shape[2] > LARGE
    warm_up = data if method == "torch_compile" else inputs((8, shape[1], 64), device, dtype)
    run(function, warm_up, device)  # threads, handles, compilation
    runs = [run(function, data, device) for _ in range(1 if once else 6)]
    memory = runs[0]["extra_bytes"]  # later runs find what was freed still resident
    result = {key: statistics.median(r[key] for r in runs[1:] or runs) for key in runs[0]} | {"extra_bytes": memory}
    hidden, weight, targets, _ = data
    with torch.no_grad():
        clock, laps = Clock(device), []
        for _ in range(0 if once else 5):
            function(hidden, weight, targets)
            laps.append(clock.lap()["wall"])
        logps = function(hidden[:ERROR_ROWS], weight, targets[:ERROR_ROWS])
        error = largest_error(logps, hidden, weight, targets)
    return result | {"no_grad_s": statistics.median(laps) if laps else None, "largest_error": error}


def run(function, data, device) -> dict:
    hidden, weight, targets, grad = data
    clock = Clock(device)
    clock.reset_peak()
    logps = function(hidden, weight, targets)
    forward = clock.lap()
    logps.backward(grad)
    backward = clock.lap()
    extra = clock.peak() - hidden.nbytes - weight.nbytes  # beyond the gradients
    hidden.grad = weight.grad = None
    return {
        "forward_s": forward["wall"],
        "total_s": forward["wall"] + backward["wall"],
        "cpu_s": forward["cpu"] + backward["cpu"],
        "extra_bytes": extra,
    }


class Clock:
    """Wall and CPU seconds since the last lap, and the peak memory since reset_peak beyond what was held then."""

    def __init__(self, device):
        self.cuda = device == "cuda"
        self.lap()

    def lap(self):
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter(), time.process_time()
        before, self.last = getattr(self, "last", now), now
        return {"wall": now[0] - before[0], "cpu": now[1] - before[1]}

    def reset_peak(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
        self.held = self._peak()
        self.lap()

    def peak(self):
        return self._peak() - self.held

    def _peak(self):
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attempt(method, shape, device, dtype) -> dict:
    """The measurement, or {"skipped": why}: opponents are other people's code, whatever they raise is their result."""
    N, D, V = shape
    needed = FULL_MATRICES.get(method, 0) * N * V * 4
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = torch.cuda.mem_get_info()[1] if device == "cuda" else machine
    if needed > 0.9 * total:
        return {"skipped": f"needs {needed / 1e9:.0f} GB, the machine has {total / 1e9:.0f}"}
    try:
        return measure(method, shape, device, dtype)
    except Exception as error:
        if method.startswith("ours"):
            raise
        return {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"}


def in_child(method, shape, dtype) -> dict:
    case = [method, ",".join(map(str, shape)), str(dtype).removeprefix("torch.")]
    child = subprocess.run([sys.executable, __file__, "--child", *case], capture_output=True, text=True)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["killed"])[-1]
        return {"skipped": f"exit code {child.returncode}: {last[:80]}"}
    return json.loads(child.stdout.splitlines()[-1])


def compare(shape, methods, rounds, device, dtype) -> dict:
    results = {method: [] for method in methods}
    for _ in range(rounds):
        for method, runs in results.items():
            if not (runs and "skipped" in runs[0]):
                run = attempt(method, shape, device, dtype) if device == "cuda" else in_child(method, shape, dtype)
                runs.append(run)
    return {method: runs[0] if "skipped" in runs[0] else medians(runs) for method, runs in results.items()}


def medians(runs) -> dict:
    return {k: v if v is None else statistics.median(run[k] for run in runs) for k, v in runs[0].items()}


def table(shape, results) -> str:
    N, D, V = shape
    lines = [
        f"\nN={N} d={D} V={V}\n",
        "| method | no grad s | forward s | fwd+bwd s | CPU s | TFLOP/s fwd | 6NVd | extra MiB | max error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, r in results.items():
        if "skipped" in r:
            lines.append(f"| {method} | not run: {r['skipped']} |" + " |" * 7)
            continue
        flops = N * V * D / 1e12
        no_grad = "-" if r["no_grad_s"] is None else f"{r['no_grad_s']:.4f}"
        lines.append(
            f"| {method} | {no_grad} | {r['forward_s']:.4f} | {r['total_s']:.4f} | {r['cpu_s']:.3f} "
            f"| {2 * flops / r['forward_s']:.3f} | {6 * flops / r['total_s']:.3f} "
            f"| {r['extra_bytes'] / 2**20:.0f} | {r['largest_error']:.1e} |"
        )
    return "\n".join(lines)


def environment(device) -> dict:
    versions = {}
    for package in ("torch", "triton", "trl", "liger-kernel"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def _cpu_name():
    info = Path("/proc/cpuinfo").read_text()
    return next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "CPU")


def main() -> None:
    if "--gpu-check" in sys.argv:  # before anything touches CUDA: it forks
        from tests.benchmarks import head_check

        head_check.main([argument for argument in sys.argv[1:] if argument != "--gpu-check"])
        return
    if sys.argv[1:2] == ["--child"]:
        method, shape, dtype = sys.argv[2:]
        print(json.dumps(attempt(method, [int(x) for x in shape.split(",")], "cpu", getattr(torch, dtype))))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=CUDA_SHAPES if device == "cuda" else CPU_SHAPES, metavar="N,D,V")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16" if device == "cuda" else "float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    shapes = [[int(x) for x in shape.split(",")] for shape in args.shapes]
    report = {"environment": environment(device), "dtype": args.dtype, "rounds": args.rounds, "cases": []}
    print(json.dumps(report["environment"]))
    for shape in shapes:
        results = compare(shape, args.methods, args.rounds, device, dtype)
        report["cases"].append({"shape": shape, "results": results})
        print(table(shape, results), flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
