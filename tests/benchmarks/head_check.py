"""The head's Triton kernels on one GPU within a minute: right, how fast, and which tiles; `logprobs.py --gpu-check`.

1. Errors against float64 of every way to load tiles and to keep exponentials: log-probs, gradients of hidden states
   and of some rows of the weight.
2. Times of forward and backward against others'.
3. Times of each kernel by launch and of the two products; the best belong into dpo_ds.logprobs.triton.LAUNCHES.

Kernels are compiled by forked processes first, on few rows: no CUDA before the fork. Under TRITON_INTERPRET=1 and with
a small --shapes it runs without a GPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import triton

from dpo_ds.logprobs import chunked, token_logps, token_statistics
from dpo_ds.logprobs import triton as backend
from tests.benchmarks import jobs, machine
from tests.benchmarks.logprobs import inputs, naive, trl

SHAPE = "16384,4096,131072"
ERROR_SHAPE = 1024, 4096, 131072
COLUMNS = 256  # of the logits: so many rows of the weight's gradient are compared with float64
ALL = 5 << 30  # bytes, enough for all exponentials
BUDGETS = {"kept": ALL, "1 GiB kept": 1 << 30, "recomputed": 0}
PROCESSES = 12  # that compile
DEVICE = "cuda" if machine.HAS_GPU else "cpu"
TILES = [  # of the fold and of the gradient
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 64, 8, 2), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4),
    (128, 128, 64, 4, 4),
]  # fmt: skip
WALKS = [(4096, 32), (2048, 32), (1024, 32), (256, 32), (2048, 16), (1024, 16), (2048, 8), (1024, 8)]  # split, group
KEPT_TILES = [(rows, warps) for rows in (8, 16, 32, 64) for warps in (4, 8)]


def candidates() -> list[backend.Launch]:
    """Every tile, and the first of them in every order of its tiles and by pointers."""
    tiles = [backend.Launch(*tile, split=2048, group=16, descriptors=True) for tile in TILES]
    walks = [replace(tiles[0], split=split, group=group) for split, group in WALKS]
    found = [*walks, *tiles, replace(walks[0], descriptors=False)]
    return list(dict.fromkeys(found))


def kinds(launch) -> list[str]:
    """The kernels that a launch is tried for: four stages leave no shared memory for a large tile that is written."""
    writes = launch.num_stages < 4 or launch.rows * launch.columns < 128 * 256
    return ["fold", "fold, kept", "gradient"] if writes else ["fold"]


class Kernels:
    """The kernels one by one on one case: hidden [N, D], weight [V, D]."""

    def __init__(self, data):
        self.hidden, self.weight, self.targets, self.grad = (x.detach() for x in data)
        self.lse = torch.zeros_like(self.grad)

    def fold(self, launch, keep):
        tiles = chunked.TILES["triton"]._replace(kept_bytes=keep)
        kernel = backend.TritonKernel(1.0, None, backend.Launches(launch, launch), tiles)
        return kernel.fold(self.hidden, self.weight, None, self.targets, False, True)

    def gradient(self, launch, columns, spent=None):
        kernel = backend.TritonKernel(1.0, None, backend.Launches(launch, launch))
        return kernel.logit_gradient(self.hidden, self.weight[:columns], None, self.targets, self.lse, self.grad, spent)

    def kept_gradient(self, launches, kept):
        kernel = backend.TritonKernel(1.0, None, launches)
        return kernel.kept_logit_gradient(*kept, self.targets, self.lse, self.grad)


def compile_one(job) -> str:
    """Compiles for 256 rows of width 128 and 8192 columns; other sizes take the same kernels. Returns what failed."""
    kind, launch = job
    try:
        data = inputs((256, 128, 8192), DEVICE, torch.bfloat16)
        few = Kernels(data)
        if kind == "gradient":
            few.gradient(launch, 8192)
        elif kind == "kept gradient":
            for rows, warps in KEPT_TILES:
                few.kept_gradient(backend.Launches(launch, launch, rows, warps), few.fold(launch, ALL)[1][0])
        elif launch is None:
            with Setting(ALL if "kept" in kind else 0, "pointers" not in kind):
                step(ours_with_statistics if "statistics" in kind else ours, data)
        else:
            few.fold(launch, ALL if kind == "fold, kept" else 0)
        synchronize()
        return ""
    except Exception as error:  # too much shared memory or too many registers: a row of the table
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"


def compile_all(jobs_of_compilers) -> dict:
    if triton.knobs.runtime.interpret:
        return dict.fromkeys(jobs_of_compilers, "")
    with ProcessPoolExecutor(PROCESSES, jobs.context()) as pool:
        running = {job: pool.submit(compile_one, job) for job in jobs_of_compilers}
        try:
            import trl.kernels  # noqa: F401  # takes long, and this process has nothing to do
        except ImportError:
            pass
        return {job: done.result() for job, done in running.items()}


def milliseconds(function, repeats=5) -> float:
    """The median on the GPU, launched one after another so that Python's time is hidden as in training."""
    function()
    if DEVICE == "cpu":
        start = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - start)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    synchronize()
    return median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False))


