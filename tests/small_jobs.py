"""A training job small enough to be run many times: its files, its command line, and what it leaves behind."""

from __future__ import annotations

import json
import time
from pathlib import Path

from dpo_ds.demo.corpus import preference_rows, write_jsonl
from dpo_ds.demo.tiny import save_tiny_model, tiny_llama, train_tokenizer
from tests.ranks import ROOT

EXACT = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm", "learning_rate", "tokens")


def make_world(folder: Path, hidden: int = 32, layers: int = 2) -> Path:
    """`folder` with 50 pairs to train on, 20 to evaluate on, and a model of random weights."""
    rows = list(preference_rows(70, seed=1))
    write_jsonl(folder / "train.jsonl", rows[:50])
    write_jsonl(folder / "eval.jsonl", rows[50:])
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], vocab_size=300)
    save_tiny_model(folder / "model", tokenizer, tiny_llama(tokenizer, hidden=hidden, layers=layers))
    return folder


def train_command(world: Path, out: str, command: str = "train", **settings) -> list[str]:
    """`train ...` (or another command) into world/out; settings are keys with __ for the dot."""
    keys = {
        "model.path": world / "model", "data.train": world / "train.jsonl",
        "deepspeed.config": ROOT / "ds_configs/zero3_cpu.json", "train.global_batch_size": 8,
        "train.micro_batch_tokens": 600, "train.learning_rate": 1e-3, "train.schedule": "constant",
        "output_dir": world / out,
    }  # fmt: skip
    keys |= {name.replace("__", "."): value for name, value in settings.items()}
    return [command, *(text for key, value in keys.items() for text in (f"--{key}", str(value)))]


def run(forks, world: Path, out: str, ranks: int = 2, env: dict | None = None, **settings) -> tuple[list[int], str]:
    """Exit codes and output of the job."""
    command = train_command(world, out, **settings)
    return forks.run(command, ranks, world / f"{out}.logs", DPO_DS_CACHE=str(world / "cache"), **(env or {}))


def start(forks, world: Path, out: str, ranks: int = 2, env: dict | None = None, only=None, **settings):
    command = train_command(world, out, **settings)
    return forks.start(
        command, ranks, world / f"{out}.logs", only=only, DPO_DS_CACHE=str(world / "cache"), **(env or {})
    )


def steps(folder: Path) -> list[dict]:
    """The lines of training steps in metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def exact(folder: Path) -> list[list]:
    """What must be equal to the last bit between two runs of the same job."""
    return [[line[key] for key in ("step", *EXACT)] for line in steps(folder)]


def weights(folder: Path) -> bytes:
    return (folder / "final" / "model.safetensors").read_bytes()


def status(folder: Path) -> dict:
    return json.loads((folder / "STATUS.json").read_text())


def wait_for_step(folder: Path, step: int, seconds: float = 90) -> None:
    """Until metrics.jsonl has a line of this step."""
    deadline = time.monotonic() + seconds
    log = folder / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= step):
        assert time.monotonic() < deadline, f"{log} did not come to step {step}"
        time.sleep(0.02)


def wait_for(path: Path, seconds: float = 90) -> None:
    """Until it is there."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.002)
