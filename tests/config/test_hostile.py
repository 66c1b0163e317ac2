"""What strangers and typing mistakes put into YAML, JSON and the command line: one line each, and no wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

from dpo_ds import config
from dpo_ds.commands import cli
from dpo_ds.config import LoraSection, yaml_file
from dpo_ds.config import deepspeed as ds_config
from dpo_ds.errors import ConfigError
from dpo_ds.memory import allocations
from dpo_ds.models.lora import check_lora

REQUIRED = ["--model.path", "m", "--data.train", "d", "--deepspeed.config", "c", "--output_dir", "o"]
EVALUATE = ["--evaluate.policy", "p", "--data.eval", "d", "--deepspeed.config", "c", "--output_dir", "o"]
SAMPLE = ["--model.path", "m", "--sample.prompts", "p", "--sample.to", "t", "--deepspeed.config", "c"]


def mistake(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        cli.parse(argv)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 700, line
    return line


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", "010"), ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("0x10", "0x10"), ("no", "no"), ("on", "on"),
        ("2024-01-01", "2024-01-01"), ("10", 10), ("-3", -3), ("1.5", 1.5), ("true", True), ("~", None), ("", None),
        ("'010'", "010"), ("{<<: {a: 1}}", {"a": 1}),
    ],
)  # fmt: skip
def test_yaml_is_read_as_people_mean_it(text, value):
    assert yaml_file.parse(text) == value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {seed: 1:30}\n", ["train.seed: '1:30' should be a valid integer"]),
        ("train: {seed: 1, seed: 2}\n", [":1:18", "'seed' is given twice"]),
        ("data: {train: [{path: a, path: b}]}\n", ["'path' is given twice"]),
        ("[a]: 1\n", [":1:1", "a list or mapping cannot be a key"]),
        ("train: {? {a: 1} : 2}\n", ["a list or mapping cannot be a key"]),
        ("train: " + "[" * 5000 + "]" * 5000, ["nested too deeply"]),
        ("data: {train: &a [*a]}\n", ["data.train", "nested too deeply"]),
        (f"train: {{seed: {'9' * 5000}}}\n", ["4300 digits"]),
        (f"train: {{seed: {'9' * 4000}}}\n", ["train.seed: 9999", "beyond 4294967295"]),
        ('output_dir: "a\\0b"\n', ["output_dir", "holds a NUL"]),
        ('data: {train: [{path: "a\\0b"}]}\n', ["data.train", "holds a NUL"]),
        ("null: 1\n", ["unknown key"]),
        ("model: {lora: {target_modules: '['}}\n", ["model.lora.target_modules", "'[' is no regular expression"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_yaml_that_cannot_be_used(tmp_path, text, parts):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    rest = {"--model.path": "m", "--data.train": "d", "--output_dir": "o", "--deepspeed.config": "c"}
    rest = {flag: value for flag, value in rest.items() if not text.startswith(flag[2:].replace(".", ": {"))}
    line = mistake("train", *(word for pair in rest.items() for word in pair), "--config", str(path))
    assert [part for part in [*parts, "run.yaml"] if part not in line] == [], line


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["train", *REQUIRED, "--train.max_steps", str(10**30)], ["--train.max_steps", "beyond 4294967295"]),
        (["train", *REQUIRED, "--train.micro_batch_tokens", str(10**12)], ["micro_batch_tokens", "beyond"]),
        (["train", *REQUIRED, "--train.learning_rate", "1e308"], ["--train.learning_rate", "beyond"]),
        (["train", *REQUIRED, "--train.max_grad_norm", "1e308"], ["--train.max_grad_norm", "beyond"]),
        (["train", *REQUIRED, "--train.seed", "9" * 5000], ["--train.seed", "a number of fewer digits"]),
        (["train", *REQUIRED, "--train.seed", "²"], ["--train.seed", "valid integer"]),
        (["train", *REQUIRED, "--data.max_length", "²"], ["--data.max_length", "valid integer"]),
        (["train", *REQUIRED, "--data.max_length", "9" * 5000], ["--data.max_length", "fewer digits"]),
        (["train", *REQUIRED, "--loss.beta", "1e-30"], ["--loss.beta", "0.000001"]),
        (["train", *REQUIRED, "--loss.beta", "1e308"], ["--loss.beta", "1000"]),
        (["train", *REQUIRED, "--loss.sft_weight", "1e300"], ["--loss.sft_weight", "beyond"]),
        (["train", *REQUIRED, "--loss.name", "[dpo, ipo]", "--loss.weights", "[1, -1]"], ["loss.weights", "0 or more"]),
        (["train", *REQUIRED, "--loss.name", "[dpo, ipo]", "--loss.weights", "[0, 0]"], ["loss.weights", "above 0"]),
        (["train", *REQUIRED, "--loss.name", "[dpo, ipo]", "--loss.weights", "[1, 1e300]"], ["weights", "beyond"]),
        (["train", *REQUIRED, "--data.train", "[{path: a, weight: 1e308}]"], ["weight", "at most 4294967295"]),
        (["train", *REQUIRED, "--model.lora.r", str(10**12)], ["--model.lora.r", "65536"]),
        (["train", *REQUIRED, "--data.train", "[" * 5000], ["--data.train", "nested too deeply"]),
        (["train", *REQUIRED, "--data.train", "x" * 300], ["--data.train", "too long: 255 bytes a name"]),
        (["train", *REQUIRED, "--data.train", f"[{'x' * 300}]"], ["--data.train", "too long"]),
        (["train", *REQUIRED, "--output_dir", "x/" * 3000], ["--output_dir", "too long"]),
        (["train", *REQUIRED, "--model.path", "~nosuchuser/m"], ["--model.path", "no user 'nosuchuser'"]),
        (["train", *REQUIRED, "--output_dir", "\udc80"], ["--output_dir", "holds half a surrogate pair"]),
        (["train", *REQUIRED, "--train.adam_betas", "[0.9]"], ["--train.adam_betas", "should be [float, float]"]),
        (["train", *REQUIRED, "--train.adam_betas", "0.9,0.95"], ["'0.9,0.95' should be [float, float]"]),
        (["train", *REQUIRED, "--data.columns", "prompt"], ["'prompt' should be a mapping, as {key: value}"]),
        (["train", *REQUIRED, "--train.adam_betas", "[1, 2, 3]"], ["adam_betas", "should be [float, float]"]),
        (["train", *REQUIRED, "--train.sample_every", "3"], ["train.sample_every 3", "sample.prompts"]),
        (["train", *REQUIRED, "--tracking.to", "wandbb"], ["--tracking.to", "'wandbb'", "'wandb'"]),
        (["train", *REQUIRED, "--tracking.to", "[aim, aim]"], ["--tracking.to", "names one twice"]),
        (["train", *REQUIRED, "--hub.push", "name"], ["--hub.push", "'name' has no owner", "OWNER/NAME"]),
        (["export", "a", "--to", "b", "--push", "a/b/c"], ["--push", "'a/b/c' is no name on the Hub"]),
        (["train"], ["model.path, data.train, deepspeed.config, output_dir are required"]),
        (["evaluate", *EVALUATE, "--evaluate.n", str(10**12)], ["--evaluate.n", "65536"]),
        (["evaluate", *EVALUATE, "--evaluate.bootstrap", str(10**12)], ["--evaluate.bootstrap", "1000000"]),
        (["evaluate", *EVALUATE, "--evaluate.threads", str(10**12)], ["--evaluate.threads", "1024"]),
        (["sample", *SAMPLE, "--sample.temperature", "1e-300"], ["--sample.temperature", "give 0"]),
        (["sample", *SAMPLE, "--sample.seed", str(10**30)], ["--sample.seed", "beyond"]),
    ],
)
def test_command_lines_that_cannot_be_used(argv, parts):
    line = mistake(*argv)
    assert [part for part in parts if part not in line] == [], line


def test_a_mistake_names_the_file_only_for_what_the_file_says(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {max_prompt_length: 600}\ntrain: {seed: 1}\n")
    of_both = mistake("train", *REQUIRED, "--config", str(path), "--data.max_length", "512")
    assert of_both.startswith("data.max_prompt_length 600 must be below data.max_length 512")
    assert mistake("train", *REQUIRED, "--config", str(path), "--train.seed", "-1").startswith("--train.seed: '-1'")
    path.write_text("data: {max_prompt_length: 600, max_length: 512}\n")
    assert mistake("train", *REQUIRED, "--config", str(path)).startswith(f"{path}: data.max_prompt_length 600")


def test_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = cli.parse(["train", *REQUIRED, "--data.train", "[~/a, {path: ~/b, weight: 2}]", "--output_dir", "~/out"])[1]
    assert run.data.train == [f"{tmp_path}/a", {"path": f"{tmp_path}/b", "weight": 2.0}]
    assert run.output_dir == f"{tmp_path}/out"


@pytest.mark.parametrize("name", ["a\nb", "a b", "$(x)", "ä", "a%h"])
def test_odd_names_are_names(name):
    run = cli.parse(["train", *REQUIRED, "--output_dir", name])[1]
    assert run.output_dir == name
    assert str(ConfigError(f"{name}: no such file")) == f"{name}: no such file".replace("\n", "\\n")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_what_is_no_file_is_not_read(tmp_path, make):
    path = tmp_path / "odd"
    make(path)
    assert ", not a file" in mistake("train", *REQUIRED, "--config", str(path))
    with pytest.raises(ConfigError, match="--deepspeed.config .*, not a file"):
        ds_config.read(str(path))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[" * 50000, "nested too deeply"),
        ('{"gradient_clipping": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"gradient_clipping": NaN}', "NaN is no number"),
        ('{"zero_optimization": {"stage": 3, "stage": 2}}', "'stage' is given twice"),
    ],
    ids=["deep", "digits", "nan", "twice"],
)
def test_json_that_cannot_be_used(tmp_path, text, part):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=part) as caught:
        ds_config.read(str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_adapters_are_of_low_rank():
    check_lora(LoraSection(r=64), width=64)
    with pytest.raises(ConfigError, match="--model.lora.r 65 is beyond the model's width of 64"):
        check_lora(LoraSection(r=65), width=64)


def test_home_in_config_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("train: {seed: 7}")
    assert cli.parse(["train", *REQUIRED, "--config=~/run.yaml"])[1].train.seed == 7


def test_a_terminal_that_is_ascii():
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "dpo_ds", "sample", "--help"], capture_output=True, text=True, env=env, check=True
    )
    assert "probability \\u03c3(" in " ".join(done.stdout.split())


@pytest.mark.parametrize("ranks", ["0", "-2", str(10**12)])
def test_the_memory_command_takes_ranks_that_can_be(tmp_path, ranks, capsys):
    with pytest.raises(SystemExit) as stop:
        allocations.main([str(tmp_path / "run.yaml"), "--ranks", ranks])
    assert stop.value.code == 2 and f"--ranks {ranks}: must be from 1 to" in capsys.readouterr().err




NASTY = [
    "", " ", "0", "-1", "1e308", "nan", "9" * 5000, "[", "]", "[]", "{}", "[[]]", "{a: {b: c}}", "{[a]: b}", "{1: 2}",
    "null", "~x", "true", "a\nb", "\0", "\ud800", "x" * 5000, "[&a [*a]]", "!!python/object:x {}", "1:30", "²", "--",
    "regex:(",
    "[null]", "[{path: 3}]", "[{}]", "[{path: a, weight: [1], beta: {}}]", "[0.9]", "[-1, 2, 3]",
]  # fmt: skip
NEEDED = {
    "train": REQUIRED, "sft": REQUIRED, "reward": REQUIRED, "evaluate": EVALUATE, "sample": SAMPLE,
    "export": ["--source", "s", "--to", "t"],
    "convert": ["--file", "f"],
    "rl": [*REQUIRED[:2], *REQUIRED[4:], "--rl.prompts", "p", "--rl.score", "m:f"],
    "precompute": [*REQUIRED[:-2], "--reference.cache", "r"],
}  # fmt: skip


def test_no_value_of_any_key_is_a_traceback_or_a_page():
    """Every key with every odd value: it is taken, or one line of a length that can be read says why not."""
    assert NEEDED.keys() == config.COMMANDS.keys()
    seen = set()
    for command, words in NEEDED.items():
        needed = {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
        for key in config.keys(config.COMMANDS[command]).keys() - seen:
            seen.add(key)
            for value in NASTY:
                try:
                    run, _ = config.load(command, None, needed | {key: value})
                    yaml.safe_dump(config.to_plain(run))
                except ConfigError as refused:
                    assert "\n" not in str(refused) and len(str(refused)) < 900, (key, value)
