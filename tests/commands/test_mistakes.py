"""Every mistake a user can make before a model is loaded: exit code 2, one line that names file, row, value and
remedy.
"""

import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForSequenceClassification

from dpo_ds.demo.corpus import preference_rows
from dpo_ds.demo.tiny import random_model, save_tiny_model, special_ids, tiny_config, tiny_llama, train_tokenizer
from tests.ranks import ROOT, WORKERS

GOOD = {"prompt": "Say yes.", "chosen": " yes", "rejected": " no"}
AGAIN = [GOOD | {"prompt": f"Say yes {i} times."} for i in range(3)]


def rows(*bad) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in (*AGAIN, *bad))


def parquet(table: dict) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(table), sink)
    return sink.getvalue().to_pybytes()


WHOLE = {key: [row[key] for row in AGAIN] for key in GOOD}
USER = [{"role": "user", "content": "hello"}]
# name -> (file name, bytes, parts that the line must hold beside the file's name)
DATA = {
    "lacking field": ("a.jsonl", rows({"prompt": "p", "chosen": " c"}), ["a.jsonl:4", "rejected", "on_bad_row skip"]),
    "null": ("b.jsonl", rows(GOOD | {"chosen": None}), ["b.jsonl:4", "chosen", "null"]),
    "wrong type in a row": ("c.jsonl", rows(GOOD | {"chosen": 3}), ["c.jsonl:4", "chosen", "3"]),
    "empty completion": ("d.jsonl", rows(GOOD | {"rejected": "  "}), ["d.jsonl:4", "rejected", "empty"]),
    "equal sides": ("e.jsonl", rows(GOOD | {"rejected": " yes"}), ["e.jsonl:4", "chosen", "rejected", "yes"]),
    "no assistant turn": (
        "f.jsonl",
        json.dumps({"prompt": USER, "chosen": USER, "rejected": [{"role": "user", "content": "x"}]}).encode(),
        ["f.jsonl:1", "assistant"],
    ),
    "not JSON": ("g.jsonl", rows() + b"{'prompt'}\n", ["g.jsonl:4", "JSON"]),
    "not an object": ("h.jsonl", rows() + b"[1]\n", ["h.jsonl:4"]),
    "not UTF-8": ("i.jsonl", rows() + b'{"prompt": "\xff"}\n', ["i.jsonl:4", "UTF-8"]),
    "broken gzip": ("j.jsonl.gz", gzip.compress(rows() * 50)[:-20], ["j.jsonl.gz"]),
    "no gzip": ("k.jsonl.gz", rows(), ["k.jsonl.gz", "gzip"]),
    "broken Parquet": ("l.parquet", parquet(WHOLE)[:-9], ["l.parquet", "arquet"]),
    "half a JSON file": ("m.json", json.dumps(AGAIN).encode()[:-30], ["m.json"]),
    "empty data set": ("n.jsonl", b"", ["n.jsonl"]),
    "empty Parquet": ("o.parquet", parquet({key: pa.array([], pa.string()) for key in GOOD}), ["o.parquet"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """One process goes through every case; a test each looks at its line."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "good.jsonl").write_bytes(rows())
    (folder / "empty").mkdir()
    (folder / "broken.json").write_text("{")
    (folder / "contradicts.json").write_text('{"train_batch_size": 3}')
    (folder / "file").write_text("")
    texts = [row["prompt"] + row["chosen"] for row in preference_rows(20)]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    model = tiny_llama(tokenizer, hidden=16, layers=1)
    save_tiny_model(folder / "model", tokenizer, model)
    save_tiny_model(folder / "no_weights", tokenizer, model)
    (folder / "no_weights" / "model.safetensors").unlink()
    bad_config = save_tiny_model(folder / "bad_config", tokenizer, model) / "config.json"
    bad_config.write_text("{")
    other = train_tokenizer(texts, vocab_size=280)
    save_tiny_model(folder / "other", other, tiny_llama(other, hidden=16, layers=1))
    cut = save_tiny_model(folder / "cut_weights", tokenizer, model) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    typed = save_tiny_model(folder / "typed_config", tokenizer, model) / "config.json"
    typed.write_text(json.dumps(json.loads(typed.read_text()) | {"hidden_size": "wide"}))
    sizes = {"hidden": 16, "layers": 1, **special_ids(tokenizer)}
    few = random_model(tiny_config("gpt2", len(tokenizer), n_positions=8, **sizes))
    save_tiny_model(folder / "few_positions", tokenizer, few)
    small = random_model(tiny_config("llama", 60, **sizes))
    save_tiny_model(folder / "small_vocabulary", tokenizer, small)
    model.config.num_labels = 3
    classifier = AutoModelForSequenceClassification.from_config(model.config)
    save_tiny_model(folder / "three_labels", tokenizer, classifier)
    tokenizer.eos_token = None
    save_tiny_model(folder / "no_eos", tokenizer, model)

    base = {
        "model.path": folder / "model", "data.train": folder / "good.jsonl", "output_dir": folder / "out",
        "deepspeed.config": "ds_configs/zero3_cpu.json",
    }  # fmt: skip
    cases = {}
    for name, (file, content, _) in DATA.items():
        (folder / file).write_bytes(content)
        cases[name] = {"data.train": folder / file}
    cases |= {
        "bad evaluation data": {"data.eval": folder / "a.jsonl"},
        "missing file": {"data.train": folder / "goood.jsonl"},
        "empty folder": {"data.train": folder / "empty"},
        "unknown format": {"data.format": "shargpt"},
        "model path is a file": {"model.path": folder / "file"},
        "model path is missing": {"model.path": folder / "nowhere"},
        "model path is no model": {"model.path": folder / "empty"},
        "model without weights": {"model.path": folder / "no_weights"},
        "model with a broken config": {"model.path": folder / "bad_config"},
        "weights cut short": {"model.path": folder / "cut_weights"},
        "config of a wrong type": {"model.path": folder / "typed_config"},
        "more tokens than positions": {"model.path": folder / "few_positions"},
        "more tokens than the vocabulary": {"model.path": folder / "small_vocabulary"},
        "weights that leave nothing": {"data.train": f"[{{path: {folder / 'good.jsonl'}, weight: 0.01}}]"},
        "tokenizer without EOS": {"model.path": folder / "no_eos"},
        "reference of another vocabulary": {"reference.path": folder / "other"},
        "missing DeepSpeed JSON": {"deepspeed.config": folder / "none.json"},
        "broken DeepSpeed JSON": {"deepspeed.config": folder / "broken.json"},
        "DeepSpeed JSON that contradicts": {"deepspeed.config": folder / "contradicts.json"},
        "output_dir is a file": {"output_dir": folder / "file"},
        "output_dir not writable": {"output_dir": "/proc/out"},
        "resume from no checkpoint": {"checkpoint.resume": folder / "empty"},
    }
    rewards = {
        "reward model of three labels": {"model.path": folder / "three_labels"},
        "no column of margins": {"reward.margin_column": "gaps"},
        "margin below 0": {"data.train": folder / "p.jsonl", "reward.margin_column": "gap"},
        "missing calibration data": {"reward.calibration": folder / "calibrate.jsonl"},
    }
    (folder / "p.jsonl").write_bytes(rows(GOOD | {"gap": -1}).splitlines(keepends=True)[-1])
    draws = {key: value for key, value in base.items() if key != "data.train"}
    draws |= {"rl.prompts": base["data.train"], "rl.score": "regex:yes"}
    from_draws = {
        "critic of three labels": {"rl.critic": folder / "three_labels"},
        "critic of another vocabulary": {"rl.critic": folder / "other"},
        "prompts that do not fit": {"model.path": folder / "few_positions", "rl.max_new_tokens": 4},
        "score that is not there": {"rl.score": "no_such_module:score"},
        "missing prompts": {"rl.prompts": folder / "goood.jsonl"},
        "prompts whose eval is wrong": {"rl.eval_prompts": folder / "h.jsonl"},
    }
    argv = {
        name: [command, *(text for key, value in (given | settings).items() for text in (f"--{key}", str(value)))]
        for command, given, named in (("train", base, cases), ("reward", base, rewards), ("rl", draws, from_draws))
        for name, settings in named.items()
    }
    (folder / "cases.json").write_text(json.dumps(argv))
    done = subprocess.run(
        [sys.executable, WORKERS / "mistakes.py", folder / "cases.json", folder / "results.json"],
        env={"PATH": "/nowhere", "PYTHONPATH": str(ROOT), "DPO_DS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


PARTS = {name: parts for name, (_, _, parts) in DATA.items()} | {
    "bad evaluation data": ["a.jsonl:4", "rejected"],
    "missing file": ["goood.jsonl", "good.jsonl"],
    "empty folder": ["empty"],
    "unknown format": ["shargpt", "sharegpt"],
    "model path is a file": ["--model.path", "is a file"],
    "model path is missing": ["nowhere", "does not exist"],
    "model path is no model": ["empty", "no config.json"],
    "model without weights": ["no weights", "--model.from_config true"],
    "model with a broken config": ["bad_config/config.json", "not JSON"],
    "weights cut short": ["cut_weights", "model.safetensors", "cut short"],
    "config of a wrong type": ["typed_config", "hidden_size", "wide"],
    "more tokens than positions": ["8 positions", "--data.max_length 8"],
    "more tokens than the vocabulary": ["vocab_size is 60"],
    "weights that leave nothing": ["[0.01]", "no pair"],
    "tokenizer without EOS": ["no_eos", "EOS", "tokenizer_config.json"],
    "reference of another vocabulary": ["--reference.path", "280", "300"],
    "missing DeepSpeed JSON": ["none.json", "no such file"],
    "broken DeepSpeed JSON": ["broken.json:1:2", "not JSON"],
    "DeepSpeed JSON that contradicts": ["contradicts.json", "train_batch_size 3", "train.global_batch_size 64"],
    "output_dir is a file": ["--output_dir", "not writable"],
    "output_dir not writable": ["--output_dir /proc/out", "not writable"],
    "resume from no checkpoint": ["--checkpoint.resume", "MANIFEST.json"],
    "reward model of three labels": ["three_labels", "3 labels", "causal language model"],
    "no column of margins": ["good.jsonl:1", "lacks 'gaps'"],
    "margin below 0": ["p.jsonl:1", "'gap' is -1", "between 0 and", "on_bad_row skip"],
    "missing calibration data": ["calibrate.jsonl"],
    "critic of three labels": ["--rl.critic", "three_labels", "3 labels", "causal language model"],
    "critic of another vocabulary": ["--rl.critic", "280", "300", "give --rl.critic"],
    "prompts that do not fit": ["rl.max_new_tokens", "8 positions", "--data.max_prompt_length 4"],
    "score that is not there": ["--rl.score no_such_module:score", "PYTHONPATH"],
    "missing prompts": ["goood.jsonl", "good.jsonl"],
    "prompts whose eval is wrong": ["h.jsonl:4"],
}


@pytest.mark.parametrize("name", PARTS)
def test_one_line_names_the_mistake(outcomes, name):
    code, stderr = outcomes[name]
    assert code == 2, stderr
    assert stderr.startswith("dpo-ds: error: ") and stderr.count("\n") == 1, stderr
    assert [part for part in PARTS[name] if part not in stderr] == [], stderr


def test_deepspeed_was_never_imported(outcomes):
    assert outcomes["deepspeed imported"] is False
