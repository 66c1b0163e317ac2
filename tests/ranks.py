"""Starts real ranks: one process each, gloo, one thread, a free port."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dpo_ds.cluster.launch import free_port

ROOT = Path(__file__).parent.parent
WORKERS = ROOT / "tests" / "workers"


def start_ranks(command: list[str], ranks: int, folder: Path, **env: str) -> list[subprocess.Popen]:
    """`command` once a rank as a launcher would start it; output goes to folder/rank-N.log."""
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (folder / f"rank-{rank}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(command, env=os.environ | place | env, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
            )
    return processes


def run_ranks(command: list[str], ranks: int, folder: Path, timeout: float = 240, **env: str) -> list[int]:
    """Exit codes of all ranks; the ones still running `timeout` seconds later are killed (exit code -9)."""
    processes = start_ranks(command, ranks, folder, **env)
    try:
        for process in processes:
            process.wait(timeout)
    finally:
        for process in processes:
            process.kill()
    return [process.wait() for process in processes]


def run_worker(name: str, ranks: int, folder: Path, *args: str, timeout: float = 240, **env: str) -> None:
    """tests/workers/NAME on every rank; fails with the logs when a rank does."""
    codes = run_ranks([sys.executable, str(WORKERS / name), *args], ranks, folder, timeout, **env)
    logs = "\n".join(
        f"--- rank {r}, exit code {c}\n{(folder / f'rank-{r}.log').read_text()[-1500:]}" for r, c in enumerate(codes)
    )
    assert codes == [0] * ranks, logs
