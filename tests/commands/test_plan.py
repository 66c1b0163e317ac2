"""`dpo-ds plan`: its arithmetic on a tiny model, what it changes where a run does not fit, and what it writes."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from dpo_ds.commands import cli
from dpo_ds.commands.plan import command, fitting
from dpo_ds.config import load
from dpo_ds.memory import allocations
from dpo_ds.memory.cards import Card
from tests.ranks import ROOT

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYER = 4 * 64 * 64 + 3 * 64 * 64  # attention, MLP
NUMEL = 2 * (LAYER + 2 * 64) + 2 * 64 * 64 + 64  # two layers with their norms, embedding and head, the last norm


@pytest.fixture
def config(tmp_path) -> Path:
    """A run of 10 pairs of at most 32 + 2 x 32 tokens on a model of which only config.json is there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 10)
    run = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "pairs.jsonl"), "max_length": 64, "max_prompt_length": 32},
        "train": {"global_batch_size": 4, "micro_batch_tokens": 192, "epochs": 2},
        "deepspeed": {"config": str(ROOT / "ds_configs/zero3_bf16.json")},
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def plan(capsys, *words, code: int = 0) -> dict:
    assert cli.main(["plan", *map(str, words), "--json"]) == code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_steps_flops_bytes_and_time_are_arithmetic(config, capsys):
    """Four pairs of 96 tokens, two a micro-batch: one for either GPU. A forward multiplies each token with two layers,
    scores 64 targets by the head, and a query with its keys: 96 tokens of which each completion sees the prompt."""
    words = ["--gpus", 2, "--gpu", "10GB:1TFLOPS", "--price", 3, "--efficiency", 0.5]
    found = plan(capsys, config, *words)
    attended = 2 * (64 * 65 / 2) - 32 * 33 / 2
    forward = 2 * 2 * LAYER * 96 + 2 * 64 * 64 * 64 + 2 * 64 * 2 * 2 * attended
    step, run = found["step"], found["run"]
    assert step["flops"] == 4 * (3 * forward + forward)  # policy, and the live reference's forward
    assert (step["tokens"], step["micro_batches"]) == (4 * 96, 1)
    assert step["received_bytes_of_a_gpu"] == 2 * 4 * NUMEL // 2  # weights thrice and gradients, half of each is here
    assert step["seconds"] == pytest.approx(16 * forward / (2 * 1e12 * 0.5))
    assert run["steps"] == 2 * 3  # epochs of ten rows
    assert run["gpu_hours"] == pytest.approx(run["steps"] * step["seconds"] * 2 / 3600)
    assert run["cost"] == pytest.approx(3 * run["gpu_hours"])
    assert found["memory"]["overhead"] == allocations.OVERHEAD and found["fits"]


def test_every_training_command_and_reference_is_planned(config, capsys):
    """sft has one side and no reference, a reward model no head, kto single completions, LoRA fewer gradients."""
    words = [config, "--gpus", 2, "--gpu", "h100", "--train.max_steps", 7]
    flops = {
        name: plan(capsys, *words, *more)["step"]["flops"]
        for name, more in {
            "live": [], "none": ["--loss.name", "orpo"],
            "cached": ["--reference.kind", "cached", "--reference.cache", "c"],
            "adapter": ["--reference.kind", "adapter", "--model.lora.r", 4], "kto": ["--loss.name", "kto"],
            "sft": ["--command", "sft"], "reward": ["--command", "reward"],
        }.items()
    }  # fmt: skip
    assert flops["none"] == flops["cached"] == pytest.approx(flops["live"] * 3 / 4)
    assert flops["adapter"] < flops["live"]
    assert flops["sft"] < flops["kto"] < flops["reward"] < flops["cached"]
    assert plan(capsys, *words)["run"]["counted_from"] == "train.max_steps"


