"""sshd on both hosts, reached without a password: key, known hosts and settings in one folder."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.two_hosts.hosts import Host

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "pdsh")
SERVER = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
"""
CLIENT = """
IdentityFile {folder}/key
UserKnownHostsFile {folder}/known_hosts
BatchMode yes
"""


def start(folder: Path, hosts: dict[str, Host]) -> None:
    """Ends with the hosts' processes. ssh looks for a user's own settings in passwd's home, not in $HOME, so these
    become /etc/ssh/ssh_config of the two hosts.
    """
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    names = ",".join(part for host in hosts.values() for part in (host.name, host.address))
    (folder / "known_hosts").write_text(f"{names} {(folder / 'host_key.pub').read_text()}")
    (folder / "sshd_config").write_text(SERVER.format(folder=folder))
    (folder / "ssh_config").write_text(CLIENT.format(folder=folder))
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd locks up its unprivileged half
    for host in hosts.values():
        mounted = host.run("mount", "--bind", str(folder / "ssh_config"), "/etc/ssh/ssh_config")
        assert mounted.returncode == 0, mounted.stderr
        with (folder / f"sshd-{host.name}.out").open("wb") as out:
            host.start("/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config"), stdout=out, stderr=out)
    for host in hosts.values():
        deadline = time.monotonic() + 20
        while (answer := hosts["alpha"].run("ssh", host.name, "hostname")).stdout.strip() != host.name:
            assert time.monotonic() < deadline, answer.stderr
            time.sleep(0.2)
