"""Keys, their sources and their mistakes: the config and the command line, without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dpo_ds import config
from dpo_ds.commands import cli
from dpo_ds.errors import ConfigError

REQUIRED = ["--model.path", "m", "--data.train", "d", "--deepspeed.config", "c", "--output_dir", "o"]


def parse(*argv: str):
    return cli.parse(["train", *REQUIRED, *argv])[1]


def mistake(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        cli.parse(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_building_a_parser_imports_no_torch(command):
    code = (
        f"import sys, contextlib; from dpo_ds.commands.cli import parse\n"
        f"with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit): parse([{command!r}, '--help'])\n"
        "print([m for m in ('torch', 'deepspeed', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_help_lists_every_key_with_its_default(capsys):
    for command, settings in config.COMMANDS.items():
        with pytest.raises(SystemExit) as stop:
            cli.parse([command, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0
        assert all(f"--{key}" in text for key in config.keys(settings))


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("train", "--train.layout {packed,padded}\n"),
        ("train", "--train.max_steps int >= 1 or null\n"),
        ("train", "--loss.label_smoothing 0 <= float < 0.5\n"),
        ("train", "--train.adam_betas [float, float]\n"),
        ("train", "--model.lora.target_modules text or list of them\n"),
        ("train", "--data.train text or list of (text or mapping)\n"),
        ("train", "--model.from_config [{true,false}]\n"),
        ("train", "add up: {dpo, dpop,"),
        ("train", "wsd, inverse_sqrt} (default linear)"),
        ("sample", "--sample.top_p 0 < float <= 1\n"),
        ("export", "--dtype {auto,fp32,bf16}\n"),
    ],
)
def test_help_tells_types_choices_and_ranges(command, line, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert line in cli.parser_for(command).format_help()


def test_help_fits_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for command in config.COMMANDS:
        assert max(map(len, cli.parser_for(command).format_help().splitlines())) <= 100


def test_the_table_of_commands_names_what_is_there():
    assert cli.COMMANDS.keys() - cli.ABOUT_A_RUN.keys() == config.COMMANDS.keys()  # those take the run's keys
    for command in cli.COMMANDS.values():
        module, function = command.start.split(":")
        source = Path(cli.__file__).parent / f"{module.replace('.', '/')}.py"
        assert f"\ndef {function}(" in source.read_text()


def test_defaults_are_the_contract():
    flat = config.flatten(config.to_plain(parse()))
    expected = {
        "data.max_length": 2048, "data.max_prompt_length": 1024, "data.limit": None, "data.on_bad_row": "error",
        "data.format": "auto", "loss.name": "dpo", "loss.beta": 0.1, "loss.label_smoothing": 0, "reference.kind":
        "live", "train.global_batch_size": 64, "train.micro_batch_tokens": 8192, "train.epochs": 1, "train.max_steps":
        None, "train.learning_rate": 5e-7, "train.schedule": "linear", "train.warmup_steps": 0, "train.weight_decay": 0,
        "train.max_grad_norm": 1.0, "train.adam_betas": [0.9, 0.999], "train.adam_eps": 1e-8, "train.seed": 0,
        "train.eval_every": 0, "checkpoint.every": 0, "checkpoint.keep": 2, "checkpoint.resume": "auto",
        "model.attn": "auto", "model.from_config": False, "model.quantize": None,
    }  # fmt: skip
    assert {key: flat[key] for key in expected} == expected


def test_command_line_beats_yaml_beats_defaults_and_the_last_flag_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {learning_rate: 1e-4, seed: 3, epochs: 2}\nloss: {beta: 0.5}\n")
    run = parse("--config", str(path), "--train.seed", "4", "--train.seed=5")
    assert (run.train.learning_rate, run.train.seed, run.train.epochs, run.loss.beta) == (1e-4, 5, 2, 0.5)


def test_empty_sections_dates_and_the_home_folder(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train:\noutput_dir: 2024-13-45\n")
    run = cli.parse(["train", *REQUIRED[:-2], "--config", str(path), "--train.max_steps", "3"])[1]
    assert (run.train.max_steps, run.output_dir) == (3, "2024-13-45")
    assert parse("--output_dir", "~/out").output_dir == str(Path.home() / "out")
    path.write_text("model:\n  lora:\n")
    assert parse("--config", str(path), "--model.lora.r", "8").model.lora.r == 8
    path.write_text("model: {lora: 8}\n")
    assert "lora: 8 is no section, so --model.lora.r" in mistake(
        "train", *REQUIRED, "--config", str(path), "--model.lora.r", "8"
    )


def test_a_max_length_alone_leaves_half_of_it_to_the_prompt():
    def limits(*argv):
        data = parse(*argv).data
        return data.max_length, data.max_prompt_length

    assert limits("--data.max_length", "512") == (512, 256)
    assert limits("--data.max_length", "1024") == (1024, 512)
    assert limits("--data.max_length", "1025") == (1025, 1024)
    assert limits("--data.max_length", "512", "--data.max_prompt_length", "500") == (512, 500)
    assert limits("--data.max_length", "512.0") == limits("--data.max_length", "5_12") == (512, 256)


@pytest.mark.parametrize(
    "given", ["max_length: 512", "max_length: 4096", "max_prompt_length: 90", "max_length: 300, max_prompt_length: 290"]
)
def test_every_command_cuts_prompts_at_one_length(tmp_path, given):
    """One YAML file for train, sample and evaluate, as the pipeline is run."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{path: m}}\ndata: {{{given}, train: x, eval: x}}\ndeepspeed: {{config: d}}\noutput_dir: o\n"
        "sample: {prompts: p, to: t}\nevaluate: {policy: m}\n"
    )
    runs = [cli.parse([command, "--config", str(path)])[1] for command in ("train", "sft", "sample", "evaluate")]
    assert len({run.data.max_prompt_length for run in runs}) == 1