def test_rows_of_one_prompt_are_counted_as_the_groups_that_they_make(config, tmp_path, capsys):
    """Two prompts with six comparisons each of four completions: a step of six comparisons is one of two groups, of
    32 + 4 x 32 tokens, which one GPU has. The first token of a completion sees 33, the last 64."""
    rows = [
        {"prompt": prompt, "chosen": better, "rejected": worse}
        for prompt in "xy" for better, worse in ("ab", "ac", "ad", "bc", "bd", "cd")
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, rows))))
    words = [config, "--gpus", 2, "--gpu", "10GB:1TFLOPS", "--train.global_batch_size", 6, "--efficiency", 0.5]
    pairs = plan(capsys, *words)
    found = plan(capsys, *words, "--data.group", "prompt")
    assert (pairs["step"]["tokens"], found["step"]["tokens"]) == (6 * 96, 160)
    assert pairs["run"]["steps"] == found["run"]["steps"] == 2 * 2  # epochs of 12 comparisons
    assert found["run"]["counted_from"] == "12 rows of data.train in 2 groups 2 times, 6 an update"
    attended = 4 * (64 * 65 / 2) - 3 * 32 * 33 / 2
    forward = 2 * 2 * LAYER * 160 + 2 * 64 * 64 * 128 + 2 * 64 * 2 * 2 * attended
    assert found["step"]["flops"] == 4 * forward and found["step"]["micro_batches"] == 1
    assert found["step"]["seconds"] == pytest.approx(4 * forward / (1e12 * 0.5))
    labelled = plan(capsys, *words, "--data.group", "prompt", "--loss.name", "kto")
    assert labelled["run"]["steps"] == 2 * 2  # of 8 completions
    longer = ["--data.group", "prompt", "--train.micro_batch_tokens", 96]  # the group is a micro-batch all the same
    kept = [plan(capsys, *words, *more)["memory"]["allocated"] for more in (longer[2:], longer)]
    assert kept[1] > kept[0]
    (tmp_path / "pairs.jsonl").unlink()
    unknown = plan(capsys, *words, "--data.group", "prompt")
    assert "told is what pairs alone take" in unknown["notes"][-1] and unknown["step"] == pairs["step"]


