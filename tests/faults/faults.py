"""The ways to break a job; each breaks it, resumes it, checks it, and says what happened in a line."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from dpo_ds.checkpoint import faultpoints
from dpo_ds.cluster.launch import free_port
from tests.ranks import ROOT
from tests.small_jobs import exact, run, start, status, train_command, wait_for, wait_for_step, weights
from tests.workers.nodes import change

STEPS, EVERY = 12, 2
KEYS = {"train__max_steps": STEPS, "checkpoint__every": EVERY}
ON_EVERY_RANK = ("save-begun", "shard-half-written", "still-writing", "shards-written")
SLOW = {faultpoints.SLOW_DISK: "0.005"}  # a save has some 140 pieces a rank: it lasts two or three steps
NOT_TRIED = "not tried"  # in the outcome of a fault that could not be brought about
SMALL_DISK = "400k"  # a checkpoint has 250 KB


class Broken(Exception):
    """The job did not come through as it must."""


class Job:
    """One training job: how it ends when nothing happens, and how to run it again elsewhere."""

    def __init__(self, forks, world: Path):
        self.forks, self.world = forks, world

    def run_whole(self) -> None:
        codes, output = run(self.forks, self.world, "whole", **KEYS, checkpoint__keep=99)
        check(codes == [0, 0], f"the undisturbed run failed: {codes}\n{output}")
        self.metrics, self.weights = exact(self.world / "whole"), weights(self.world / "whole")

    def copy_at(self, out: str, step: int) -> Path:
        """`out` becomes what the whole run was when it died right after saving `step`; returns its checkpoints."""
        shutil.copytree(self.world / "whole", self.world / out, ignore=shutil.ignore_patterns("final", "tensorboard"))
        folder = self.world / out / "checkpoints"
        for path in folder.glob("step-*"):
            if not step - EVERY <= int(path.name[5:]) <= step:
                shutil.rmtree(path)
        (folder / "latest").write_text(f"step-{step:08d}\n")
        return folder

    def resume(self, out: str) -> str:
        """Runs to the end; its output, if all is bit-equal to the undisturbed run."""
        codes, output = run(self.forks, self.world, out, **KEYS)
        check(codes == [0, 0], f"resuming ended with {codes}\n{output}")
        check(exact(self.world / out) == self.metrics, f"other metrics\n{output}")
        check(weights(self.world / out) == self.weights, f"other weights\n{output}")
        left = sorted(path.name for path in (self.world / out / "checkpoints").glob("*.tmp"))
        check(not left, f"left behind: {left}")
        return output


def killed_inside_a_save(job: Job, out: str, rng: random.Random) -> str:
    """SIGKILL of one rank between two instructions of a save, most of which training does not wait for."""
    point = rng.choice([point for point in faultpoints.POINTS if point != "still-writing"])
    return _killed_at(job, out, rng, point)


def killed_beside_a_save(job: Job, out: str, rng: random.Random) -> str:
    """SIGKILL of one rank between two steps while a disk, made slow, still takes the shards of a step before."""
    return _killed_at(job, out, rng, "still-writing", SLOW)


def _killed_at(job: Job, out: str, rng: random.Random, point: str, env: dict | None = None) -> str:
    rank = rng.randrange(2) if point in ON_EVERY_RANK else 0
    arrivals = {"old-half-deleted": STEPS // EVERY - 2, "shard-half-written": 800}.get(point, STEPS // EVERY)
    fault = f"{point}:{rng.randint(1, arrivals)}"
    ranks = start(job.forks, job.world, out, **KEYS, env=env, only={rank: {faultpoints.VARIABLE: fault}})
    return f"rank {rank} at {fault}; {_died_and_resumed(job, out, ranks, [rank])}"


def killed_at_a_random_moment(job: Job, out: str, rng: random.Random) -> str:
    """SIGKILL of one rank or both, some time after some step; the disk as it is, or so slow that saves overlap it."""
    step, delay, victims = rng.randint(1, STEPS - 1), rng.uniform(0, 0.3), rng.choice([[0], [1], [0, 1]])
    ranks = start(job.forks, job.world, out, **KEYS, env=rng.choice([None, SLOW]))
    wait_for_step(job.world / out, step)
    time.sleep(delay)
    for rank in victims:
        with contextlib.suppress(ProcessLookupError):  # the run has ended
            os.kill(ranks.pids[rank], signal.SIGKILL)
    return f"ranks {victims} {delay:.2f} s after step {step}; {_died_and_resumed(job, out, ranks, victims)}"


def damaged_on_disk(job: Job, out: str, rng: random.Random) -> str:
    """A file of the newest checkpoint is cut, flipped in a bit or gone: the one before is taken, and a line says so."""
    step = rng.choice([4, 6, 8])
    folder = job.copy_at(out, step)
    what = _damage(folder / f"step-{step:08d}", rng)
    output = job.resume(out)
    check("trying the one before" in output and f"step-{step:08d}" in output, f"no line on {what}\n{output}")
    check(
        f"resumed from {folder}/step-{step - EVERY:08d}" in output, f"{what}: not resumed from the one before\n{output}"
    )
    return f"{what}; resumed from step {step - EVERY}"


def all_damaged(job: Job, out: str, rng: random.Random) -> str:
    """Nothing complete is left: refused with exit code 2 in one line, and nothing is touched."""
    folder = job.copy_at(out, 4)
    what = [_damage(path, rng) for path in sorted(folder.glob("step-*"))]
    before = (job.world / out / "metrics.jsonl").read_bytes()
    codes, output = run(job.forks, job.world, out, **KEYS)
    check(codes == [2, 2], f"{what} ended with {codes}\n{output}")
    check("no complete checkpoint is left" in output and "Traceback" not in output, f"{what}\n{output}")
    check((job.world / out / "metrics.jsonl").read_bytes() == before, "metrics.jsonl was touched")
    return f"{what}; refused"


def stale_pointer(job: Job, out: str, rng: random.Random) -> str:
    """`latest` names another checkpoint, or none, or is gone: the newest complete one is taken."""
    folder = job.copy_at(out, 8)
    text = rng.choice(["step-00000006\n", "step-00000099\n", "", None])
    if text is None:
        (folder / "latest").unlink()
    else:
        (folder / "latest").write_text(text)
    output = job.resume(out)
    check(f"resumed from {folder}/step-00000008" in output, f"latest is {text!r}\n{output}")
    check(text is None or "the newest complete one" in output, f"no line on the pointer\n{output}")
    return f"latest {text!r}; resumed from step 8"


def disk_full(job: Job, out: str, rng: random.Random) -> str:
    """A file system that holds one checkpoint and no second: told, training goes on, then a rank dies."""
    disk = job.world / out / "checkpoints"
    disk.mkdir(parents=True)
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", disk], capture_output=True, text=True
    )
    if mount.returncode:
        return f"{NOT_TRIED}: {mount.stderr.strip()}"
    try:
        ranks = start(job.forks, job.world, out, **KEYS)
        wait_for_step(job.world / out, rng.randint(6, STEPS - 1))
        os.kill(ranks.pids[1], signal.SIGKILL)
        codes, output = ranks.codes(), ranks.output()
        check("checkpoint of step 4 NOT saved" in output, f"no line on the full disk ({codes})\n{output}")
        check((disk / "step-00000002" / "MANIFEST.json").is_file(), "the checkpoint that was there is gone")
        job.resume(out)
        return "checkpoint of step 2 kept; resumed from step 2"
    finally:
        subprocess.run(["umount", disk], check=True)


def disk_filled_beside(job: Job, out: str, rng: random.Random) -> str:
    """Others fill the disk while the shards of a step are written: told at a later step, and the one before stays."""
    disk = job.world / out / "checkpoints"
    disk.mkdir(parents=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        return f"{NOT_TRIED}: {mount.stderr.strip()}"
    try:
        step = rng.choice([4, 6, 8])
        ranks = start(job.forks, job.world, out, **KEYS, env=SLOW)
        wait_for(disk / f"step-{step:08d}.tmp" / "zero_pp_rank_1_mp_rank_00_model_states.pt")
        subprocess.run(["dd", "if=/dev/zero", f"of={disk}/others", "bs=64k"], capture_output=True)
        codes, output = ranks.codes(), ranks.output()
        check(codes == [0, 0], f"ended with {codes}\n{output}")
        line = f"checkpoint of step {step} NOT saved: rank "
        check(line in output and f"that of step {step - EVERY} stays" in output, f"no line {line!r}\n{output}")
        check(weights(job.world / out) == job.weights, f"other weights\n{output}")
        (disk / "others").unlink()
        for name in ("final", "STATUS.json"):  # as if it had died then
            path = job.world / out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        check(f"step-{step - EVERY:08d}" in job.resume(out), f"not resumed from step {step - EVERY}")
        return f"while step {step} was written; told, resumed from step {step - EVERY}"
    finally:
        subprocess.run(["umount", disk], check=True)


def two_jobs_in_a_folder(job: Job, out: str, rng: random.Random) -> str:
    """A second job is refused while the first is at work, even where that stands still, and changes nothing."""
    ranks = start(job.forks, job.world, out, **KEYS)
    wait_for_step(job.world / out, rng.randint(1, STEPS - 4))
    for pid in ranks.pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        command = [sys.executable, "-m", "dpo_ds", *train_command(job.world, out, **KEYS)]
        env = os.environ | {"DPO_DS_CACHE": str(job.world / "cache"), "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    finally:
        for pid in ranks.pids:
            os.kill(pid, signal.SIGCONT)
    codes, output = ranks.codes(), ranks.output()
    check(second.returncode == 2, f"the second job ended with {second.returncode}\n{second.stderr}")
    check(f"process {ranks.pids[0]} on " in second.stderr, f"the first job is not named\n{second.stderr}")
    check(codes == [0, 0], f"the first job ended with {codes}\n{output}")
    _is_undisturbed(job, out, output)
    return "the second refused, the first bit-equal"


def suspended(job: Job, out: str, rng: random.Random) -> str:
    """All ranks stand still for longer than one of them may be silent, or no rank may get on."""
    env = {"DPO_DS_PEER_SECONDS": "2", "DPO_DS_HANG_SECONDS": "4"}
    ranks = start(job.forks, job.world, out, env=env, **KEYS)
    step, seconds = rng.randint(1, STEPS - 2), rng.uniform(5, 8)
    wait_for_step(job.world / out, step)
    for pid in ranks.pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in rng.sample(ranks.pids, len(ranks.pids)):
        os.kill(pid, signal.SIGCONT)
        time.sleep(rng.uniform(0, 0.5))
    codes, output = ranks.codes(), ranks.output()
    check(codes == [0, 0], f"ended with {codes}\n{output}")
    _is_undisturbed(job, out, output)
    return f"{seconds:.1f} s after step {step}; bit-equal"


def nobody_reads(job: Job, out: str, rng: random.Random) -> str:
    """Standard output and error lead into a closed pipe or onto a full disk."""
    where = rng.choice(["pipe", "full"])
    command, logs = json.dumps(train_command(job.world, out, **KEYS)), job.world / f"{out}.logs"
    cache = {"DPO_DS_CACHE": str(job.world / "cache")}
    codes, output = job.forks.run([command, where], 2, logs, module="tests.workers.mute", **cache)
    check(codes == [0, 0], f"{where}: ended with {codes}\n{output}")
    _is_undisturbed(job, out, output)
    return f"{where}; bit-equal"


def strangers_on_ports(job: Job, out: str, rng: random.Random) -> str:
    """Somebody else's programs speak on the ports where rank 0 listens for the others."""
    port = free_port()
    ranks = start(job.forks, job.world, out, env={"MASTER_PORT": str(port)}, **KEYS)
    wait_for_step(job.world / out, 1)
    listening = {c.laddr.port for c in psutil.Process(ranks.pids[0]).net_connections("tcp") if c.status == "LISTEN"}
    held, spoken = [], 0
    for number in sorted(listening):
        for _ in range(rng.randint(1, 20)):
            with contextlib.suppress(OSError):  # gloo listens elsewhere, and who is sent away may find the door closed
                stranger = socket.create_connection(("127.0.0.1", number), timeout=0.3)
                held.append(stranger)
                is_ours = number == port or stranger.recv(100).startswith(b'{"nonce"')  # gloo waits in silence
                if is_ours:
                    stranger.sendall(rng.choice(SAYINGS) + rng.randbytes(rng.randint(0, 2000)))
                    spoken += 1
    codes, output = ranks.codes(), ranks.output()
    for stranger in held:
        stranger.close()
    check(codes == [0, 0], f"ended with {codes}\n{output}")
    _is_undisturbed(job, out, output)
    return f"{spoken} of {len(held)} strangers spoke on {len(listening)} ports; bit-equal" if spoken else NOT_TRIED


