"""Whole jobs: two ranks, real files in, the output folder out; one of them through the deepspeed launcher."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ds.cluster.launch import free_port
from dpo_ds.demo.corpus import preference_rows, write_jsonl
from dpo_ds.demo.tiny import save_tiny_model, tiny_llama, train_tokenizer
from tests.ranks import ROOT

pytestmark = pytest.mark.distributed

TRAIN_KEYS = set(
    """step loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen logps/rejected
    grad_norm learning_rate epoch pairs tokens tokens_per_second pairs_per_second step_seconds
    data_seconds host_seconds peak_memory_bytes""".split()
)
EXACT = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with pairs, a tokenizer and a small model, and the cache of tokenised data."""
    folder = tmp_path_factory.mktemp("jobs")
    rows = list(preference_rows(70, seed=1))
    write_jsonl(folder / "train.jsonl", rows[:50])
    write_jsonl(folder / "eval.jsonl", rows[50:])
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], vocab_size=400)
    save_tiny_model(folder / "model", tokenizer, tiny_llama(tokenizer, hidden=32, layers=2))
    return folder


def command(world: Path, name: str, out: str, **settings) -> list[str]:
    keys = {
        "model.path": world / "model", "data.train": world / "train.jsonl", "output_dir": world / out,
        "deepspeed.config": "ds_configs/zero3_cpu.json", "train.global_batch_size": 8,
        "train.micro_batch_tokens": 600, "train.learning_rate": 1e-3, "train.schedule": "constant",
    } | settings  # fmt: skip
    return [name, *(text for key, value in keys.items() for text in (f"--{key}", str(value)))]


def launch(forks, world: Path, *args, ranks: int = 2, **settings) -> tuple[int, str]:
    """(exit code of rank 0, all output)."""
    cache = str(world / "cache")
    codes, output = forks.run(command(world, *args, **settings), ranks, world / "logs", DPO_DS_CACHE=cache)
    return codes[0], output


def lines(folder: Path, kind: str = "loss") -> list[dict]:
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if kind in line]


@pytest.fixture(scope="module")
def whole(forks, world):
    """Eight steps in one go, two ranks: more than an epoch (7 steps, the last of 2 pairs)."""
    keys = {"train.max_steps": 8, "checkpoint.every": 4, "train.eval_every": 4, "data.eval": world / "eval.jsonl"}
    code, output = launch(forks, world, "train", "whole", **keys)
    assert code == 0, output
    return world / "whole"


def test_the_first_step_is_log_2_with_margin_0(whole):
    first = lines(whole)[0]
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["rewards/margins"], first["rewards/accuracies"], first["rewards/chosen"]) == (0, 0, 0)
    assert first["logps/chosen"] < -10


