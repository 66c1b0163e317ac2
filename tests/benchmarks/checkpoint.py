"""What a checkpoint costs: the time a save blocks two ranks, against dd writing and fsyncing as many bytes there.

`python -m tests.benchmarks.checkpoint [FOLDER]`; the two alternate, so that both see the same disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from dpo_ds.demo.tiny import random_model, tiny_config
from tests.forkserver import fork_server
from tests.tiny import VOCAB

ROUNDS = 4


def main(folder: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch, fork_server() as forks:
        work = Path(scratch)
        model = random_model(tiny_config("llama", VOCAB, hidden=1024, layers=3, intermediate_size=4096))
        model.save_pretrained(work / "model")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        saves, plain = [], []
        for number in range(ROUNDS):
            argv = [work / "model", work / "out", work / "seconds.json", 2]
            codes, output = forks.run(argv, 2, work / "logs", module="tests.workers.save_time", timeout=600)
            assert codes == [0, 0], output
            blocked = json.loads((work / "seconds.json").read_text())
            (checkpoint,) = (work / "out" / "checkpoints").glob("step-*")
            size = sum(path.stat().st_size for path in checkpoint.iterdir())
            saves += blocked
            plain += [dd(work / "dd", size), dd(work / "dd", size)]
            print(f"round {number + 1}: {parameters / 1e6:.0f}M parameters, {size / 1e6:.0f} MB; saves ", end="")
            print(f"{blocked[0]:.2f} and {blocked[1]:.2f} s, dd {plain[-2]:.2f} and {plain[-1]:.2f} s", flush=True)
    blocks, takes = median(saves), median(plain)
    print(f"medians: a save blocks {blocks:.2f} s, dd takes {takes:.2f} s: {blocks / takes:.2f}")


def dd(path: Path, size: int) -> float:
    """Seconds to write and fsync `size` bytes."""
    os.sync()
    started = time.perf_counter()
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=16M", f"count={size}", "iflag=count_bytes", "conv=fsync"]
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.gettempdir())