def test_a_prompt_alone_needs_no_room_for_a_completion():
    run = cli.parse(
        ["sample", "--model.path", "m", "--sample.prompts", "p", "--sample.to", "t", "--deepspeed.config", "d",
         "--data.max_prompt_length", "9000"]
    )[1]  # fmt: skip
    assert run.data.max_prompt_length == 9000


def test_a_mistake_in_the_keys_does_not_leave_an_earlier_done(tmp_path):
    status = tmp_path / "STATUS.json"
    for argv in (["--output_dir", str(tmp_path), "--loss.nam", "x"], ["--loss.nam", "x", f"--output_dir={tmp_path}"]):
        status.write_text('{"state": "done", "reason": "", "step": 4, "exit_code": 0}')
        assert cli.main(["train", *argv]) == 2
        assert json.loads(status.read_text())["state"] == "failed"


def test_under_torchrun_which_returns_1_a_mistake_in_the_keys_is_in_a_new_status(tmp_path, monkeypatch):
    argv = ["train", "--output_dir", str(tmp_path / "new" / "run"), "--loss.nam", "x"]
    assert cli.main(argv) == 2 and not (tmp_path / "new").exists()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert cli.main(argv) == 2
    status = json.loads((tmp_path / "new" / "run" / "STATUS.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2) and "unknown key --loss.nam" in status["reason"]


def test_launchers_local_rank_before_the_command_is_taken_off():
    assert cli.parse(["--local_rank=1", "sft", *REQUIRED])[0] == "sft"


def test_lists_with_weights_null_and_switches():
    run = parse("--data.train", "[a.jsonl, {path: b.jsonl, weight: 2}]", "--data.eval", "null", "--model.from_config")
    assert run.data.train == ["a.jsonl", {"path": "b.jsonl", "weight": 2.0}]
    assert run.data.eval is None
    assert run.model.from_config is True


def test_what_is_written_can_be_read_again(tmp_path):
    run = parse("--train.adam_betas", "[0.8, 0.9]", "--data.columns", "{chosen: better}")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_plain(run) | {config.RECORDED: {"versions": {"torch": "2"}}}))
    assert config.load("train", str(path), {})[0] == run