SAYINGS = (
    b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01", b'{"fault": "you are all fired"}\n', b'{"end": "x", "code": 1}\n',
    b'{"rank": 1, "nonce": "0", "proof": "0"}\n', b"hello 1\nat 1 1 0\nfault no\n", b"\n" * 99, b"",
)  # fmt: skip


def nodes_that_differ(job: Job, out: str, rng: random.Random) -> str:
    """The second node's copy of the data, weights or tokenizer is another, or its command line: none of them begins."""
    if os.geteuid() != 0:
        return f"{NOT_TRIED}: needs root, for mounts"
    what = rng.choice(["texts", "rows", "weights", "tokenizer", "seed"])
    folder = job.world / f"{out}.nodes"
    (folder / "seen").mkdir(parents=True)
    for node in ("first", "second"):
        (folder / node).mkdir()
        for name in ("train.jsonl", "eval.jsonl"):
            shutil.copy(job.world / name, folder / node / name)
        shutil.copytree(job.world / "model", folder / node / "model")
    change(folder / "second", what)
    words = train_command(folder / "seen", out)
    command = [word.replace(str(folder / "seen" / out), str(job.world / out)) for word in words]
    everywhere = {"TESTS_NODE": str(folder / "first"), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    second = {1: {"TESTS_NODE": str(folder / "second"), "TESTS_SEED": "4" if what == "seed" else ""}}
    codes, output = job.forks.run(
        [json.dumps([command, str(folder / "seen")])], 2, folder / "logs", module="tests.workers.nodes", only=second,
        **everywhere,
    )  # fmt: skip
    shutil.rmtree(folder)
    check(codes == [2, 2], f"{what}: ended with {codes}\n{output}")
    check(output.count("dpo-ds: error: ") == 1 and "(rank 1); all " in output, f"{what}: not named\n{output}")
    check(not (job.world / out / "metrics.jsonl").exists(), f"{what}: training began")
    job.resume(out)
    return f"{what}; refused"


FORGERIES = ("[]", "3", "null", "{}", "[" * 5000, '{"format": 1, "step": -1}', '{"files": {"../../x": {}}}', "\ud83d")


def forged_manifest(job: Job, out: str, rng: random.Random) -> str:
    """The newest checkpoint's manifest is JSON, but none of ours: the one before is taken, and a line says so."""
    step = rng.choice([4, 6, 8])
    folder = job.copy_at(out, step)
    text = rng.choice(FORGERIES)
    (folder / f"step-{step:08d}" / "MANIFEST.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    output = job.resume(out)
    check("trying the one before" in output, f"no line on {text[:40]!r}\n{output}")
    check(f"resumed from {folder}/step-{step - EVERY:08d}" in output, f"{text[:40]!r}: from elsewhere\n{output}")
    return f"{text[:40]!r}; resumed from step {step - EVERY}"


def _is_undisturbed(job: Job, out: str, output: str) -> None:
    check(exact(job.world / out) == job.metrics, f"other metrics\n{output}")
    check(weights(job.world / out) == job.weights, f"other weights\n{output}")


def check(holds: bool, complaint: str) -> None:
    if not holds:
        raise Broken(complaint)


def _died_and_resumed(job: Job, out: str, ranks, victims: list[int]) -> str:
    codes, output = ranks.codes(), ranks.output()
    if codes == [0, 0]:
        died = f"{NOT_TRIED}, the run ended before"
    else:
        check(all(codes[rank] == -signal.SIGKILL for rank in victims), f"ended with {codes}\n{output}")
        for rank in {0, 1} - set(victims):
            check(codes[rank] == 1, f"the surviving rank {rank} ended with {codes[rank]}\n{output}")
            check(f"rank {victims[0]} died at step " in output, f"nobody names rank {victims[0]}\n{output}")
            check(status(job.world / out)["state"] == "failed", f"STATUS.json says {status(job.world / out)}")
        died = f"codes {codes}"
    output = job.resume(out)
    resumed = [line.rpartition("-")[2] for line in output.splitlines() if line.startswith("resumed from")]
    return f"{died}; " + (f"resumed from step {int(resumed[0])}" if resumed else "started over")


def _damage(checkpoint: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(checkpoint.iterdir()))
    size = path.stat().st_size
    kind = rng.choice(["cut", "flipped", "deleted", "emptied", "lengthened"])
    if kind == "cut":
        os.truncate(path, rng.randrange(1, size))
    elif kind == "flipped":
        content = bytearray(path.read_bytes())
        content[rng.randrange(size)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif kind == "deleted":
        path.unlink()
    elif kind == "emptied":
        os.truncate(path, 0)
    else:
        path.write_bytes(path.read_bytes() + b"\0")
    return f"{path.name} of {checkpoint.name} {kind}"


FAULTS = (  # in turn; many are a kill inside a save
    killed_inside_a_save, killed_at_a_random_moment, killed_beside_a_save, damaged_on_disk,
    killed_inside_a_save, killed_at_a_random_moment, killed_beside_a_save, stale_pointer,
    killed_inside_a_save, killed_at_a_random_moment, killed_inside_a_save, disk_full,
    killed_beside_a_save, damaged_on_disk, killed_inside_a_save, all_damaged,
    killed_inside_a_save, killed_at_a_random_moment, killed_beside_a_save, disk_filled_beside,
    killed_inside_a_save, two_jobs_in_a_folder, nodes_that_differ, nobody_reads,
    killed_inside_a_save, suspended, strangers_on_ports, forged_manifest,
)  # fmt: skip