def step(function, data):
    hidden, weight, targets, grad = data
    logps = function(hidden, weight, targets)
    return logps, torch.autograd.grad(logps, (hidden, weight), grad)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def ours_with_statistics(hidden, weight, targets):
    return token_statistics(hidden, weight, targets, backend="triton").logps


def ours(hidden, weight, targets):
    return token_logps(hidden, weight, targets, backend="triton")


class Setting:
    """A budget for exponentials and a way to load tiles, for a while."""

    def __init__(self, kept_bytes, descriptors=True):
        self.tiles = chunked.TILES["triton"]._replace(kept_bytes=kept_bytes)
        self.descriptors = descriptors

    def __enter__(self):
        self.before = chunked.TILES["triton"], dict(backend.LAUNCHES), backend.INTERPRETED
        chunked.TILES["triton"] = self.tiles
        if not self.descriptors:
            for key, launches in backend.LAUNCHES.items():
                backend.LAUNCHES[key] = self._by_pointers(launches)
            backend.INTERPRETED = self._by_pointers(backend.INTERPRETED)

    def __exit__(self, *_):
        chunked.TILES["triton"], launches, backend.INTERPRETED = self.before
        backend.LAUNCHES.update(launches)

    @staticmethod
    def _by_pointers(launches):
        folds = [replace(launch, descriptors=False) for launch in (launches.fold, launches.gradient)]
        return replace(launches, fold=folds[0], gradient=folds[1])


def exact(data):
    """float64 log-probs, gradient of the hidden states, and of the weight's first COLUMNS rows."""
    hidden, weight, targets, grad = (x.detach() for x in data)
    hidden, grad = hidden.double(), grad.double()[:, None]
    parts = [hidden @ part.double().t() for part in weight.split(8192)]
    lse = torch.logsumexp(torch.stack([torch.logsumexp(part, 1) for part in parts]), 0)
    logps = (hidden * weight[targets].double()).sum(1) - lse
    d_hidden = grad * weight[targets].double()
    for start, part in zip(range(0, len(weight), 8192), parts, strict=True):
        d_logits = -(part - lse[:, None]).exp_() * grad
        d_hidden += d_logits @ weight[start : start + 8192].double()
        if start == 0:
            rows = torch.arange(len(hidden), device=hidden.device)[targets < COLUMNS]
            d_logits[rows, targets[rows]] += grad[rows, 0]
            d_weight = d_logits[:, :COLUMNS].t() @ hidden
    return logps, d_hidden, d_weight


def errors(shape) -> list[dict]:
    data = inputs(shape, DEVICE, torch.bfloat16)
    logps, d_hidden, d_weight = exact(data)
    rows, values = [], {}

    def relative(a, b):
        return ((a.double() - b).norm() / b.norm()).item()

    for loads in ("descriptors", "pointers"):
        for name, kept_bytes in {"kept": ALL, "some kept": shape[0] * 512 * 2, "recomputed": 0}.items():
            with Setting(kept_bytes, loads == "descriptors"):
                got, gradients = step(ours, data)
            values[loads] = got
            rows.append(
                {
                    "what": f"{name}, {loads}",
                    "log-prob": (got.double() - logps).abs().max().item(),
                    "d hidden": relative(gradients[0], d_hidden),
                    "d weight": relative(gradients[1][:COLUMNS], d_weight),
                }
            )
    got, gradients = step(naive, data)
    error = (got.double() - logps).abs().max().item()
    found = relative(gradients[0], d_hidden), relative(gradients[1][:COLUMNS], d_weight)
    rows.append({"what": "naive", "log-prob": error, "d hidden": found[0], "d weight": found[1]})
    same = torch.equal(values["descriptors"], values["pointers"])
    print(f"\nErrors against float64, N,D,V = {shape}; descriptors and pointers equal to the bit: {same}")
    print_table(rows)
    return rows


