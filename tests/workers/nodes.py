"""`dpo-ds` on a node with files of its own: main([COMMAND LINE, FOLDER]) sees this node's, $TESTS_NODE, as FOLDER."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from pathlib import Path

from safetensors.numpy import load_file, save_file

from dpo_ds.commands import cli
from dpo_ds.demo.corpus import write_jsonl

CLONE_NEWNS = 0x20000


def main(job: str) -> int:
    command, folder = json.loads(job)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        print("no mounts here")
        return 99
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", os.environ["TESTS_NODE"], folder], check=True)
    os.environ["DPO_DS_CACHE"] = f"{folder}/cache"
    if os.environ.get("TESTS_SEED"):
        command += ["--train.seed", os.environ["TESTS_SEED"]]
    return cli.main(command)


def change(other: Path, what: str) -> None:
    """Makes the second node's copy another in one respect."""
    rows = [json.loads(line) for line in (other / "train.jsonl").read_text().splitlines()]
    if what == "texts":
        rows[7]["chosen"], rows[7]["rejected"] = rows[7]["rejected"], rows[7]["chosen"]
    if what == "rows":
        rows = rows[:-1]
    write_jsonl(other / "train.jsonl", rows)
    if what == "weights":
        file = other / "model" / "model.safetensors"
        weights = load_file(file)
        name = next(iter(weights))
        weights[name] = -weights[name]
        save_file(weights, file, metadata={"format": "pt"})
    if what == "tokenizer":
        file = other / "model" / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        settings["chat_template"] = "{{ messages }}"
        file.write_text(json.dumps(settings))
