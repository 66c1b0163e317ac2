"""What the contenders of train_throughput.py have in common: the work to do, and the watch that cuts it into rounds."""

from __future__ import annotations

import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from dpo_ds.config import TrainConfig
from dpo_ds.data import PairDataset
from dpo_ds.data.batching import global_batches

BETA = 0.1


@dataclass(frozen=True)
class Workload:
    """What every contender does: the same pairs in the same global batches through the same model.

    tokens: folder of the tokenised pairs. micro_batch_tokens bounds our forward, TRL's is pairs_per_rank pairs.
    """

    model: str
    pairs: str
    tokens: str
    deepspeed: str
    folder: str
    ranks: int
    pairs_per_rank: int
    micro_batch_tokens: int
    learning_rate: float
    bf16: bool
    warm_up: int  # steps before the first round
    steps: int  # of a round
    rounds: int

    @property
    def global_batch_size(self) -> int:
        return self.ranks * self.pairs_per_rank

    @property
    def total_steps(self) -> int:
        return self.warm_up + self.rounds * self.steps

    def dataset(self) -> PairDataset:
        return PairDataset(Path(self.tokens), [1.0])

    def batches(self, data: PairDataset) -> list[np.ndarray]:
        """Rows of every step's global batch."""
        batches = global_batches(data.sources, 0, self.global_batch_size, first_step=1)
        return [rows for _, rows in itertools.islice(batches, self.total_steps)]

    @property
    def cache(self) -> str:
        """The folder of the reference's precomputed log-probs."""
        return f"{self.folder}/cache"

    def config(self, layout: str, reference: str) -> TrainConfig:
        return TrainConfig.model_validate(
            {
                "model": {"path": self.model},
                "data": {"train": self.pairs, "on_bad_row": "skip"},
                "loss": {"beta": BETA},
                "train": {
                    "layout": layout,
                    "global_batch_size": self.global_batch_size,
                    "micro_batch_tokens": self.micro_batch_tokens,
                    "learning_rate": self.learning_rate,
                    "schedule": "constant",
                    "max_steps": self.total_steps + 1,  # the end is stdin's to say
                },
                "deepspeed": {"config": self.deepspeed},
                "reference": {"kind": "cached", "cache": self.cache} if reference == "cached" else {},
                "output_dir": self.folder,
            }
        )


class Stopwatch:
    """Cuts training into rounds. Memory counts from where it is made: all is imported, no model is loaded yet."""

    def __init__(self, work: Workload, results: TextIO):
        self.steps, self.left, self.results = work.steps, work.warm_up, results
        self.start_bytes = resident_bytes("VmRSS")
        self._start()

    def step(self, metrics: dict) -> None:
        """To be called after every step; raises SystemExit when stdin has ended."""
        self.losses.append(metrics["loss"])
        self.left -= 1
        if self.left:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        report = {
            "seconds": time.perf_counter() - self.started,
            "cpu_seconds": time.process_time() - self.cpu_started,
            "memory_bytes": self.peak_bytes(),
            "losses": self.losses,
        }
        print(json.dumps(report), file=self.results, flush=True)
        if not sys.stdin.readline():
            raise SystemExit
        self.left = self.steps
        self.reset_peak()
        self._start()

    def _start(self) -> None:
        self.losses: list[float] = []
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def peak_bytes(self) -> int:
        """Most memory held in this round, beyond what the imports took."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return resident_bytes("VmHWM") - self.start_bytes

    def reset_peak(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here


def resident_bytes(key: str) -> int:
    """VmRSS: resident now; VmHWM: the most since the process began or the mark was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
