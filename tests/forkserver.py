"""Real ranks without the ten seconds that importing torch and deepspeed takes: one process imports, and ranks fork it.

`python -m tests.forkserver` reads jobs from stdin, a JSON object a line, and answers with the ranks' pids, then with
their exit codes. The ranks share nothing but what was imported.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

from dpo_ds.__main__ import end
from dpo_ds.cluster.launch import free_port
from tests.ranks import ROOT

IMPORTS = """
    deepspeed transformers.integrations transformers.models.llama.modeling_llama torch.utils.tensorboard peft
    dpo_ds.commands.cli dpo_ds.commands.train dpo_ds.commands.precompute dpo_ds.commands.sample.command
    dpo_ds.commands.evaluate.command dpo_ds.commands.evaluate.plots dpo_ds.models.export dpo_ds.checkpoint.shards
    dpo_ds.training.trainer dpo_ds.reference.live dpo_ds.reference.adapter dpo_ds.commands.rl.command
    dpo_ds.training.rl.trainer
""".split() + """
    deepspeed.module_inject.auto_ep_layer deepspeed.runtime.zero.muon.original_muon deepspeed.ops.op_builder.all_ops
    torch._functorch.aot_autograd torch._inductor.codecache networkx
""".split()  # what the first ones import at their first use


@dataclass(frozen=True)
class Ranks:
    """A job under way: the ranks' pids, and after `codes` their output."""

    server: subprocess.Popen
    pids: list[int]
    folder: Path
    timeout: float

    def codes(self) -> list[int]:
        """Exit codes of all ranks, -N for signal N; those still running after the timeout are killed."""
        timer = Timer(self.timeout, self.kill)
        timer.start()
        answer = self.server.stdout.readline()
        timer.cancel()
        return json.loads(answer)

    def kill(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def output(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("rank-*.log")))


class ForkServer:
    """`start(argv, ranks, folder)` runs `dpo-ds ARGV` (or main(*ARGV) of another module) on so many ranks."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def start(
        self, argv: list[str], ranks: int, folder: Path, *, module: str = "dpo_ds.commands.cli", timeout: float = 120,
        only: dict[int, dict[str, str]] | None = None, finalize: bool = False, **env: str,
    ) -> Ranks:  # fmt: skip
        """only: environment of single ranks, beside `env` of all of them. finalize: ranks end as programs do.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("rank-*.log"):
            old.unlink()
        port = str(free_port())
        places = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            place["LOCAL_WORLD_SIZE"] = max(ranks, os.cpu_count())  # one thread a rank
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | env | (only or {}).get(rank, {})
            places.append({name: str(value) for name, value in place.items()})
        job = {"module": module, "argv": list(map(str, argv)), "places": places, "folder": str(folder)}
        job["finalize"] = finalize
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Ranks(self._process, json.loads(self._process.stdout.readline()), folder, timeout)

    def run(self, *args, **kwargs) -> tuple[list[int], str]:
        """Exit codes and all output of a job."""
        ranks = self.start(*args, **kwargs)
        return ranks.codes(), ranks.output()


@contextlib.contextmanager
def fork_server() -> Iterator[ForkServer]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forkserver"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    with process:
        yield ForkServer(process)
        process.stdin.close()


def _fork(job: dict, place: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(place)
        os.close(0)
        log = os.open(f"{job['folder']}/rank-{place['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        main = importlib.import_module(job["module"]).main
        code = main(job["argv"]) if job["module"] == "dpo_ds.commands.cli" else main(*job["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if not job["finalize"]:
            os._exit(code or 0)
    end(code or 0)


def serve() -> None:
    for name in IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        pids = [_fork(job, place) for place in job["places"]]
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    serve()
