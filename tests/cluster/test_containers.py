"""launch_scripts/kubernetes and skypilot: what a node runs, the launcher replaced; docker: what it copies."""

import os
import re
import shlex
import signal
import subprocess
import time

import pytest
import yaml

from dpo_ds.cluster.signals import EXIT_STOPPED
from dpo_ds.commands import cli
from dpo_ds.commands.cli import EXIT_USER
from tests.ranks import ROOT

SERVICE, JOB = yaml.safe_load_all((ROOT / "launch_scripts/kubernetes/job.yaml").read_text())
SKY = yaml.safe_load((ROOT / "launch_scripts/skypilot/train.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
SECOND = {
    "kubernetes": (
        CONTAINER["args"][0],
        {each["name"]: each["value"] for each in CONTAINER["env"]} | {"JOB_COMPLETION_INDEX": "1"},
        ["dpo-0 slots=8", "dpo-1 slots=8"], "dpo-0.dpo",
    ),
    "skypilot": (
        SKY["run"],
        {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.7", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1"},
        ["10.0.0.4 slots=8", "10.0.0.7 slots=8"], "10.0.0.4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", SECOND)
def test_the_second_node_calls_the_launcher_as_the_second(where, tmp_path):
    script, given, hosts, first = SECOND[where]
    (tmp_path / "deepspeed").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "deepspeed").chmod(0o755)
    hostfile = tmp_path / "hostfile"
    script = script.replace("/tmp/hostfile", str(hostfile))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)} | given
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert hostfile.read_text().splitlines() == hosts
    words = done.stdout.splitlines()
    told = dict(zip(words, words[1:], strict=False))
    assert (told["--node_rank"], told["--master_addr"], told["--hostfile"]) == ("1", first, str(hostfile))
    command = words[words.index("dpo_ds") + 1 :]
    parser = cli.parser_for(command[0])
    assert parser.parse_known_args(command[1:])[1] == []


def test_pods_find_each_other_and_exit_codes_mean_what_they_mean():
    spec = JOB["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 2
    assert SERVICE["metadata"]["name"] == POD["subdomain"] == JOB["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == {"job-name": JOB["metadata"]["name"]} and POD["restartPolicy"] == "Never"
    codes = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"] for code in rule.get("onExitCodes", {}).get("values", [])
    }  # fmt: skip
    assert codes == {EXIT_USER: "FailJob", EXIT_STOPPED: "Ignore"}
    assert SKY["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_STOPPED]
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}


def test_the_image_copies_what_is_there():
    text = (ROOT / "launch_scripts/docker/Dockerfile").read_text().replace("\\\n", " ")
    for line in re.findall(r"^COPY (.*)$", text, re.M):
        assert all((ROOT / source).exists() for source in shlex.split(line)[:-1]), line
    assert "-c constraints.txt torch" in text  # torch first, and never without the constraints


def test_sigterm_reaches_a_rank_and_its_exit_code_comes_back(tmp_path):
    """A launcher as DeepSpeed's, which starts another one, which starts a rank: that one saves and exits with 75."""
    rank = "trap 'exit 75' USR1; touch started; while :; do sleep 0.05; done"
    (tmp_path / "rank.sh").write_text(f"LOCAL_RANK=0 bash -c {shlex.quote(rank)} &\nwait $!\n")
    script = ROOT / "launch_scripts/save_on_term.sh"
    job = subprocess.Popen(["bash", script, "bash", "-c", "bash rank.sh; exit $?"], cwd=tmp_path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == EXIT_STOPPED
    assert subprocess.run(["bash", script, "bash", "-c", "exit 2"]).returncode == EXIT_USER