def test_metrics_have_the_contracts_keys_and_every_step(whole):
    steps = lines(whole)
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert all(set(line) == TRAIN_KEYS for line in steps)
    assert [line["pairs"] for line in steps] == [8] * 6 + [2, 8]
    assert steps[6]["epoch"] == 1.0
    assert all(line["step_seconds"] > 0 and line["peak_memory_bytes"] > 1e7 for line in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_evaluations_are_due_at_4_and_at_the_end(whole):
    evaluations = lines(whole, "eval_loss")
    assert [line["step"] for line in evaluations] == [4, 8]
    assert evaluations[0]["eval_pairs"] == 20
    assert {"eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"} <= set(evaluations[0])


def test_the_output_folder_is_complete(whole, world):
    assert json.loads((whole / "STATUS.json").read_text()) == {"state": "done", "reason": "", "step": 8, "exit_code": 0}
    written = yaml.safe_load((whole / "config.yaml").read_text())
    assert written["train"]["max_steps"] == 8 and written["environment"]["versions"]["deepspeed"]
    census = json.loads((whole / "data_census.json").read_text())
    assert (census["train"]["rows_read"], census["eval"]["rows_kept"]) == (50, 20)
    assert list((whole / "tensorboard").glob("events.*"))
    assert (whole / "checkpoints" / "latest").read_text().strip() == "step-00000008"
    assert sorted(path.name for path in (whole / "checkpoints").glob("step-*")) == ["step-00000004", "step-00000008"]


def test_final_opens_with_transformers_and_has_learned(whole, world):
    model = AutoModelForCausalLM.from_pretrained(whole / "final")
    start = AutoModelForCausalLM.from_pretrained(world / "model")
    moved = [name for name, p in model.named_parameters() if not p.equal(dict(start.named_parameters())[name])]
    assert len(moved) == len(dict(model.named_parameters()))
    tokenizer = AutoTokenizer.from_pretrained(whole / "final")
    text = model.generate(**tokenizer("Write", return_tensors="pt"), max_new_tokens=3)
    assert text.shape[1] > 1
    assert "dpo_ds" in (whole / "final" / "README.md").read_text()


def test_resuming_gives_the_same_numbers(forks, whole, world):
    """Stopped after 4 of 8 steps and continued: every later loss and the weights are bit-equal."""
    keys = {"checkpoint.every": 4, "train.eval_every": 4, "data.eval": world / "eval.jsonl"}
    assert launch(forks, world, "train", "halves", **keys, **{"train.max_steps": 4})[0] == 0
    with (world / "halves" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 9}\n{"step": 6, "lo')  # what a killed run had logged beyond its checkpoint
    code, output = launch(forks, world, "train", "halves", **keys, **{"train.max_steps": 8})
    assert code == 0, output
    assert "changed on resume: train.max_steps 4 -> 8" in output
    assert "resumed from" in output
    once, twice = lines(whole), lines(world / "halves")
    assert [line["step"] for line in twice] == list(range(1, 9))
    assert [[line[key] for key in EXACT] for line in twice] == [[line[key] for key in EXACT] for line in once]
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (whole, world / "halves")]
    assert weights[0] == weights[1]

    card = (world / "halves" / "final" / "README.md").read_text()
    assert f"| rewards/margins | {twice[-1]['rewards/margins']:.6g} |" in card and "| eval_loss |" in card
    assert launch(forks, world, "train", "halves", ranks=1, **keys, **{"train.max_steps": 8})[0] == 0
    assert (world / "halves" / "final" / "README.md").read_text() == card, "the run has no step left to take"


def test_what_may_not_change_on_resume_is_refused(forks, whole, world):
    keys = {"train.max_steps": 9, "checkpoint.every": 4, "train.eval_every": 4, "data.eval": world / "eval.jsonl"}
    code, output = launch(forks, world, "train", "whole", ranks=1, **keys, **{"loss.beta": 0.2})
    assert code == 2 and "loss.beta 0.1 -> 0.2 cannot change on resume" in output
    before = (whole / "metrics.jsonl").read_bytes()
    code, output = launch(forks, world, "train", "whole", **keys, **{"train.seed": 5})
    assert code == 2
    assert output.startswith("dpo-ds: error: train.seed 0 -> 5 cannot change on resume")
    assert output.count("dpo-ds:") == 1, "one line, from one rank"
    code, output = launch(forks, world, "train", "whole", ranks=1, **keys, **{"data.train": world / "eval.jsonl"})
    assert code == 2 and output.splitlines()[-1].startswith("dpo-ds: error: the data in data.train is now ")
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_one_rank_gives_what_two_give(whole, world):
    """And without a launcher, on a PATH where neither a compiler nor ninja can be found."""
    bare = world / "bin"
    bare.mkdir()
    (bare / "python").symlink_to(sys.executable)
    env = {"PATH": str(bare), "DPO_DS_CACHE": str(world / "cache"), "PYTHONPATH": str(ROOT), "HOME": str(world)}
    assert shutil.which("ninja", path=env["PATH"]) is None and shutil.which("g++", path=env["PATH"]) is None
    args = command(world, "train", "one", **{"train.max_steps": 8, "train.micro_batch_tokens": 2000})
    done = subprocess.run([sys.executable, "-m", "dpo_ds", *args], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for alone, together in zip(lines(world / "one"), lines(whole), strict=True):
        assert alone["tokens"] == together["tokens"]
        assert [alone[key] for key in EXACT] == pytest.approx([together[key] for key in EXACT], rel=1e-4, abs=1e-5)


def test_sft_through_the_deepspeed_launcher(world):
    args = command(world, "sft", "sft", **{"train.max_steps": 3, "data.eval": world / "eval.jsonl"})
    deepspeed = Path(sys.executable).with_name("deepspeed")
    env = os.environ | {"DPO_DS_CACHE": str(world / "cache"), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launcher = [deepspeed, "--num_gpus", "2", "--master_port", str(free_port()), "--module", "dpo_ds"]
    done = subprocess.run([*launcher, *args], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = lines(world / "sft")
    assert steps[0]["loss"] == pytest.approx(math.log(400), rel=0.05), "a random model is near uniform"
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert set(steps[0]) == {key for key in TRAIN_KEYS if not key.startswith(("rewards/", "logps/"))}
    assert AutoModelForCausalLM.from_pretrained(world / "sft" / "final").config.vocab_size == 400


def test_weights_that_are_missing_are_not_drawn_at_random(forks, world):
    shutil.copytree(world / "model", world / "headless")
    file = world / "headless" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "lm_head.weight"}, file, {"format": "pt"})
    code, output = launch(forks, world, "train", "headless_out", ranks=1, **{"model.path": world / "headless"})
    assert code == 2 and "lacks the weights lm_head.weight" in output, output


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_pairs(forks, world):
    keys = {"train.learning_rate": 1e9, "train.max_steps": 9, "checkpoint.every": 1, "train.max_grad_norm": 0}
    code, output = launch(forks, world, "train", "diverged", **keys)
    assert code == 1
    assert output.count("dpo-ds: error: step 2: loss nan") == 1 and "train.jsonl:" in output
    assert "Traceback" not in output
    status = json.loads((world / "diverged" / "STATUS.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 1, 1)
    assert (world / "diverged" / "checkpoints" / "latest").read_text().strip() == "step-00000001"