def size(run, gpus: int, nodes: int, model_config, reference_config, ds: dict, completions=None) -> SimpleNamespace:
    """Bytes to add up: 4, 2, 1 or 0 a token of a micro-batch; over the GPUs 1000 for each model's weights and 3000 for
    the optimizer, which may lie on the nodes' hosts, as do 4000 of a checkpoint being written."""
    of_a_token = {"none": 4, "selective": 2, "checkpoint": 1, "offload": 0}[run.train.activations]
    activations = of_a_token * run.train.micro_batch_tokens
    zero = ds["zero_optimization"]
    policy = 1000 * ("offload_param" not in zero) + 3000 * ("offload_optimizer" not in zero)
    host = {"copy": 4000 * run.checkpoint.asynchronous // nodes, "state": 3000 * ("offload_optimizer" in zero) // nodes}
    return SimpleNamespace(device=activations + (policy + 1000 * (run.reference.kind == "live")) / gpus, host=host)


def start(monkeypatch, config: Path, card: float, *words: str) -> fitting.Proposal:
    """A run on two GPUs that hold `card` bytes of those above."""
    monkeypatch.setattr(fitting, "of_run", size)
    _, planned, *_ = cli.parse(["plan", str(config), "--gpus", "2", "--gpu", "h100", *words])
    return replace(command._proposal(planned, None), card=Card(card, 1e12))


SELECTIVE, CHECKPOINT = (f"train.activation_memory {how}" for how in ("selective", "checkpoint"))
CACHED = "reference.kind cached"
HALF, OFFLOAD = "train.micro_batch_tokens 400", "DeepSpeed's offload_optimizer cpu"


@pytest.mark.parametrize(
    ("card", "wanted"),
    [  # as it is: 4 x 800 tokens and 5000 / 2
        (4100, [SELECTIVE]),  # 1600 + 2500
        (4099, [CHECKPOINT]),  # 800 + 2500
        (3299, [CHECKPOINT, HALF]),  # 400 + 2500
        (2500, [CHECKPOINT, HALF, CACHED]),  # 400 + 2000; 96 tokens, the longest pair, were tried with 2500
        (1400, [CHECKPOINT, HALF, OFFLOAD]),  # 400 + 1000: the cache is not needed any more
        (1200, [CHECKPOINT, "train.micro_batch_tokens 200", OFFLOAD]),
    ],
)
def test_the_smallest_change_comes_first_and_no_more_than_is_needed(monkeypatch, config, card, wanted):
    found = fitting.changes(start(monkeypatch, config, card, "--train.micro_batch_tokens", "800"))
    assert [change.what.split(",")[0] for change in found] == wanted
    assert found[-1].proposal.fits


@pytest.mark.parametrize(
    ("card", "host", "wanted"),
    [
        (5700, None, []),  # 4 x 800 + 2500
        (5700, 3999, ["checkpoint.asynchronous false"]),
        (1400, 7000, [CHECKPOINT, HALF, OFFLOAD]),  # the optimizer's 3000 beside 4000 of the checkpoint
        (1400, 6999, [CHECKPOINT, HALF, f"{OFFLOAD}, checkpoint.asynchronous false"]),
        (1400, 3000, ["checkpoint.asynchronous false", CHECKPOINT, HALF, OFFLOAD]),
    ],
)
def test_the_host_is_judged_where_its_memory_is_given(monkeypatch, config, card, host, wanted):
    """In GiB on the command line; bytes here, as the sizes above."""
    given = start(monkeypatch, config, card, "--train.micro_batch_tokens", "800", "--host_memory", "1")
    assert given.host == allocations.GIB
    found = fitting.changes(replace(given, host=host)) if not replace(given, host=host).fits else []
    assert [change.what for change in found] == wanted


def test_a_pair_is_spread_over_ranks_before_more_gpus_are_asked_for(monkeypatch, config):
    """All is offloaded but the longest pair's 96 tokens: two ranks have half of them each."""
    nothing = fitting.changes(start(monkeypatch, config, -1, "--train.micro_batch_tokens", "96"))
    assert not nothing[-1].proposal.fits
    monkeypatch.setattr(fitting, "WAYS", (fitting._sequence_parallel, fitting._more_gpus))
    found = fitting.changes(start(monkeypatch, config, 4 * 48 + 5000 / 4, "--train.micro_batch_tokens", "96"))
    spread = "train.sequence_parallel 2, train.micro_batch_tokens 48"
    assert [change.what for change in found] == [spread, "--gpus 4"]


def test_auto_is_the_fewest(monkeypatch, config):
    """4 x 192 tokens, and 5000 over the GPUs: 1000 of five; 208 of 24, which are three nodes, where 16 have 313."""
    for card, nodes, wanted in ((1768, None, (5, 1)), (977, None, (24, 3)), (1768, 2, (6, 2))):
        found = fitting.fewest(start(monkeypatch, config, card), nodes)
        assert (found.gpus, found.nodes) == wanted
    assert fitting.fewest(start(monkeypatch, config, 768)) is None


def test_one_gpu_may_hold_what_two_cannot(monkeypatch, config):
    """It gathers no weights. Two GPUs, and all that are tried after them, hold more than the card."""
    started = start(monkeypatch, config, 1000)
    sizes = {1: 900}
    monkeypatch.setattr(fitting, "of_run", lambda run, gpus, *rest: SimpleNamespace(device=sizes.get(gpus, 1100)))
    assert fitting.fewest(started).gpus == 1


def test_gpus_without_a_comparison_make_no_step_shorter(config, capsys):
    """Four comparisons: one for each of four GPUs, and none for the other four."""
    of_four, of_eight = (plan(capsys, config, "--gpus", n, "--gpu", "h100")["step"] for n in (4, 8))
    assert of_eight["seconds"] == of_four["seconds"] == pytest.approx(of_four["flops"] / (4 * 989e12 * 0.4))


def test_a_loss_that_no_cache_serves_is_given_none(monkeypatch, config):
    """KTO needs the reference on completions of other prompts."""
    started = start(monkeypatch, config, 0, "--loss.name", "kto")
    assert not list(fitting._reference(started))
    assert list(fitting._reference(start(monkeypatch, config, 0)))


def test_a_mistake_leaves_the_run_s_own_status_alone(config, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    done = '{"state": "done", "reason": "", "step": 7, "exit_code": 0}'
    (tmp_path / "out/STATUS.json").write_text(done)
    words = ["--config", str(config), "--output_dir", str(tmp_path / "out"), "--gpus", "0", "--gpu", "h100"]
    assert cli.main(["plan", *words]) == 2
    assert (tmp_path / "out/STATUS.json").read_text() == done


def test_a_key_of_reward_is_known_before_the_command_is(config):
    _, planned, *_ = cli.parse(
        ["plan", "--config", str(config), "--reward.centering", "0.5", "--gpus", "2", "--gpu", "h100"]
    )
    assert planned.run.command == "reward" and planned.run.reward.centering == 0.5


def test_what_it_writes_fits_and_loads(config, tmp_path, capsys):
    """The card holds what the optimizer's 12 bytes a parameter leave; what is written is planned again."""
    words = [config, "--gpus", 1, "--train.activation_memory", "checkpoint", "--loss.name", "orpo"]
    words += ["--train.micro_batch_tokens", 96]
    whole = plan(capsys, *words, "--gpu", "h100")["memory"]
    card = f"{(whole['gpu'] - 12 * NUMEL) / 1e9:.9f}GB:1TFLOPS"
    found = plan(capsys, *words, "--gpu", card, "--write", tmp_path / "fitted.yaml", code=1)
    assert found["fits_with_changes"] and found["changes"]
    assert found["written"] == [str(tmp_path / "fitted.yaml"), str(tmp_path / "fitted.deepspeed.json")]
    load("train", str(tmp_path / "fitted.yaml"), {})
    again = plan(capsys, tmp_path / "fitted.yaml", "--gpus", found["changes"][-1]["gpus"], "--gpu", card)
    assert again["memory"]["gpu"] == found["changes"][-1]["memory"]


def test_the_table_says_what_json_does(config, capsys, monkeypatch):
    assert cli.main(["plan", str(config), "--gpus", "16", "--gpu", "h100", "--price", "2", "--lengths", "20,10"]) == 0
    out = capsys.readouterr().out
    assert "on 16 GPUs on 2 nodes: h100, 74.5 GiB and 989 TFLOP/s each; expected, not measured" in out
    for words in ("2 GiB for context, NCCL", "FITS into 74.5 GiB", "--lengths 20,10", "0.4 of the peak", "at 2 a GPU"):
        assert words in out
    monkeypatch.setattr(fitting, "WAYS", (fitting._recompute,))
    assert cli.main(["plan", str(config), "--gpus", "1", "--gpu", "1GB:1TFLOPS", "--host_memory", "64"]) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT into 0.9 GiB\n  FITS into 64.0 GiB of host memory a node" in out
    assert "GiB  train.activation_memory checkpoint\n" in out
    assert "nothing that is known here helps" in out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--gpus", "2", "--gpu", "h1000"], "--gpu h1000: not a known card; one of b200"),
        (["--gpus", "0", "--gpu", "h100"], "argument --gpus: '0' should be 0 < int <= 1048576"),
        (["--gpu", "h100"], "the following arguments are required: --gpus"),
        (["--gpus", "3", "--gpu", "h100", "--nodes", "2"], "--gpus 3: not a multiple of --nodes 2"),
        (["--gpus", "2", "--gpu", "h100", "--lengths", "7"], "should be two numbers, as 200,150"),
        (["--gpus", "3", "--gpu", "h100", "--train.sequence_parallel", "2"], "the run has 3 ranks; take one of 1, 3"),
        (["--gpus", "2", "--gpu", "h100", "--write", "{config}"], "exists already; choose a new file"),
        (["--gpus", "2", "--gpu", "h100", "--config", "{config}"], "give the config once"),
        (["--gpus", "2", "--gpu", "h100", "--train.epoch", "2"], "unknown key --train.epoch; did you mean"),
    ],
)
def test_mistakes_cost_one_line(config, capsys, words, problem):
    assert cli.main(["plan", str(config), *(word.format(config=config) for word in words)]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1
