"""Packed attention on one GPU, in a minute: is it right in models of six families, and is copying or merging faster?

    python tests/benchmarks/attention.py [--small]

1. Models of random weights in bf16: the sums of log-probs and their gradients through packed attention, the prompts
   copied and merged, against fp32 eager attention on padded rows; beside it what bf16 eager attention errs by.
2. One layer's attention, forward and backward, of packs of some 16k tokens (32 query heads and 8 key heads of 128),
   by each kernel that can be used: the prompt's keys copied before rejected, merged by log-sums, and, for what sharing
   the prompt is worth, computed twice. The thresholds in dpo_ds/models/packed/segments.py are read off this table.
--small: a miniature, also without a GPU; there is nothing to time then.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, PretrainedConfig  # noqa: E402

from dpo_ds.batch import Batch, Group, Segment, packed_batch, padded_batch  # noqa: E402
from dpo_ds.demo.tiny import tiny_config  # noqa: E402
from dpo_ds.errors import first_line  # noqa: E402
from dpo_ds.models.attention import packed_refusal  # noqa: E402
from dpo_ds.models.causal_lm import LogProbModel  # noqa: E402
from dpo_ds.models.packed import backends, segments  # noqa: E402
from dpo_ds.models.packed.kernels import is_installed  # noqa: E402
from dpo_ds.models.packed.probe import probe_attention  # noqa: E402
from dpo_ds.models.packed.sdpa import ScoreRule  # noqa: E402
from dpo_ds.models.packed.segments import SegmentTable  # noqa: E402
from dpo_ds.models.packed.varlen import varlen_attention  # noqa: E402
from tests.benchmarks import machine  # noqa: E402

DEVICE = torch.device("cuda", 0) if machine.HAS_GPU else torch.device("cpu")
VOCABULARY = 512
FAMILIES = [
    ("llama", {"hidden": 256}),
    ("llama", {"hidden": 512}),
    ("qwen3", {"hidden": 256, "head_dim": 128}),
    ("mistral", {"hidden": 256}),  # a window of 64
    ("gemma2", {"hidden": 256, "head_dim": 64, "query_pre_attn_scalar": 64}),  # a window and a soft-cap
    ("gpt2", {"hidden": 256}),  # heads of its own keys
]
PAIRS = ((1, 5, 9), (40, 1, 1), (17, 60, 33), (120, 25, 80), (3, 130, 2))  # prompt, chosen, rejected
HEADS, KEY_HEADS, WIDTH = 32, 8, 128
# Tokens of prompt and of each completion, pairs in the pack.
CASES = [
    (100, 30, 100),
    (400, 400, 14),
    (512, 128, 21),
    (2048, 64, 8),
    (2048, 512, 5),
    (2048, 2048, 3),
    (8192, 1024, 2),
]


# 1. Is it right?


def check(families: list) -> bool:
    print("\n| model | kernels | keys | sums off by | bf16 eager's | gradients off by | bf16 eager's |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    passed = True
    for family, changes in families:
        config = tiny_config(family, VOCABULARY, layers=3, **changes)
        for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
        try:
            passed &= check_family(f"{family}, width {changes['hidden']}", config)
        except Exception:  # the others' lines are worth having
            traceback.print_exc()
            print(f"| {family} | failed | | | | | |", flush=True)
            passed = False
    for line in backends.refused_backends():
        print(line)
    return passed


def check_family(name: str, config: PretrainedConfig) -> bool:
    exact = model(config, torch.float32)
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16().float()
    weights = exact.causal_lm.state_dict()
    ours, eager = (model(config, torch.bfloat16, weights) for _ in range(2))
    refusal = packed_refusal(ours.causal_lm, lambda batch: ours(batch.to(DEVICE)))
    assert refusal is None, refusal
    pairs = random_pairs()
    padded, packed = padded_batch(pairs).to(DEVICE), packed_batch(pairs).to(DEVICE)
    sums, gradients = results(exact, padded)
    eager_sums, eager_gradients = results(eager, padded)
    yardstick = (eager_sums - sums).abs().max().item(), relative(eager_gradients, gradients)
    passed = True
    for keys, every_pair in (("copied", False), ("merged", True)):
        with merging(every_pair), probe_attention() as probe:
            our_sums, our_gradients = results(ours, packed)
        errors = (our_sums - sums).abs().max().item(), relative(our_gradients, gradients)
        # Both err by bf16's rounding: twice the yardstick, and 0.5 nats on sums of some 300, are far from a mistake's.
        right = errors[0] <= 2 * yardstick[0] + 0.5 and errors[1] <= 2 * yardstick[1] + 1e-3 and not probe.refusals
        passed &= right
        print(
            f"| {name} | {', '.join(sorted(set(probe.backends)))} | {keys}{'' if right else ', WRONG'} "
            f"| {errors[0]:.3f} | {yardstick[0]:.3f} | {errors[1]:.1e} | {yardstick[1]:.1e} |",
            flush=True,
        )
    return passed


def model(config: PretrainedConfig, dtype: torch.dtype, weights: dict | None = None) -> LogProbModel:
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="eager")
    if weights:
        causal_lm.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()})
    return LogProbModel(causal_lm).to(DEVICE)


def random_pairs() -> list[Group]:
    rng = np.random.default_rng(0)
    drawn = [[rng.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths] for lengths in PAIRS]
    return [Group.pair(p, c, r, np.ones(len(c), bool), np.ones(len(r), bool)) for p, c, r in drawn]


def results(model: LogProbModel, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Sums of log-probs of every completion, and the gradients of their sum by every parameter."""
    logps = batch.pair_logps(model(batch))
    sums = torch.cat([logps.chosen, logps.rejected])
    return sums.detach(), torch.autograd.grad(sums.sum(), list(model.parameters()))


