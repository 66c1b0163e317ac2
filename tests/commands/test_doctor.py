"""`dpo-ds doctor`: quiet on a healthy job, and it finds each planted fault."""

import errno
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from dpo_ds.cluster.launch import ALONE
from dpo_ds.commands import cli
from dpo_ds.commands.doctor import command, disk, network, saving, stepping
from dpo_ds.commands.doctor.command import as_examined
from dpo_ds.commands.doctor.report import FAIL, PASS, WARN, Finding, softened
from dpo_ds.commands.doctor.versions import judge as judge_versions
from dpo_ds.demo.tiny import save_tiny_model, tiny_llama
from dpo_ds.errors import ConfigError
from dpo_ds.training.objectives.balanced import BalancedObjective
from tests.small_jobs import make_world, train_command

PLANTED = {  # fault: the check that finds it, and what it says
    "another version of a package on one rank": ("versions", "transformers is 4.0.0 on"),
    "other source on one rank": ("versions", "dpo_ds is"),
    "a skewed clock": ("clocks", "(rank 1) is +30"),
    "a slow pair": ("pairs", "and rank 2 ("),
    "a full disk": ("disk", "free in"),
    "bad rows": ("data", "rows dropped"),
    "truncated prompts": ("data", "of the prompts cut"),
    "a template whose mask trains the user's turn": ("mask", "trains what the user says"),
    "a reference that is another model": ("reference", "policy and reference: log-probs of a token differ"),
    "a loss that does not begin where it should": ("loss", "where policy = reference it is 0.693147 (ln 2)"),
    "cross-talk between chosen and rejected": ("cross-talk", "sees another one"),
    "a frozen parameter that should train": ("step", "1 parameters are frozen that should train"),
    "a checkpoint whose damage is not noticed": ("checkpoint", "a byte was flipped"),
    "a memory estimate far off": ("memory", "0.00 GB expected"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("doctor"))


def examine(forks, world, out, ranks, **settings) -> tuple[int, str, list[dict]]:
    """Exit code of rank 0, all output, the findings in JSON."""
    module = settings.pop("module", "dpo_ds.commands.cli")
    command = train_command(world, out, "doctor", **settings) + ["--json"]
    logs, cache = world / f"{Path(out).name}.logs", str(world / "cache")
    codes, output = forks.run(command, ranks, logs, module=module, DPO_DS_CACHE=cache)
    printed = [line for line in output.splitlines() if line.startswith("{")]
    return codes[0], output, json.loads(printed[-1])["findings"] if printed else []


@pytest.mark.distributed
def test_a_healthy_job_passes_and_nothing_is_left(forks, world):
    code, output, findings = examine(forks, world, "healthy", 2)
    assert code == 0, output
    assert {finding["verdict"] for finding in findings} == {PASS}, output
    loss = next(finding for finding in findings if finding["check"] == "loss")
    assert loss["figures"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [path.name for path in world.glob("healthy*")] == ["healthy.logs"]


@pytest.mark.distributed
def test_it_finds_every_planted_fault(forks, world):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    save_tiny_model(world / "other", tokenizer, tiny_llama(tokenizer, hidden=16, layers=1))
    rows = [{"prompt": [turn("user", "Why? " * 30)], "chosen": [turn("assistant", f"good {i}")],
             "rejected": [turn("assistant", f"bad {i}")]} for i in range(20)]  # fmt: skip
    rows += [{"prompt": "x", "chosen": ""}] * 10
    (world / "faulty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    faults = {"data__train": world / "faulty.jsonl", "data__on_bad_row": "skip", "data__max_prompt_length": 40}
    code, output, findings = examine(
        forks, world, "faulty", 3, module="tests.workers.doctor", reference__path=world / "other", **faults
    )
    assert code == 1, output
    for fault, (check, says) in PLANTED.items():
        found = [f["text"] for f in findings if f["check"] == check and f["verdict"] != PASS]
        assert any(says in text for text in found), f"{fault}: {found}\n{output}"


@pytest.mark.distributed
def test_an_engine_that_does_not_open_is_a_failed_check_and_nothing_is_left(forks, world):
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(world / "train.jsonl/swap")}}
    (world / "nvme.json").write_text(json.dumps({"zero_optimization": zero}))
    code, output, findings = examine(forks, world, "new/folders/out", 1, deepspeed__config=world / "nvme.json")
    (failed,) = [finding["text"] for finding in findings if finding["verdict"] != PASS]
    assert code == 1 and "Traceback" not in output
    assert "offload_param.nvme_path" in failed and "train.jsonl/swap: NotADirectoryError: " in failed
    assert not (world / "new").exists()


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def test_in_a_tournament_each_meets_each_once():
    for count in (2, 3, 8, 9):
        rounds = network.rounds(range(count))
        assert len(rounds) == count - 1 + count % 2
        assert sorted(tuple(sorted(pair)) for pairs in rounds for pair in pairs) == [
            (a, b) for a in range(count) for b in range(a + 1, count)
        ]
        assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in rounds)


