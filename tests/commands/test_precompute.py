"""`dpo-ds precompute` and training on what it left, as users start them; ranks are forks, so a launch takes seconds."""

import errno
import fcntl
import json
import os
import random
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_ds.cluster.shared_files import FolderLock
from dpo_ds.demo.corpus import preference_rows, write_jsonl
from dpo_ds.demo.tiny import save_tiny_model, tiny_llama, train_tokenizer

pytestmark = pytest.mark.distributed

ZERO3 = "ds_configs/zero3_cpu.json"
CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def world(tmp_path_factory, forks):
    """A model, pairs as strings and as messages, and `run(name, command, ...)` -> (exit codes, output)."""
    folder = tmp_path_factory.mktemp("precompute")
    rows = list(preference_rows(90, seed=3))
    write_jsonl(folder / "train.jsonl", [*rows[:60], rows[0]])  # one pair twice
    write_jsonl(folder / "eval.jsonl", rows[60:])
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    chats = [{part: [{"role": roles[part], "content": row[part]}] for part in roles} for row in rows[:20]]
    write_jsonl(folder / "chat.jsonl", chats)
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], vocab_size=400)
    tokenizer.chat_template = CHATML
    save_tiny_model(folder / "model", tokenizer, tiny_llama(tokenizer, hidden=32, layers=2))

    def start(command: str, ranks: int = 2, cache="cache", **settings):
        keys = {
            "model.path": folder / "model", "data.train": folder / "train.jsonl", "deepspeed.config": ZERO3,
            "reference.cache": folder / cache,
        }  # fmt: skip
        if command == "precompute":
            keys |= {"precompute.shard_rows": 8, "precompute.micro_batch_tokens": 300}
        else:
            keys |= {
                "train.global_batch_size": 8, "train.micro_batch_tokens": 600, "train.learning_rate": 1e-3,
                "train.max_steps": 3, "output_dir": folder / "out",
            }  # fmt: skip
        keys |= {key.replace("__", "."): value for key, value in settings.items()}
        argv = [command, *(text for key, value in keys.items() for text in (f"--{key}", str(value)))]
        return forks.start(argv, ranks, folder / "logs", DPO_DS_CACHE=str(folder / "derived"))

    def run(*args, **settings):
        ranks = start(*args, **settings)
        return ranks.codes(), ranks.output()

    return type("World", (), {"folder": folder, "start": staticmethod(start), "run": staticmethod(run)})


def content(folder: Path) -> dict[str, bytes]:
    """Of its files but the lock's, which has nothing in it."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def losses(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cache(world):
    """60 pairs in 8 shards, by two ranks under ZeRO-3."""
    codes, output = world.run("precompute")
    assert codes == [0, 0], output
    assert "done: " in output and "120 completions" in output
    return world.folder / "cache"


def test_the_folder_holds_shards_and_a_manifest(cache):
    assert (cache / ".lock").read_bytes() == b""
    assert sorted(content(cache)) == ["MANIFEST.json", *(f"shard-{n:06d}.parquet" for n in range(8))]
    manifest = json.loads((cache / "MANIFEST.json").read_text())
    assert manifest["rows"] == 120, "the pair that comes twice is stored once"
    build = manifest["builds"][0]
    assert [shard["rows"] for shard in build["shards"]] == [16] * 7 + [8]
    wanted = {"dtype": "float32", "layout": "packed", "attention": "sdpa", "logprobs": "chunked", "threads": 1}
    assert build.items() >= wanted.items()
    assert build["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(("ranks", "engine"), [(1, "none"), (3, "none"), (3, ZERO3)])
def test_the_bytes_do_not_depend_on_ranks_or_engine(world, cache, ranks, engine):
    name = f"again-{ranks}-{engine == 'none'}"
    codes, output = world.run("precompute", ranks, name, deepspeed__config=engine)
    assert codes == [0] * ranks, output
    assert content(world.folder / name) == content(cache)


def test_killed_at_five_random_moments_it_ends_with_the_same_bytes(world, cache):
    chance, target = random.Random(5), world.folder / "killed"
    for moment in range(5):
        ranks, engine = [(2, ZERO3), (1, "none"), (2, "none")][moment % 3]
        job = world.start("precompute", ranks, "killed", deepspeed__config=engine)
        wanted, deadline = moment + 1, time.monotonic() + 60
        while len(list(target.glob("*.parquet"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        job.kill()
        assert -9 in job.codes(), job.output()
        kept = {name: file for name, file in content(target).items() if name.endswith(".parquet")}
        assert kept.items() <= content(cache).items(), "a shard is there whole or not at all"
        assert not (target / "MANIFEST.json").exists()
    codes, output = world.run("precompute", 2, "killed")
    assert codes == [0, 0], output
    assert "of 8 shards are there already" in output
    assert content(target) == content(cache)


def test_only_one_job_fills_a_folder(world, cache):
    """Refused while rank 0 of another job has all of the lock, and while a later rank of it still has its part."""
    folder = shutil.copytree(cache, world.folder / "locked")
    first, holder = FolderLock(folder, 0, "reference.cache"), f"process {os.getpid()} on {socket.gethostname()}"
    first.take(print)
    codes, output = world.run("precompute", 1, "locked")
    assert codes == [2] and f"--reference.cache {folder}: {holder} is at work there; wait for its end" in output, output
    first.close()
    later = FolderLock(folder, 1, "reference.cache")
    later.share(lambda: None)
    codes, output = world.run("precompute", 1, "locked")
    assert codes == [2] and "another process is at work there" in output, output
    later.close()
    codes, output = world.run("precompute", 1, "locked")
    assert codes == [0] and "complete, 120 rows" in output, output


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch):
    """As Lustre answers where it is mounted without them."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    said = []
    for rank in (0, 1):
        lock = FolderLock(tmp_path, rank, "reference.cache")
        if rank == 0:
            lock.take(said.extend)
        lock.share(lambda: None)
        lock.close()
    assert len(said) == 1 and "Function not implemented; where there are no locks" in said[0]


