"""`dpo-ds plan` of rl: an iteration's phases by arithmetic on a tiny model, and what it changes if that is too much."""

import json

import pytest
import yaml

from dpo_ds.commands import cli
from dpo_ds.commands.plan import fitting
from tests.commands.test_plan import LAYER, NUMEL, SIZES, plan
from tests.ranks import ROOT

CARD = "10GB:1TFLOPS:0.001TB/s"


@pytest.fixture
def config(tmp_path):
    """Ten prompts of at most 32 tokens, two completions of 8 each, four prompts an iteration, passed twice."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' * 10)
    run = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"max_prompt_length": 32},
        "rl": {
            "prompts": str(tmp_path / "prompts.jsonl"), "score": "regex:a", "algorithm": "rloo", "n": 2,
            "max_new_tokens": 8, "batch_size": 4, "epochs": 2,
        },
        "train": {"global_batch_size": 4, "micro_batch_tokens": 192},
        "deepspeed": {"config": str(ROOT / "ds_configs/zero3_bf16.json")},
        "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def forward(length: int, targets: int) -> float:
    """FLOPs of a prompt with two completions of that length: layers, head, and 2 x 64 x 2 a query and key and layer."""
    attended = 2 * (32 + length) * (33 + length) / 2 - 32 * 33 / 2
    return 2 * 2 * LAYER * (32 + 2 * length) + 2 * 64 * 64 * targets + 2 * 64 * 2 * 2 * attended


def test_an_iterations_phases_are_arithmetic(config, capsys):
    """Either GPU draws two prompts' four completions together: eight times through all weights, the last token of which
    is read by nobody, and past the keys and values of 32 to 39 tokens, 2 x 2 layers x 64 numbers of 2 bytes each."""
    words = [config, "--gpus", 2, "--gpu", CARD, "--efficiency", 0.5]
    found = plan(capsys, *words)
    step, run = found["step"], found["run"]
    drawing, measuring, update = (step["phases"][name] for name in ("generation", "measuring", "update"))
    assert drawing["flops"] == 4 * forward(7, 1 + 14)
    assert drawing["read_bytes_of_a_gpu"] == 8 * 2 * NUMEL + 4 * sum(range(32, 40)) * 512
    assert drawing["seconds"] == pytest.approx(drawing["read_bytes_of_a_gpu"] / 1e9)
    assert drawing["received_bytes_of_a_gpu"] == 8 * 2 * NUMEL // 2
    assert measuring["flops"] == 4 * 2 * forward(8, 16)  # policy and live reference
    assert update["flops"] == 2 * 4 * 3 * forward(8, 16)
    assert update["seconds"] == pytest.approx(update["flops"] / (2 * 1e12 * 0.5))
    assert update["received_bytes_of_a_gpu"] == 2 * 3 * 2 * NUMEL // 2  # passes; weights twice, gradients
    assert (step["tokens"], step["micro_batches"]) == (4 * (32 + 16), 2)
    assert step["seconds"] == pytest.approx(sum(phase["seconds"] for phase in step["phases"].values()))
    assert (run["steps"], run["counted_from"]) == (3, "10 rows of rl.prompts once, 4 an update")

    words += ["--rl.algorithm", "ppo", "--rl.replica", "true", "--rl.score", config.parent / "model"]
    more = plan(capsys, *words)["step"]["phases"]
    of_critic = forward(8, 0)
    assert more["update"]["flops"] == update["flops"] + 2 * 4 * 3 * of_critic
    assert more["measuring"]["flops"] == measuring["flops"] + 4 * of_critic
    assert more["scoring"]["flops"] == 8 * (2 * 2 * LAYER * 40 + 2 * 64 * 2 * 2 * 40 * 41 / 2)  # eight whole texts
    assert more["generation"]["received_bytes_of_a_gpu"] == 2 * NUMEL // 2  # the copy is renewed once


def test_the_table_tells_what_is_not_known(config, capsys):
    assert cli.main(["plan", str(config), "--gpus", "2", "--gpu", "h100", "--train.max_steps", "5"]) == 0
    out = capsys.readouterr().out
    assert "of 4 prompts with 2 completions each (--lengths 32,8, the longest allowed" in out
    for words in ("generation: at least", "--rl.replica true spares it", "'regex:a' takes its own time", "(rl)"):
        assert words in out


def test_what_is_drawn_together_shrinks_before_the_optimizer_leaves_the_gpu(config):
    """To a prompt's two completions at the least; online DPO's and others' reference cannot be cached."""
    given = cli.parse(["plan", str(config), "--gpus", "2", "--gpu", "h100", "--rl.replica", "true"])[1].run
    start = fitting.Proposal(given, {}, None, 2, 1, None, None)
    assert [change.what for change in fitting._drawing(start)] == [
        "rl.replica false", "rl.replica false, rl.batch_size 2",
    ]  # fmt: skip
    assert not list(fitting._reference(start)) and start.longest == 32 + 2 * 8


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["plan", "--gpus", "2", "--gpu", "10GB:1TFLOPS"], "add its bandwidth, as 10GB:1TFLOPS:2TB/s"),
        (["doctor"], "this is a run of dpo-ds rl, by its sections; dpo-ds doctor looks at train, sft, reward"),
    ],
)
def test_mistakes_cost_one_line(config, capsys, words, problem):
    assert cli.main([words[0], str(config), *words[1:]]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1
