"""A Slurm cluster of two hosts: munge, slurmctld on alpha, slurmd on both; all of its files in one folder."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.two_hosts.hosts import Host, environment, minute

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
CONF = """
ClusterName=dpo
SlurmctldHost=alpha
AuthType=auth/munge
# A requeued job waits for cred_expire (at least 5 s, by default 120) before it starts again.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=100000
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmdTimeout=15
MessageTimeout=10
UnkillableStepTimeout=60
NodeName=alpha NodeAddr={alpha} Port=6818 CPUs=2
NodeName=beta NodeAddr={beta} Port=6819 CPUs=2
PartitionName=main Nodes=alpha,beta Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """Commands are given on alpha, in the folder above this one."""

    folder: Path
    hosts: dict[str, Host]

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess:
        return self.hosts["alpha"].run(*command, cwd=self.folder.parent, env=self.environment | env)

    @property
    def environment(self) -> dict[str, str]:
        return environment(SLURM_CONF=str(self.folder / "slurm.conf"))

    def sbatch(self, *arguments: str, **env: str) -> str:
        """The job's id."""
        done = self.run("sbatch", "--parsable", *arguments, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def wait(self, job: str, *states: str) -> dict[str, str]:
        """Until the job is in one of the states."""
        deadline = time.monotonic() + 2 * minute()
        while (fields := self.job(job)).get("JobState") not in states:
            assert time.monotonic() < deadline, f"job {job} is {fields.get('JobState')} ({fields.get('Reason')})"
            time.sleep(0.3)
        return fields

    def wait_for_idle(self, *nodes: str) -> None:
        command = ["sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%t"]
        _until(lambda: self.run(*command).stdout.split() == ["idle"] * len(nodes), f"{nodes} did not become idle")

    def start_node(self, name: str) -> None:
        with (self.folder / f"slurmd-{name}.out").open("ab") as out:
            self.hosts[name].start("slurmd", "-D", "-N", name, stdout=out, stderr=out, env=self.environment)


@contextlib.contextmanager
def slurm(folder: Path, hosts: dict[str, Host]) -> Iterator[Slurm]:
    """Its daemons end with the hosts' processes."""
    cluster = Slurm(folder, hosts)
    (folder / "state").mkdir()
    for name in hosts:
        (folder / f"spool-{name}").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    conf = CONF.format(folder=folder, alpha=hosts["alpha"].address, beta=hosts["beta"].address)
    (folder / "slurm.conf").write_text(conf)
    with (folder / "munged.out").open("wb") as out:
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={folder / file}" for option, file in names.items()]
        munged = hosts["alpha"].start("munged", "--foreground", "--force", *options, stdout=out, stderr=out)
    _until((folder / "munge.socket").exists, "munged did not open its socket")
    with (folder / "slurmctld.out").open("wb") as out:
        controller = hosts["alpha"].start("slurmctld", "-D", stdout=out, stderr=out, env=cluster.environment)
    for name in hosts:
        cluster.start_node(name)
    cluster.wait_for_idle(*hosts)
    yield cluster
    for process in (controller, munged):
        process.terminate()
        process.wait()


def _until(condition, otherwise: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)