def test_training_on_the_cache_is_training_on_the_live_reference(world, cache):
    assert world.run("precompute", data__eval=world.folder / "eval.jsonl", cache="both")[0] == [0, 0]
    shared = {"data__eval": world.folder / "eval.jsonl", "train__eval_every": 2, "checkpoint__every": 2}
    for kind in ("live", "cached"):
        cache_key = "both" if kind == "cached" else "unused"
        codes, output = world.run(
            "train", reference__kind=kind, output_dir=world.folder / kind, cache=cache_key, **shared
        )
        assert codes == [0, 0], output
    assert "8 pairs recomputed, within" in output
    live, cached = losses(world.folder / "live"), losses(world.folder / "cached")
    assert [line["step"] for line in live] == [line["step"] for line in cached] == [1, 2, 2, 3, 3]
    for a, b in zip(live, cached, strict=True):
        for key in a.keys() & {"loss", "grad_norm", "rewards/margins", "eval_loss", "eval_rewards/margins"}:
            assert a[key] == pytest.approx(b[key], abs=1e-5), key
    assert cached[-1]["eval_loss"] != cached[0]["loss"]


def test_a_cache_that_was_filled_before_is_added_to_and_a_run_resumes_on_it(world, cache):
    """After training has moved the weights: what counts is the model the run began with, and the checkpoint's cache."""
    shutil.copytree(cache, world.folder / "grown")
    out = world.folder / "resumed"
    codes, output = world.run("train", reference__kind="cached", output_dir=out, cache="grown", train__layout="padded")
    assert codes == [0, 0], output
    assert "reference.cache: computed with layout packed, this run has padded" in output
    keys = {"reference__kind": "cached", "output_dir": out, "cache": "grown", "data__eval": world.folder / "eval.jsonl"}
    codes, output = world.run("train", 1, train__max_steps=4, **keys)
    assert codes == [2]
    assert "30 of 91 pairs are not in it" in output
    command = output[output.index("dpo-ds precompute") :].strip()
    assert f"--data.eval {world.folder / 'eval.jsonl'}" in command and f"--deepspeed.config {ZERO3}" in command

    before = content(world.folder / "grown")
    assert world.run("precompute", cache="grown", data__eval=world.folder / "eval.jsonl")[0] == [0, 0]
    after = content(world.folder / "grown")
    assert {name: after[name] for name in before if name != "MANIFEST.json"}.items() <= before.items()
    assert json.loads(after["MANIFEST.json"])["rows"] == 180
    codes, output = world.run("precompute", 1, cache="grown", data__eval=world.folder / "eval.jsonl")
    assert codes == [0] and "complete, 180 rows" in output

    codes, output = world.run("train", train__max_steps=4, **keys)
    assert codes == [0, 0], output
    assert "8 pairs recomputed" in output and "resumed from" in output
    assert world.run("precompute", cache="other", precompute__shard_rows=60)[0] == [0, 0]
    codes, output = world.run("train", 1, **keys | {"cache": "other", "data__eval": "null"}, train__max_steps=5)
    assert codes == [2] and "the cache in reference.cache is now" in output, output