def relative(gradients: list[Tensor], exact: list[Tensor]) -> float:
    error = sum((x.float() - y).square().sum() for x, y in zip(gradients, exact, strict=True))
    return (error / sum(y.square().sum() for y in exact)).sqrt().item()


@contextmanager
def merging(every_pair: bool):
    """Every pair merged, or none, whatever its lengths."""
    by_length = segments.is_merged
    segments.is_merged = lambda segment: every_pair
    segments.forget_tables()
    try:
        yield
    finally:
        segments.is_merged = by_length
        segments.forget_tables()


# 2. How fast?


def measure(cases: list[tuple[int, int, int]], dtype=torch.bfloat16) -> bool:
    """A line a case and kernel, ms of forward and backward: on the GPU, and until the host has issued them."""
    print(
        f"\nforward and backward of {HEADS} heads, {KEY_HEADS} key heads, width {WIDTH}; ms (ms of the host); MiB more"
    )
    print("| prompt, completions, pairs | kernel | copied | merged | prompt twice | merged/copied | by length |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |", flush=True)
    passed = True
    for kernel in usable_kernels(dtype):
        for prompt, completion, pairs in cases:
            shared = table_of_pairs([(prompt, completion, completion)] * pairs)
            twice = table_of_pairs([(prompt, completion, 0)] * (2 * pairs))
            how = "merged" if segments.is_merged(shared.segments[0]) else "copied"
            cells, times = [], []
            for table, merge in ((shared, False), (shared, True), (twice, None)):
                try:
                    found = timed(step(kernel, table, merge, dtype))
                    times.append(found[0])
                    cells.append(f"{found[0]:.2f} ({found[1]:.2f}); {found[2]:.0f}")
                except Exception as error:  # the others' figures are worth having
                    traceback.print_exc()
                    cells.append(f"{type(error).__name__}: {first_line(error)}")
                    passed = False
            ratio = f"{times[1] / times[0]:.2f}" if len(times) == 3 else "-"
            line = [f"{prompt}, {completion}, {pairs}", kernel, *cells, ratio, how]
            print(f"| {' | '.join(line)} |", flush=True)
    return passed


def usable_kernels(dtype: torch.dtype) -> list[str]:
    """Those that the choice offers on this device, each by itself; why one is left out is said."""
    found = []
    for kernel in backends._candidates(DEVICE, dtype, WIDTH, WIDTH, False):
        try:
            reason = "not installed"
            if is_installed(kernel):
                reason = backends._trial(kernel, DEVICE, dtype, HEADS, KEY_HEADS, WIDTH, ScoreRule(WIDTH**-0.5))
        except Exception as error:
            reason = first_line(error)
        if reason is None:
            found.append(kernel)
        else:
            print(f"{kernel}: {reason}", flush=True)
    return found


def table_of_pairs(lengths: list[tuple[int, int, int]]) -> SegmentTable:
    pairs, start = [], 0
    for pair in lengths:
        pairs.append(Segment(start, pair[0], tuple(pair[1:])))
        start = pairs[-1].end
    return SegmentTable(tuple(pairs))


def step(kernel: str, table: SegmentTable, merge: bool | None, dtype: torch.dtype) -> Callable[[], object]:
    """Queries, keys and values lie in memory as models have them, [1, T, heads, width] transposed."""
    inputs = [
        torch.randn(1, table.length, heads, WIDTH, device=DEVICE, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    grad = torch.randn(1, table.length, HEADS, WIDTH, device=DEVICE, dtype=dtype)
    rule = ScoreRule(WIDTH**-0.5)
    return lambda: torch.autograd.grad(varlen_attention(kernel, *inputs, table, rule, merge), inputs, grad)


def timed(function: Callable[[], object], rounds: int = 12) -> tuple[float, float, float]:
    """Median ms on the GPU, median ms of the host, peak of memory over the inputs in MiB."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    host = []
    for begin, end in events:
        begin.record()
        started = time.perf_counter()
        function()
        host.append(1e3 * (time.perf_counter() - started))
        end.record()
    torch.cuda.synchronize()
    gpu = statistics.median(begin.elapsed_time(end) for begin, end in events)
    return gpu, statistics.median(host), (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    started = time.monotonic()
    print(", ".join(f"{name} {value}" for name, value in machine.environment().items() if value))
    passed = check(FAMILIES[:1] if options.small else FAMILIES)
    print(f"\n{time.monotonic() - started:.0f} s", flush=True)
    if machine.HAS_GPU:
        passed &= measure([(100, 30, 2)] if options.small else CASES)
        print(f"\n{time.monotonic() - started:.0f} s", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
