"""dpo-ds rl as a whole job: what it writes, one rank against two, killed in every phase and resumed bit-equal."""

import json
import os
import shutil
import signal

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dpo_ds.checkpoint.faultpoints import VARIABLE
from dpo_ds.commands import cli
from dpo_ds.demo.tiny import save_tiny_model
from dpo_ds.errors import ConfigError
from dpo_ds.models.scoring import load_scorer
from tests.ranks import ROOT
from tests.small_jobs import make_world, status, wait_for_step, weights

NOT_EXACT = ("seconds", "per_second", "peak_memory_bytes")
CONTRACT = {
    "step", "score", "kl", "entropy", "clip_fraction", "value_loss", "explained_variance", "completion_tokens",
    "unfinished", "loss", "grad_norm", "learning_rate", "epoch", "beta", "reward", "step_seconds",
    "generation_tokens_per_second", "update_tokens_per_second", "peak_memory_bytes",
}  # fmt: skip
PPO = {
    "rl.epochs": 2, "rl.minibatches": 2, "rl.target_kl": 0.5, "rl.eval_prompts": "held.jsonl", "rl.samples_every": 2,
    "checkpoint.every": 1, "train.eval_every": 2, "train.max_steps": 4, "rl.unfinished_penalty": 0.1,
    "checkpoint.asynchronous": False, "rl.batch_size": 9,  # two shards an iteration, the last one of one
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("rl"))
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for name, own in {"prompts.jsonl": rows[:20], "held.jsonl": rows[20:26]}.items():
        (folder / name).write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in own))
    return folder


def command(world, out: str, **keys) -> list[str]:
    settings = {
        "model.path": world / "model", "rl.prompts": world / "prompts.jsonl", "rl.score": "tests.scores:vowels",
        "rl.max_new_tokens": 12, "rl.n": 3, "train.global_batch_size": 6, "train.micro_batch_tokens": 300,
        "train.learning_rate": 1e-3, "deepspeed.config": ROOT / "ds_configs/zero3_cpu.json", "output_dir": world / out,
    } | keys  # fmt: skip
    settings = {key: world / value if value == "held.jsonl" else value for key, value in settings.items()}
    return ["rl", *(text for key, value in settings.items() for text in (f"--{key}", str(value)))]


def run(forks, world, out: str, ranks: int = 2, fault: str = "", **keys) -> tuple[list[int], str]:
    return forks.run(command(world, out, **keys), ranks, world / f"{out}.logs", **{VARIABLE: fault})


def lines(folder, kind: str = "score") -> list[dict]:
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if kind in line]


def exact(folder) -> list[dict]:
    found = lines(folder) + lines(folder, "eval_score")
    return [{key: value for key, value in line.items() if not key.endswith(NOT_EXACT)} for line in found]


@pytest.fixture(scope="module")
def whole(forks, world):
    codes, output = run(forks, world, "whole", **PPO)
    assert codes == [0, 0], output
    return world / "whole"


@pytest.mark.distributed
def test_what_a_run_writes(whole, world):
    steps, evaluations = lines(whole), lines(whole, "eval_score")
    assert [line["step"] for line in steps] == [1, 2, 3, 4] and all(line.keys() >= CONTRACT for line in steps)
    assert steps[0]["kl"] == 0.0, "the policy is the reference yet"
    assert [line["prompts"] for line in steps] == [6, 6, 6, 2], "20 prompts, the last batch of the epoch kept"
    assert [line["updates"] for line in steps] == [4, 4, 4, 4]
    first = steps[0]
    assert first["reward"] == pytest.approx(first["score"] - 0.1 * first["unfinished"])
    assert steps[1]["beta"] == pytest.approx(0.05 * 0.98), "no KL at all: 2 % less"
    assert [line["step"] for line in evaluations] == [2, 4] and evaluations[0]["eval_prompts"] == 6
    assert {"eval_kl", "eval_entropy", "eval_unfinished", "eval_completion_tokens"} <= evaluations[0].keys()
    assert sorted(path.name for path in (whole / "samples").iterdir()) == ["step-00000002.jsonl", "step-00000004.jsonl"]
    samples = [json.loads(line) for line in (whole / "samples/step-00000002.jsonl").read_text().splitlines()]
    assert len(samples) == 18 and samples[0]["score"] >= samples[1]["score"] >= samples[2]["score"]
    shown = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in shown] == [2] * 4 + [4] * 2, "of four prompts, and of the two of the last batch"
    assert shown[0]["completion"] == samples[0]["completion"], "the best one"
    assert json.loads((whole / "data_census.json").read_text())["train"]["rows_read"] == 20
    assert yaml.safe_load((whole / "config.yaml").read_text())["rl"]["algorithm"] == "ppo"
    assert "Reinforcement learning (ppo)" in (whole / "final/README.md").read_text()
    assert status(whole) == {"state": "done", "reason": "", "step": 4, "exit_code": 0}
    AutoModelForCausalLM.from_pretrained(whole / "final")
    assert cli.main(["export", str(whole), "--to", str(world / "exported")]) == 0
    assert weights(whole) == (world / "exported/model.safetensors").read_bytes(), "the critic's shards are passed over"
    assert "# Reinforcement learning (ppo) of" in (world / "exported/README.md").read_text()
    assert len(list((whole / "checkpoints/step-00000004").glob("*.critic"))) == 4, "two shards a rank"