def test_one_file_serves_sft_and_train_and_says_what_is_unused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("loss: {beta: 0.5}\nreference: {kind: live}\n")
    notes = cli.parse(["sft", *REQUIRED, "--config", str(path)])[2]
    assert notes == [f"{path}: sft does not use loss, reference"]
    assert "unknown key --loss.beta" in mistake("sft", *REQUIRED, "--loss.beta", "0.5")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean 'train'?"]),
        (["train", *REQUIRED[2:]], ["model.path is required"]),
        (["train", *REQUIRED, "--train.learning_rte", "1"], ["--train.learning_rte", "'train.learning_rate'?"]),
        (["train", *REQUIRED, "--learning_rate=1"], ["--learning_rate", "here: --train.learning_rate"]),
        (["train", *REQUIRED, "stray"], ["unexpected argument 'stray'"]),
        (["train", *REQUIRED, "--train.epochs"], ["--train.epochs"]),
        (["train", *REQUIRED, "--train.max_steps", "3.5"], ["--train.max_steps", "'3.5'", "integer"]),
        (["train", *REQUIRED, "--train.max_steps", "0"], ["--train.max_steps", "'0'", "greater than 0"]),
        (["train", *REQUIRED, "--loss.beta", "nan"], ["--loss.beta", "'nan'", "finite"]),
        (["train", *REQUIRED, "--loss.beta", "-0.1"], ["--loss.beta", "'-0.1'", "greater than or equal to 0.000001"]),
        (["train", *REQUIRED, "--loss.label_smoothing", "0.5"], ["less than 0.5"]),
        (["train", *REQUIRED, "--loss.name", "dop"], ["unknown loss 'dop'", "did you mean 'dpop'?"]),
        (["train", *REQUIRED, "--train.schedule", "cubic"], ["--train.schedule", "'cubic'", "'linear'"]),
        (["train", *REQUIRED, "--train.adam_betas", "[0.9, 1.0]"], ["train.adam_betas", "[0, 1)"]),
        (["train", *REQUIRED, "--data.train", "[]"], ["data.train", "empty list"]),
        (["train", *REQUIRED, "--data.train", "[{path: a, weight: 0}]"], ["weight 0 of a"]),
        (["train", *REQUIRED, "--data.train", "[{file: a}]"], ["is not a source"]),
        (["train", *REQUIRED, "--data.columns", "{a"], ["--data.columns '{a'", "not a YAML"]),
        (
            ["train", *REQUIRED, "--data.max_length", "9", "--data.max_prompt_length", "9"],
            ["max_prompt_length 9 must be below"],
        ),
        (["train", *REQUIRED, "--config", "/nowhere.yaml"], ["/nowhere.yaml: no such file"]),
        (["train", *REQUIRED, "--reference.kind", "cahced"], ["--reference.kind", "'cahced'", "live"]),
    ],
)
def test_each_mistake_is_one_line_with_the_value_and_the_remedy(argv, parts):
    line = mistake(*argv)
    assert [part for part in parts if part not in line] == [], line


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b"train: {sead: 3}\n", ["unknown key 'train.sead'", "'train.seed'?"]),
        (b"trian: {seed: 3}\n", ["unknown key 'trian'"]),
        (b"train: {seed: soon}\n", ["train.seed: 'soon'", "integer"]),
        (b"train: 3\n", ["train"]),
        (b"train: {seed: 3\n", ["run.yaml:2:1", "not usable YAML"]),
        (b"- a\n", ["holds a list"]),
        (b"train: [1]\n", ["train is [1]", "expected keys below it"]),
        (b"train: {seed: 1}\ntrain: {epochs: 2}\n", ["run.yaml:2:1", "'train' is given twice"]),
        (b"train.seed: 1\n", ["'train.seed' is written with a dot"]),
        (b"train: {max_steps: yes}\n", ["max_steps", "'yes' should be a valid integer"]),
        (b"train: {max_steps: true}\n", ["max_steps", "'true' is neither a number nor text"]),
        (b"model: {path: \xff}\n", ["not UTF-8 at byte 14"]),
    ],
)
def test_mistakes_in_yaml_name_the_file(tmp_path, text, parts):
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    line = mistake("train", *REQUIRED, "--config", str(path))
    assert [part for part in [*parts, "run.yaml"] if part not in line] == [], line


def test_the_command_ends_with_exit_code_2_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dpo_ds", "train", *REQUIRED, "--train.sed", "1"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "dpo-ds: error: unknown key --train.sed; did you mean 'train.seed'?\n"
    assert done.stdout == ""


def test_a_chat_template_is_a_files_text_a_text_or_a_name(tmp_path, monkeypatch):
    """The config holds the text, so that what records it does not depend on the file."""
    monkeypatch.chdir(tmp_path)
    Path("a.jinja").write_text("{{ messages }}")
    assert parse().data.chat_template is None
    assert parse("--data.chat_template", "a.jinja").data.chat_template == "{{ messages }}"
    assert parse("--data.chat_template", "{%- if x %}{% endif %}").data.chat_template == "{%- if x %}{% endif %}"
    assert parse("--data.chat_template", "tool_use").data.chat_template == "tool_use"
    (tmp_path / "run.yaml").write_text("data: {chat_template: a.jinja}")
    assert parse("--config", "run.yaml").data.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.jinja", "--data.chat_template nowhere.jinja: no such file"),
        ("some/name", "--data.chat_template some/name: no such file"),
        (".", "--data.chat_template .: is a folder, not a file"),
        ("notes.txt", "--data.chat_template: 'notes.txt' holds no Jinja: a chat template has {{ or {% in it"),
        ("x" * 300, "is too long: 255 bytes a name"),
    ],
)
def test_a_chat_template_that_is_none(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("hello")
    assert message in mistake("train", *REQUIRED, "--data.chat_template", given)
