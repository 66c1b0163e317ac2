"""Measures what all ranks do together, then every pair of them, so that a slow link has a name; and the clocks."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from dpo_ds.cluster import collectives
from dpo_ds.commands.doctor.report import FAIL, PASS, WARN, Finding

COLLECTIVES, PAIRS, CLOCKS = "collectives", "pairs", "clocks"
BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}  # of a message
REPEATS, CALLS = 3, 20
SLOW = 1 / 3  # of the median pair's rate
MOST_RANKS = 64  # that all play each other; of more, one a host
DRIFT, SKEW = 0.5, 5.0  # seconds between hosts' clocks: worth a word, and too much
SLOW_LINK = "look at their link and cable, NCCL_SOCKET_IFNAME and NCCL_IB_HCA, or leave the node out until it is well"


def rounds(players: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Returns a tournament in which each meets each once and nobody plays twice in a round (the circle method):
    len(players) - 1 rounds, one more for an odd number.
    """
    ring: list[int | None] = [*players] + [None] * (len(players) % 2)
    found = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        pairs = zip(ring[:half], reversed(ring[half:]), strict=True)
        found.append([(a, b) for a, b in pairs if a is not None and b is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return found


def check_collectives(device: torch.device) -> list[Finding]:
    """All ranks enter."""
    ranks, size = collectives.world_size(), BYTES[device.type]
    if ranks == 1:
        return [Finding(COLLECTIVES, PASS, "one rank: nothing to measure")]
    values, one = torch.ones(size // 4, device=device), torch.ones(1, device=device)
    part = values[: len(values) // ranks]
    latency = _seconds(lambda: collectives.reduce_sum(one), device, CALLS)
    reduce = _seconds(lambda: collectives.reduce_sum(values), device, REPEATS)
    gather = _seconds(lambda: collectives.gather_equal(part), device, REPEATS)
    moved = size * (ranks - 1) / ranks  # over each rank's link; twice that where the sum is spread, too
    figures = {
        "latency_seconds": latency,
        "all_reduce_bytes_per_second": 2 * moved / reduce,
        "all_gather_bytes_per_second": moved / gather,
    }
    text = f"all-reduce {_rate(2 * moved / reduce)}, all-gather {_rate(moved / gather)}, latency {1e6 * latency:.0f} µs"
    return [Finding(COLLECTIVES, PASS, f"{ranks} ranks, {size >> 20} MiB: {text}", figures=figures)]


def check_pairs(device: torch.device) -> list[Finding]:
    """All ranks enter; each measures the pairs that it is in."""
    hosts = collectives.gather_objects(socket.gethostname())
    players = list(range(len(hosts)))
    if len(players) > MOST_RANKS:
        players = [hosts.index(host) for host in dict.fromkeys(hosts)]
    size, rank, mine = BYTES[device.type], collectives.rank(), {}
    values = torch.ones(size // 4, device=device)
    for pairs in rounds(players):
        for pair in pairs:
            if rank in pair:
                partner = pair[1 - pair.index(rank)]
                collectives.swap(values, partner)  # connects
                swap = partial(collectives.swap, values, partner)
                mine[pair] = size / min(_once(swap, device) for _ in range(REPEATS))
        collectives.barrier()
    rates: dict[tuple[int, int], float] = {}
    for found in collectives.gather_objects(mine):
        for pair, rate in found.items():
            rates[pair] = min(rate, rates.get(pair, rate))
    return judge_pairs(rates, hosts)


def judge_pairs(rates: Mapping[tuple[int, int], float], hosts: Sequence[str]) -> list[Finding]:
    """Names pairs far slower than others of their kind: within a host, or between two. rates: bytes per second."""
    findings = []
    for kind, is_within in (("within a host", True), ("between hosts", False)):
        found = {pair: rate for pair, rate in rates.items() if (hosts[pair[0]] == hosts[pair[1]]) == is_within}
        if not found:
            continue
        median = statistics.median(found.values())
        slow = sorted((rate, pair) for pair, rate in found.items() if rate < SLOW * median)
        figures = {f"{a}-{b}": rate for (a, b), rate in found.items()} if len(found) <= 2016 else {}
        for rate, (a, b) in slow[:4]:
            names = f"rank {a} ({hosts[a]}) and rank {b} ({hosts[b]})"
            text = f"{names}: {_rate(rate)}, the median {kind} is {_rate(median)}"
            more = f"; {len(slow)} pairs are slow" if len(slow) > 1 else ""
            findings.append(Finding(PAIRS, FAIL, f"{text}{more}", SLOW_LINK, figures))
        if not slow:
            text = f"{len(found)} {kind}: {_rate(min(found.values()))} to {_rate(max(found.values()))} each way"
            findings.append(Finding(PAIRS, PASS, text, figures=figures))
    return findings or [Finding(PAIRS, PASS, "one rank: nothing to measure")]


def check_clocks() -> list[Finding]:
    """All ranks enter. Ranks leave a barrier within milliseconds of each other, so that the least of three differences
    is the clocks'.
    """
    samples = []
    for _ in range(3):
        collectives.barrier()
        samples.append(collectives.gather_objects(now()))
    middles = [statistics.median(times) for times in samples]
    ranks = range(collectives.world_size())
    offsets = [min((s[r] - m for s, m in zip(samples, middles, strict=True)), key=abs) for r in ranks]
    return judge_clocks(offsets, collectives.gather_objects(socket.gethostname()))


def now() -> float:
    """Returns this host's time of day, seconds since 1970."""
    return time.time()


def judge_clocks(offsets: Sequence[float], hosts: Sequence[str]) -> list[Finding]:
    """offsets: seconds by which each rank's clock is ahead of the median."""
    spread = max(offsets) - min(offsets)
    worst = max(range(len(offsets)), key=lambda rank: abs(offsets[rank]))
    if spread <= DRIFT:
        return [Finding(CLOCKS, PASS, f"within {spread:.3f} s of each other", figures={"spread_seconds": spread})]
    text = f"{hosts[worst]} (rank {worst}) is {offsets[worst]:+.1f} s from the median, {spread:.1f} s between the ends"
    verdict = FAIL if spread > SKEW else WARN
    remedy = "start chrony or ntpd there: times in logs, file times on a shared disk and Slurm's end time disagree"
    return [Finding(CLOCKS, verdict, text, remedy, {"spread_seconds": spread})]


def _seconds(call: Callable, device: torch.device, count: int) -> float:
    """Returns the median over `count` calls of what the slowest rank needs."""
    call()
    return collectives.reduce_max(statistics.median(_once(call, device) for _ in range(count)), device)


def _once(call: Callable, device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.2f} GB/s"