@pytest.mark.distributed
def test_killed_in_every_phase_it_goes_on_bit_equal(forks, world, whole):
    """In drawing, scoring and updating, each run going on from the one before."""
    for fault in ("batch-drawn:2", "completions-scored:2", "before-update:3"):
        codes, output = run(forks, world, "killed", fault=fault, **PPO)
        assert -signal.SIGKILL in codes and 0 not in codes, output
    assert [line["step"] for line in lines(world / "killed")] == [1, 2], "each went on from the one before"
    codes, output = run(forks, world, "killed", **PPO)
    assert codes == [0, 0] and "resumed from" in output, output
    assert exact(world / "killed") == exact(whole)
    assert weights(world / "killed") == weights(whole)


@pytest.mark.distributed
def test_a_copy_of_the_weights_draws_the_same(forks, world, whole):
    codes, output = run(forks, world, "copied", **(PPO | {"rl.replica": True, "train.max_steps": 2}))
    assert codes == [0, 0], output
    assert [line["score"] for line in lines(world / "copied")] == [line["score"] for line in lines(whole)[:2]]


@pytest.mark.distributed
def test_one_rank_draws_and_learns_what_two_do(forks, world, whole):
    """And resumes what two have saved, the critic's shards too."""
    shutil.copytree(whole, world / "alone")
    shutil.rmtree(world / "alone/checkpoints/step-00000004")
    codes, output = run(forks, world, "alone", ranks=1, **PPO)
    assert codes == [0] and "saved by 2 ranks" in output, output
    for ours, theirs in zip(exact(world / "alone"), exact(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.distributed
def test_a_signal_ends_it_between_phases_with_a_checkpoint(forks, world):
    keys = {"rl.algorithm": "rloo", "train.max_steps": 500}
    ranks = forks.start(command(world, "stopped", **keys), 2, world / "stopped.logs")
    wait_for_step(world / "stopped", 2)
    os.kill(ranks.pids[1], signal.SIGTERM)
    assert ranks.codes() == [75, 75], ranks.output()
    step = status(world / "stopped")["step"]
    assert (world / f"stopped/checkpoints/step-{step:08d}/MANIFEST.json").is_file()
    assert [line["step"] for line in lines(world / "stopped")][-1] == step


@pytest.mark.distributed
def test_adapters_and_pairs(forks, world):
    """Online DPO of LoRA adapters, held to the model without them, against another loss than DPO."""
    keys = {
        "rl.algorithm": "online_dpo", "loss.name": "ipo", "rl.beta": 0.5, "model.lora.r": 4, "train.max_steps": 3,
        "reference.kind": "adapter",
    }  # fmt: skip
    codes, output = run(forks, world, "pairs", ranks=1, **keys)
    assert codes == [0], output
    steps = lines(world / "pairs")
    assert steps[0]["loss"] == pytest.approx(1.0), "(0 - 1/(2·½))²"
    assert steps[0]["kl"] == 0.0 != steps[2]["kl"] and steps[0]["pairs"] == 6
    assert steps[2]["rewards/margins"] != 0
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    assert PeftModel.from_pretrained(base, world / "pairs/final").peft_config["default"].r == 4


@pytest.mark.distributed
def test_a_reward_model_scores_under_zero3_as_it_does_alone(forks, world):
    """And PPO's critic begins as that model; what is told of scores that are centred is as they were given. 7 prompts:
    rank 0 scores one more than rank 1.
    """
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    model.config.num_labels, model.config.reward_mean = 1, 0.25
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(model.config, dtype=torch.float32)
    save_tiny_model(world / "reward", AutoTokenizer.from_pretrained(world / "model"), classifier)
    keys = {
        "rl.score": world / "reward", "train.max_steps": 1, "rl.samples_every": 1, "train.global_batch_size": 7,
        "rl.center_scores": True,
    }  # fmt: skip
    codes, output = run(forks, world, "judged", **keys)
    assert codes == [0, 0], output
    path = world / "judged/samples/step-00000001.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    alone = load_scorer(str(world / "reward"), "rl.score", 60)
    again = alone([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert [row["score"] for row in rows] == pytest.approx(again.tolist(), abs=1e-5) and len(rows) == 21
    [step] = lines(world / "judged")
    assert step["score"] == pytest.approx(again.mean(), abs=1e-5) and step["reward"] == step["score"] != 0
    assert (world / "judged/checkpoints/step-00000001/zero_pp_rank_1_mp_rank_00_optim_states.pt.critic").is_file()


@pytest.mark.distributed
def test_a_score_that_is_no_number_ends_it_in_a_line(forks, world):
    codes, output = run(forks, world, "nan", **{"rl.score": "tests.scores:nothing", "rl.algorithm": "grpo"})
    assert codes == [2, 2], output
    [line] = [line for line in output.splitlines() if "error" in line]
    assert line.startswith("dpo-ds: error: tests.scores:nothing returned nan for row 0, completion"), output
    assert "a score must be a finite number" in line and status(world / "nan")["state"] == "failed"


NEEDED = {"rl.prompts": "p", "rl.score": "m:f", "model.path": "m", "deepspeed.config": "c", "output_dir": "o"}
MISTAKES = [
    ({"rl.algorithm": "rloo", "rl.n": 1}, "rl.n 1: rl.algorithm rloo compares completions of a prompt; give 2"),
    ({"rl.algorithm": "online_dpo", "rl.n": 1}, "rl.n 1: rl.algorithm online_dpo compares"),
    ({"rl.n": 1, "rl.center_scores": True}, "rl.center_scores true: of rl.n 1 completions all scores would be 0"),
    ({"rl.algorithm": "grpo", "rl.critic": "c"}, "rl.critic c: rl.algorithm grpo has no critic; ppo has"),
    ({"rl.algorithm": "online_dpo", "rl.target_kl": 1}, "a loss of pairs has a fixed β"),
    ({"rl.beta": 0, "rl.target_kl": 1}, "rl.beta 0 stays 0"),
    ({"reference.kind": "none"}, "reference.kind none: rl.beta 0.05 weighs the KL from a reference; set rl.beta 0"),
    ({"reference.kind": "cached", "reference.cache": "c"}, "completions are new in every iteration"),
    ({"reference.kind": "adapter"}, "it needs --model.lora.r above 0"),
    ({"reference.update_every": 2}, "holds to a frozen reference"),
    ({"loss.name": "ipo"}, "the section loss is of rl.algorithm online_dpo, this is ppo"),
    ({"rl.algorithm": "online_dpo", "loss.beta": 0.2}, "the β of a run by dpo-ds rl is rl.beta"),
    ({"rl.algorithm": "online_dpo", "loss.name": "kto"}, "loss.name kto: is of single completions"),
    ({"rl.algorithm": "online_dpo", "loss.margin_column": "m"}, "completions that are drawn have no columns"),
    ({"rl.algorithm": "online_dpo", "reference.kind": "none"}, "loss.name dpo needs one: live or adapter"),
    ({"rl.minibatches": 65}, "train.global_batch_size 64 prompts to share"),
    ({"train.sequence_parallel": 2}, "dpo-ds rl has none"),
    ({"rl.replica": "true", "model.lora.r": 2}, "adapters are not merged into a copy"),
    ({"model.router_aux_loss": 0.01}, "dpo-ds rl does not balance routers"),
    ({"rl.temperature": 0}, "rl.temperature"),
]


@pytest.mark.parametrize(("keys", "part"), MISTAKES, ids=[" ".join(keys) for keys, _ in MISTAKES])
def test_what_does_not_fit_is_one_line(keys, part):
    with pytest.raises(ConfigError) as caught:
        cli.parse(["rl", *(text for key, value in (NEEDED | keys).items() for text in (f"--{key}", str(value)))])
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_runs_own_config_is_taken_again(tmp_path):
    _, first, _, _ = cli.parse(["rl", *(text for pair in NEEDED.items() for text in (f"--{pair[0]}", pair[1]))])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(first.model_dump(mode="json")))
    assert cli.parse(["rl", "--config", str(tmp_path / "config.yaml")])[1] == first