def test_a_pair_is_compared_with_its_own_kind():
    """Two hosts of two: 100 within, 10 between, but for one of 2: that one is slow, not the other three."""
    rates = {(0, 1): 100.0, (2, 3): 100.0, (0, 2): 10.0, (0, 3): 10.0, (1, 2): 2.0, (1, 3): 10.0}
    slow = [finding for finding in network.judge_pairs(rates, "aabb") if finding.verdict == FAIL]
    assert [finding.text.split(":")[0] for finding in slow] == ["rank 1 (a) and rank 2 (b)"]


def test_known_bad_versions_are_named_with_a_link():
    here = {"host": "a", "NCCL": "2.29.2"}
    (finding,) = judge_versions([here, here])
    assert finding.verdict == WARN and "pull/174338" in finding.remedy
    assert judge_versions([here | {"NCCL": "2.29.3"}])[0].verdict == PASS


def test_the_first_loss_is_without_the_routers():
    """What balances them counts forwards with gradients, and an evaluation has none."""
    asked = []
    inner = SimpleNamespace(reference=object(), for_evaluation=lambda: inner)
    means = lambda objective, *_: asked.append(objective) or {"loss": 0.5}  # noqa: E731
    policy = SimpleNamespace(causal_lm=torch.nn.Linear(1, 1))
    trainer = SimpleNamespace(means=means, data=None, policy=policy)
    stepping.check_loss(trainer, BalancedObjective(inner, None), policy, None)
    assert asked == [inner, inner]


def test_experts_that_no_token_reached_are_no_failure():
    still = ["layers.0.experts.3.weight"]
    assert [f.verdict for f in stepping.judge_moved(9, still, [], 0)] == [WARN]
    assert [f.verdict for f in stepping.judge_moved(9, ["layers.0.norm.weight"], [], 0)] == [FAIL]


def test_lora_s_a_begins_behind_b():
    pair = ["q.lora_A.default.weight", "q.lora_B.default.weight"]
    assert [f.verdict for f in stepping.judge_moved(2, pair[:1], [], 0)] == [PASS]
    assert [f.verdict for f in stepping.judge_moved(2, pair, [], 0)] == [FAIL]


def test_its_command_line_takes_the_run_s_keys(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model: {path: m}\ndata: {train: d}\ndeepspeed: {config: c}\noutput_dir: o\nreward: {loss: bradley_terry}\n"
    )
    words = ["doctor", str(tmp_path / "run.yaml"), "--train.max_steps", "3", "--lenient", "memory,disk"]
    _, doctor, _, _ = cli.parse(words)
    assert (doctor.run.command, doctor.run.train.max_steps, doctor.lenient) == ("reward", 3, ("memory", "disk"))
    assert cli.parse([*words, "--command", "sft"])[1].run.command == "sft"
    with pytest.raises(ConfigError, match="--lenient memry: no such check.*memory"):
        cli.parse([*words, "--lenient", "memry"])


def test_a_folder_that_cannot_be_made_is_a_mistake_of_one_line(world, capsys):
    words = train_command(world, "train.jsonl/out", "doctor")
    assert cli.main(words) == 2
    assert "not writable (Not a directory)" in capsys.readouterr().err


def test_it_makes_no_repository(world):
    keys = train_command(world, "pushed", "doctor", hub__push="org/name")
    assert as_examined(cli.parse(keys)[1].run).hub.push is None


def test_a_full_disk_is_told_to_all_ranks(tmp_path, monkeypatch):
    """Rank 0 alone writes the file that the others wait to hear of."""
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "write_text", full)
    monkeypatch.setattr(disk.collectives, "from_rank_0", lambda value: value)
    (finding,) = disk.check(tmp_path / "scratch", ALONE, 1000, 2)
    assert finding.verdict == FAIL and "No space left on device" in finding.text


def test_a_save_that_fails_is_told_in_the_check_s_line():
    said = ["checkpoint of step 1 NOT saved: the disk is full; there is none yet"]
    writer = SimpleNamespace(save=lambda *args, **kwargs: None, newest=0)
    (finding,) = saving.check(SimpleNamespace(engine=None), writer, {}, said)
    assert (finding.verdict, finding.text) == (FAIL, said[0])


def test_a_fault_of_one_rank_is_told_where_the_others_do_not_come(monkeypatch):
    told = []
    monkeypatch.setattr(command, "ALONE_SECONDS", 0.01)
    monkeypatch.setattr(command.rendezvous, "peers", lambda: SimpleNamespace(fault=told.append))
    error = MemoryError("planted")
    with command._telling_late(error):
        time.sleep(0.5)
    with command._telling_late(RuntimeError("all ranks come at once")):
        pass
    time.sleep(0.1)
    assert told == [error]


def test_a_lenient_check_warns():
    failed = Finding("reference", FAIL, "")
    assert [f.verdict for f in softened([failed, Finding("disk", FAIL, "")], ["reference"])] == [WARN, FAIL]