def test_what_does_not_fit_is_refused_before_a_model_is_loaded(world, cache):
    folder = world.folder
    train = {"reference__kind": "cached", "output_dir": folder / "refused"}

    def refused(ranks=1, command="train", **settings) -> str:
        codes, output = world.run(command, ranks, **(train if command == "train" else {}) | settings)
        assert codes[0] == 2, output
        return next(line for line in output.splitlines() if line.startswith("dpo-ds: error: "))

    wanted = f"holds no cache; fill it with: dpo-ds precompute --model.path {folder / 'model'}"
    assert wanted in refused(cache="nothing")

    damaged = shutil.copytree(cache, folder / "damaged")
    shard = damaged / "shard-000003.parquet"
    bytes_ = bytearray(shard.read_bytes())
    bytes_[len(bytes_) // 2] ^= 1
    shard.write_bytes(bytes_)
    for name in ("damaged", "damaged"):  # also when its copy for lookups is there already
        assert "shard-000003.parquet: SHA-256" in refused(cache=name)

    model = shutil.copytree(folder / "model", folder / "changed")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][5] += 1e-6
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    message = refused(model__path=model)
    ours = json.loads((cache / "MANIFEST.json").read_text())["weights"][:12]
    assert f"weights {ours} of {folder / 'model'}, but {model} now has" in message
    assert "computed with the weights" in refused(command="precompute", model__path=model)

    small = shutil.copytree(folder / "model", folder / "small_model")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    message = refused(command="precompute", model__path=small, cache="small")
    assert "the model's vocab_size is 300; its tokenizer belongs to another model" in message

    other = shutil.copytree(folder / "model", folder / "tokens")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"][0], tokenizer["model"]["merges"][1] = tokenizer["model"]["merges"][1::-1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "computed with the tokenizer" in refused(model__path=other)

    cut = refused(data__max_length=64, data__max_prompt_length=40)
    missing = int(re.search(r"(\d+) of 61 pairs are not in it", cut)[1])
    pairs = json.loads((folder / "refused" / "data_census.json").read_text())["train"]
    assert 0 < missing <= pairs["completions_cut"] < 61 and "--data.max_length 64" in cut


def test_another_template_shows_as_missing_pairs(world):
    chats = {"data__train": world.folder / "chat.jsonl", "cache": "chats"}
    assert world.run("precompute", **chats)[0] == [0, 0]
    model = shutil.copytree(world.folder / "model", world.folder / "template")
    (model / "chat_template.jinja").write_text(CHATML.replace("<", "["))
    codes, output = world.run("train", 1, reference__kind="cached", model__path=model, **chats)
    assert codes == [2] and "20 of 20 pairs are not in it" in output, output


def test_a_model_that_computes_otherwise_fails_the_spot_check(world, cache):
    """The same weights and tokenizer, another config: only the recomputed pairs can tell."""
    model = shutil.copytree(world.folder / "model", world.folder / "config")
    config = json.loads((model / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (model / "config.json").write_text(json.dumps(config))
    codes, output = world.run("train", 1, reference__kind="cached", model__path=model, output_dir=world.folder / "spot")
    assert codes == [2] and "8 pairs recomputed" in output and "more than 1e-04" in output, output


def test_verify_says_what_is_in_a_cache(world, cache, capsys, monkeypatch):
    from dpo_ds.commands.cli import main

    monkeypatch.setenv("RANK", "0")
    assert main(["precompute", "--verify", str(cache)]) == 0
    assert "rows       120 in 8 shards" in capsys.readouterr().out
    assert main(["precompute", "--verify", str(world.folder)]) == 2
    assert "no finished cache" in capsys.readouterr().err
    assert os.environ["RANK"] == "0"