def contenders(data) -> list[dict]:
    rows = []

    def add(name, function):
        hidden, weight, targets, _ = data
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        try:
            with torch.no_grad():
                quiet = milliseconds(lambda: function(hidden, weight, targets))
            forward = milliseconds(lambda: function(hidden, weight, targets))
            total = milliseconds(lambda: step(function, data), 4)
        except (ImportError, RuntimeError, ValueError) as error:
            rows.append({"what": name, "no grad ms": f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"})
            return
        row = {"what": name, "no grad ms": quiet, "forward ms": forward, "fwd+bwd ms": total}
        if DEVICE == "cuda":  # beyond inputs and gradients
            extra = torch.cuda.max_memory_allocated() - held - hidden.nbytes - weight.nbytes
            row["extra MiB"] = extra // 2**20
        rows.append(row)

    for name, kept_bytes in BUDGETS.items():
        with Setting(kept_bytes):
            add(f"ours, {name}", ours)
    with Setting(BUDGETS["kept"]):
        add("ours with statistics, kept", ours_with_statistics)
    add("naive", naive)
    add("TRL's head", trl)
    print(f"\nTimes, N,D,V = {[*data[0].shape, len(data[1])]}, bfloat16; bars: forward 27.5, kept 85, recomputed 106")
    print_table(rows)
    return rows


def kernels(data, failed) -> list[dict]:
    """Times of each kernel by launch, of the whole case's 2 NVD; the gradient's from one chunk."""
    case = Kernels(data)
    (N, D), V = case.hidden.shape, len(case.weight)
    chunk = min(chunked.TILES["triton"].kernel_columns(N, 2), V)
    rows = []

    def add(kind, launch, function, share=1.0, flops=2 * N * V * D, **more):
        row = {"what": kind, "launch": " ".join(map(str, astuple(launch))) if launch else ""} | more
        why = failed.get((kind, launch))
        if why:
            rows.append(row | {"ms": why})
            return
        took = milliseconds(function, 4) / share
        rows.append(row | {"ms": took, "TFLOP/s": flops / took / 1e9})

    tile = case.gradient(candidates()[0], chunk)
    calls = {
        "fold": (lambda launch: case.fold(launch, 0), 1.0),
        "fold, kept": (lambda launch: case.fold(launch, ALL), 1.0),
        "gradient": (lambda launch: case.gradient(launch, chunk, tile), chunk / V),
    }
    for kind, (call, share) in calls.items():
        for launch in candidates():
            if kind in kinds(launch):
                add(kind, launch, partial(call, launch), share)
    first = candidates()[0]
    (logps, lse), (kept,) = case.fold(first, ALL)
    case.lse = lse
    for shape in KEPT_TILES:
        name = f"kept gradient {shape[0]} rows {shape[1]} warps"
        add(name, None, partial(case.kept_gradient, backend.Launches(first, first, *shape), kept), flops=0)
    d_logits = kept[0]
    if DEVICE == "cuda":
        total = torch.zeros(N, D, device=DEVICE)
        add("d hidden, whole", None, lambda: chunked._accumulate(total, d_logits, case.weight))
        add("d hidden, a chunk", None, lambda: chunked._accumulate(total, tile, case.weight[:chunk]), chunk / V)
        d_weight = torch.empty_like(case.weight)
        add("d weight, whole", None, lambda: torch.mm(d_logits.t(), case.hidden, out=d_weight))
        part = d_weight[:chunk]
        add("d weight, a chunk", None, lambda: torch.mm(tile.t(), case.hidden, out=part), chunk / V)
        with chunked._whole_sums():
            add("d weight, whole sums", None, lambda: torch.mm(d_logits.t(), case.hidden, out=d_weight))
    print("\nKernels; a launch is rows columns depth warps stages split group descriptors")
    print_table(rows)
    return rows


def print_table(rows) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    print("| " + " | ".join(names) + " |\n|" + " --- |" * len(names))
    for row in rows:
        print("| " + " | ".join(_shown(row.get(name, "")) for name in names) + " |")
    print(end="", flush=True)


def _shown(value) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if abs(value) < 0.05 else f"{value:.2f}"


def main(argv) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPE, metavar="N,D,V")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    shape = tuple(int(x) for x in args.shapes.split(","))
    if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
        parser.exit(2, "--gpu-check needs a GPU, or TRITON_INTERPRET=1 and small --shapes to see that it runs\n")
    start = time.time()
    paths = [(f"{kept} by {loads}", None) for kept in ("kept", "recomputed") for loads in ("descriptors", "pointers")]
    every = [(kind, launch) for launch in candidates() for kind in kinds(launch)]
    failed = compile_all([*paths, ("kept, statistics", None), ("kept gradient", candidates()[0]), *every])
    failed = {job: why for job, why in failed.items() if why}
    print(*(f"cannot {kind}: {why}" for (kind, launch), why in failed.items() if launch is None), sep="\n")
    laps = {"compiled": time.time() - start}
    report = {"environment": machine.environment(), "interpreted": triton.knobs.runtime.interpret}
    print(json.dumps(report["environment"]))
    report["errors"] = errors(tuple(min(a, b) for a, b in zip(ERROR_SHAPE, shape, strict=True)))
    laps["errors"] = time.time() - start
    data = inputs(shape, DEVICE, torch.bfloat16)
    report["contenders"] = contenders(data)
    laps["contenders"] = time.time() - start
    report["kernels"] = kernels(data, failed)
    laps["kernels"] = time.time() - start
    print(", ".join(f"{name} after {seconds:.0f} s" for name, seconds in laps.items()), f"({os.cpu_count()} cores)")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
