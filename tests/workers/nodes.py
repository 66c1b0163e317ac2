"""`dpo-ds` on a node with files of its own: main([COMMAND LINE, FOLDER]) sees this node's, $TESTS_NODE, as FOLDER."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess

from dpo_ds.commands import cli

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
