"""Runs `dpo-ds train` once per case in one process: usage mistakes.py CASES.json OUT.json.

CASES: {name: argv}. OUT: {name: [exit code, stderr]} and "deepspeed imported".
"""

import contextlib
import io
import json
import sys
from pathlib import Path

from dpo_ds.commands.cli import main


def outcome(argv: list[str]) -> tuple[int, str]:
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        code = main(argv)
    return code, stderr.getvalue()


if __name__ == "__main__":
    cases, out = map(Path, sys.argv[1:])
    results = {name: outcome(argv) for name, argv in json.loads(cases.read_text()).items()}
    out.write_text(json.dumps(results | {"deepspeed imported": "deepspeed" in sys.modules}))
