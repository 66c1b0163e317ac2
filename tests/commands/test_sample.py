"""`dpo-ds sample` as users start it, to the pairs that `train` takes; ranks are forks, so a launch takes seconds."""

import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpo_ds.cluster.shared_files import FolderLock
from dpo_ds.commands.sample.folder import Folder
from dpo_ds.config import SampleSection, load
from dpo_ds.demo.corpus import preference_rows, write_jsonl
from dpo_ds.demo.tiny import save_tiny_model, tiny_llama, train_tokenizer
from dpo_ds.errors import ConfigError

ZERO3 = "ds_configs/zero3_cpu.json"


@pytest.fixture(scope="module")
def world(tmp_path_factory, forks):
    """A model, 40 prompts, and `run(to, ranks, **settings)` -> (exit codes, output)."""
    folder = tmp_path_factory.mktemp("sample")
    rows = list(preference_rows(40, seed=5))
    write_jsonl(folder / "prompts.jsonl", rows)
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], vocab_size=300)
    save_tiny_model(folder / "model", tokenizer, tiny_llama(tokenizer, hidden=32, layers=2))

    def start(to: str, ranks: int = 2, **settings):
        keys = {
            "model.path": folder / "model", "sample.prompts": folder / "prompts.jsonl", "deepspeed.config": "none",
            "sample.score": "tests.scoring_functions:vowels", "sample.to": folder / to, "sample.n": 3,
            "sample.shard_rows": 6, "sample.max_new_tokens": 20, "sample.batch_size": 8, "sample.unfinished": "keep",
        }  # fmt: skip
        keys |= {key.replace("__", "."): value for key, value in settings.items()}
        argv = ["sample", *(text for key, value in keys.items() for text in (f"--{key}", str(value)))]
        return forks.start(argv, ranks, folder / "logs", DPO_DS_CACHE=str(folder / "cache"))

    def run(*args, **settings):
        ranks = start(*args, **settings)
        return ranks.codes(), ranks.output()

    return SimpleNamespace(folder=folder, start=start, run=run, tokenizer=tokenizer, forks=forks)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def sampled(world):
    """By two ranks under ZeRO-3: 7 shards, so that rank 1 has none in the last round."""
    codes, output = world.run("sampled", deepspeed__config=ZERO3)
    assert codes == [0, 0], output
    assert "40 prompts" in output and "120 completions of 40 prompts" in output
    assert output.splitlines()[-1] == f"dpo-ds: done: train on them with --data.train {world.folder / 'sampled/pairs'}"
    return world.folder / "sampled"


@pytest.mark.distributed
def test_completions_scores_and_pairs_belong_together(world, sampled):
    rows = pq.read_table(sampled / "completions").to_pylist()
    assert [(row["row"], row["draw"]) for row in rows] == [(row, draw) for row in range(40) for draw in range(3)]
    prompts = [row["prompt"] for row in preference_rows(40, seed=5)]
    for row in rows:
        assert row["prompt"] == prompts[row["row"]] and row["location"].endswith(f"prompts.jsonl:{row['row'] + 1}")
        assert row["completion"] == world.tokenizer.decode(row["tokens"], skip_special_tokens=True)
        assert row["score"] == sum(row["completion"].count(vowel) for vowel in "aeiou")
        assert row["finished"] == (row["tokens"][-1] == world.tokenizer.eos_token_id) and row["seed"] == 0
        assert row["finished"] or len(row["tokens"]) == 20
    pairs = pq.read_table(sampled / "pairs").to_pylist()
    manifest = json.loads((sampled / "MANIFEST.json").read_text())
    assert len(pairs) == manifest["pairs"] == 40 - sum(manifest["dropped"].values()) > 30
    for pair in pairs:
        of_prompt = [row for row in rows if row["row"] == pair["row"] and row["completion"].strip()]
        own = {row["completion"]: row["score"] for row in of_prompt}
        assert pair["prompt"] == prompts[pair["row"]]
        assert own[pair["chosen"]] == pair["score_chosen"] == max(own.values())
        assert own[pair["rejected"]] == pair["score_rejected"] == min(own.values()) < pair["score_chosen"]
    assert manifest["score"]["mean"] == pytest.approx(np.mean([row["score"] for row in rows]))
    assert sorted(manifest["files"]) == sorted(set(content(sampled)) - {"MANIFEST.json", ".lock"})


@pytest.mark.distributed
def test_killed_it_ends_with_the_same_bytes_on_other_ranks_and_engine(world, sampled):
    target = world.folder / "killed"
    job = world.start("killed", 2)
    deadline = time.monotonic() + 60
    while len(list(target.glob("completions/*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    job.kill()
    assert -9 in job.codes() and not (target / "MANIFEST.json").exists()
    kept = {name: file for name, file in content(target).items() if name.endswith(".parquet")}
    assert 0 < len(kept) and kept.items() <= content(sampled).items()
    damaged = sorted(target.glob("completions/*.parquet"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    codes, output = world.run("killed", 3)
    assert codes == [0, 0, 0] and "of 7 shards are there already" in output, output
    assert content(target) == content(sampled)
    codes, output = world.run("killed", 1)
    assert codes == [0] and "complete, nothing to draw" in output and "--data.train" in output


@pytest.mark.distributed
def test_only_one_job_fills_a_folder(world, sampled):
    """What the other is writing stays; what a killed one left goes."""
    folder = shutil.copytree(sampled, world.folder / "locked")
    (folder / "MANIFEST.json").unlink()
    half = folder / "completions/shard-000000.parquet.1234abcd.tmp"
    half.write_bytes(b"half a shard")
    lock, holder = FolderLock(folder, 0, "sample.to"), f"process {os.getpid()} on {socket.gethostname()}"
    lock.take(print)
    codes, output = world.run("locked", 1)
    assert codes == [2] and f"--sample.to {folder}: {holder} is at work there; wait for its end" in output, output
    assert half.exists()
    lock.close()
    codes, output = world.run("locked", 1)
    assert codes == [0] and content(folder) == content(sampled), output


def test_a_folder_that_the_nodes_do_not_share_is_told(tmp_path):
    """Rank 0's is not seen elsewhere, or rank 0 does not see a shard from elsewhere."""
    folder, sample = Folder(tmp_path, {}, 2), SampleSection(prompts="p", to="t", n=1)
    with pytest.raises(ConfigError, match=r"completions: rank 0 made it, .*must be a folder that all nodes share"):
        folder.check_shared()
    assert folder.unfinished() == [0, 1]
    folder.check_shared()
    folder.write(0, [])
    with pytest.raises(ConfigError, match=r"shard-000001\.parquet: written, .*must be a folder that all nodes share"):
        folder.finish(sample)
    assert not (tmp_path / "MANIFEST.json").exists()
    folder.write(1, [])
    assert len(folder.finish(sample)["files"]) == 2


@pytest.mark.distributed
def test_train_takes_the_pairs(world, sampled):
    argv = ["train", "--model.path", world.folder / "model", "--data.train", sampled / "pairs", "--train.max_steps", 1]
    argv += ["--output_dir", world.folder / "trained", "--deepspeed.config", ZERO3, "--train.global_batch_size", 8]
    codes, output = world.forks.run(argv, 1, world.folder / "train_logs", DPO_DS_CACHE=str(world.folder / "cache"))
    assert codes == [0], output
    pairs = json.loads((sampled / "MANIFEST.json").read_text())["pairs"]
    assert f"{pairs} rows read" in output and "format explicit" in output and f"{pairs} kept" in output


@pytest.mark.distributed
def test_mistakes_found_while_it_runs_are_one_line(world, sampled):
    """And those for which another run's folder must be read."""
    cases = [
        ("sampled", {"sample__temperature": 0.7}, ["--sample.to", "sample.temperature 1.0, this run has 0.7"]),
        (
            "nan",
            {"sample__score": "tests.scoring_functions:nan"},
            ["functions:nan returned nan for row 0"],
        ),
        ("same", {"sample__score": "tests.scoring_functions:same"}, ["no pair is left of 40", "all scores equal 40"]),
    ]
    for to, settings, parts in cases:
        codes, output = world.run(to, 1, **settings)
        lines = [line for line in output.splitlines() if line.startswith("dpo-ds: error: ")]
        assert codes == [2] and len(lines) == 1 and "Traceback" not in output, output
        assert [part for part in parts if part not in lines[0]] == [], output
    assert list((world.folder / "nan").rglob("*.parquet")) == []


WHILE_OTHERS_WAIT = {
    "waits_on_rank_1": "did not return within 1 s (sample.score_timeout)",
    "deaf_on_rank_1": "did not return within 1 s (sample.score_timeout)",
    "closes_on_rank_1": "closed stdout and stderr",
    "forks_on_rank_1": "forked, and the child came back too",
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", WHILE_OTHERS_WAIT)
def test_a_function_that_goes_astray_on_one_rank_ends_the_job(world, name):
    spec = f"tests.scoring_functions:{name}"
    codes, output = world.run(name, 2, sample__score=spec, sample__score_timeout=1)
    lines = [line for line in output.splitlines() if line.startswith("dpo-ds: error: ")]
    assert codes == [2, 2] and len(lines) == 1 and "Traceback" not in output, output
    assert f"{spec} {WHILE_OTHERS_WAIT[name]}" in lines[0]


@pytest.fixture
def refused(world, capsys, monkeypatch):
    """`refused(**settings)`: the line, in this process and without deepspeed."""
    from dpo_ds.commands.cli import main

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def line(**settings) -> str:
        keys = {
            "model.path": world.folder / "model", "sample.prompts": world.folder / "prompts.jsonl",
            "deepspeed.config": "none", "sample.to": world.folder / "refused",
        }  # fmt: skip
        keys |= {key.replace("__", "."): value for key, value in settings.items()}
        assert main(["sample", *(text for key, value in keys.items() for text in (f"--{key}", str(value)))]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return line


def test_mistakes_found_before_a_model_is_loaded(world, refused):
    folder = world.folder
    assert "sample.temperature 0 draws 2 equal completions" in refused(sample__temperature=0)
    assert "sample.n 1: a pair needs two" in refused(sample__n=1, sample__score="regex:a")
    assert "min_new_tokens 300 is above" in refused(sample__min_new_tokens=300)
    assert "best_wurst" in refused(sample__pairs="best_wurst")
    assert "vllm is not installed" in refused(sample__engine="vllm")
    assert "--sample.score regex:(" in refused(sample__score="regex:(")
    assert "prompts.json: no such file" in refused(sample__prompts=folder / "prompts.json")
    assert "--sample.to /proc/x: not writable" in refused(sample__to="/proc/x")
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    assert f"dpo-ds export {run} --to DIR" in refused(model__path=run)
    shutil.copytree(folder / "model", run / "final")
    assert f"whose model is {run / 'final'}" in refused(model__path=run)
    (folder / "lora/final").mkdir(parents=True)
    (folder / "lora/final/adapter_config.json").write_text("{}")
    assert "names no base_model_name_or_path to merge it with" in refused(model__path=folder / "lora/final")


def test_adapters_to_train_are_no_setting_of_it(refused, tmp_path):
    assert "unknown key --model.lora.r" in refused(model__lora__r=8)
    path = tmp_path / "train.yaml"
    path.write_text(
        "{model: {path: m, lora: {r: 8}}, deepspeed: {config: none}, sample: {prompts: p, to: t}, train: {epochs: 2}}"
    )
    run, notes = load("sample", str(path), {})
    assert run.model.path == "m" and notes == [f"{path}: sample does not use train, model.lora"]


def test_vllm_is_asked_for_what_the_settings_say(world, monkeypatch):
    """A stand-in for vllm: what it is called with, and what becomes of its answer."""
    from dpo_ds.config import ModelSection
    from dpo_ds.models.vllm import VllmGenerator

    asked, eos = {}, world.tokenizer.eos_token_id

    class LLM:
        def __init__(self, **options):
            asked["model"] = options

        def generate(self, prompts, options, use_tqdm):
            asked["prompts"], asked["options"] = prompts, options
            answer = [SimpleNamespace(token_ids=[40, 41, eos]), SimpleNamespace(token_ids=[42])]
            return [SimpleNamespace(outputs=answer) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict))
    settings = SampleSection(prompts="p", to="t", temperature=0.5, max_new_tokens=9)
    section = ModelSection(path=str(world.folder / "model"))
    generator = VllmGenerator(section, {"bf16": {"enabled": False}}, world.tokenizer, settings)
    drawn = generator([np.array([5, 6]), np.array([7])], 2, first_row=3)
    assert asked["model"]["dtype"] == "float32" and asked["model"]["generation_config"] == "vllm"
    assert asked["prompts"] == [{"prompt_token_ids": [5, 6]}, {"prompt_token_ids": [7]}]
    wanted = {"n": 2, "temperature": 0.5, "top_k": -1, "top_p": 1.0, "max_tokens": 9, "stop_token_ids": [eos]}
    assert all(options.items() >= wanted.items() for options in asked["options"])
    assert asked["options"][0]["seed"] != asked["options"][1]["seed"]
    assert [[one.finished for one in own] for own in drawn] == [[True, False]] * 2
    assert drawn[0][0].text == world.tokenizer.decode([40, 41])
