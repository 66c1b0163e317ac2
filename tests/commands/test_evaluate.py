"""`dpo-ds evaluate` by real ranks: KL against exact enumeration, the same numbers on any ranks, files, mistakes."""

import json
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from dpo_ds import config
from dpo_ds.commands.evaluate import judging
from dpo_ds.commands.evaluate.results import Measured
from dpo_ds.data.formats import Conversation
from dpo_ds.data.tokenize import GroupTokenizer
from dpo_ds.demo.tiny import save_tiny_model, tiny_config, tiny_llama, train_tokenizer
from dpo_ds.errors import ConfigError
from dpo_ds.models.scoring import load_scorer
from tests.oracle import sequence_logp
from tests.ranks import ROOT, WORKERS
from tests.small_jobs import make_world, status

PAIRS, PROMPTS = 20, 20


def command(world, out, **settings) -> list[str]:
    keys = {
        "evaluate.policy": world / "policy", "evaluate.against": world / "model", "data.eval": world / "eval.jsonl",
        "evaluate.max_new_tokens": 6, "deepspeed.config": "none", "output_dir": world / out,
    }  # fmt: skip
    keys |= {name.replace("__", "."): value for name, value in settings.items()}
    return ["evaluate", *(text for key, value in keys.items() for text in (f"--{key}", str(value)))]


def run(forks, world, out, ranks=1, **settings) -> tuple[list[int], str]:
    logs = world / f"{out}.logs"
    return forks.run(command(world, out, **settings), ranks, logs, DPO_DS_CACHE=str(world / "cache"))


def evaluation(world, out) -> dict:
    return json.loads((world / out / "evaluation.json").read_text())


def perturbed(world, name: str, noise: float):
    """The reference with another head: world/name."""
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head += noise * torch.randn(head.shape, generator=generator)
    save_tiny_model(world / name, AutoTokenizer.from_pretrained(world / "model"), model)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("evaluate"))
    perturbed(world, "policy", 0.1)
    (world / "one.jsonl").write_text(json.dumps({"prompt": "Say yes."}) + "\n")
    return world


def exact_kl(world, policy: str, prompt: str) -> float:
    """KL of the two tokens that follow the prompt, by the chain rule, over every first token."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    ids = torch.tensor(tokenizer(prompt)["input_ids"])
    vocabulary = len(tokenizer)
    rows = torch.cat([ids.expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], 1)
    logps = []
    for name in (policy, "model"):
        model = AutoModelForCausalLM.from_pretrained(world / name).double()
        with torch.no_grad():
            logps.append(model(rows).logits[:, -2:].log_softmax(-1))
    ours, theirs = logps
    first = ours[0, 0].exp()
    kls = (ours.exp() * (ours - theirs)).sum(-1)  # [first token, step]; the first step is the same in every row
    after = kls[:, 1].clone()
    after[tokenizer.eos_token_id] = 0  # nothing follows
    return float(kls[0, 0] + (first * after).sum())


@pytest.mark.distributed
def test_kl_is_that_of_exact_enumeration(forks, world):
    shutil.copytree(world / "model", world / "same", dirs_exist_ok=True)
    policies = f"[{world / 'policy'}, {world / 'same'}]"
    asked = {
        "evaluate__prompts": world / "one.jsonl",
        "data__eval": "null",
        "evaluate__n": 2000,
        "evaluate__batch_size": 1000,
    }
    codes, output = run(forks, world, "kl", evaluate__policy=policies, evaluate__max_new_tokens=2, **asked)
    assert codes == [0], output
    moved, same = evaluation(world, "kl")["policies"]
    found, exact = moved["samples"]["kl"], exact_kl(world, "policy", "Say yes.")
    assert exact > 0.1 and found["standard_error"] < 0.1 * exact
    assert abs(found["mean"] - exact) < 4 * found["standard_error"], (found, exact)
    assert same["samples"]["kl"] == {"mean": 0.0, "standard_error": 0.0}
    assert "pairs" not in moved and "reward" not in moved["samples"] and "win_rate" not in moved["samples"]


def pair_sums(world, name: str) -> np.ndarray:  # [pairs, 2]
    rows = [json.loads(line) for line in (world / "eval.jsonl").read_text().splitlines()]
    tokenize = GroupTokenizer(AutoTokenizer.from_pretrained(world / "model"), 2048, 1024)
    conversations = [Conversation.of(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    pairs = [tokenized.group for tokenized in tokenize(conversations)]
    model = AutoModelForCausalLM.from_pretrained(world / name)
    with torch.no_grad():
        return np.array(
            [
                [
                    float(sequence_logp(model, pair.prompt, side, np.ones(len(side), bool)))
                    for side in (pair.chosen, pair.rejected)
                ]
                for pair in pairs
            ]
        )


@pytest.fixture(scope="module")
def evaluations(forks, world):
    """The same evaluation by one rank, by two, and by two that share the weights."""
    policies = f"[{{path: {world / 'policy'}, name: moved, beta: 0.5}}, {{path: {world / 'model'}, name: still}}]"
    wanted = {"evaluate__policy": policies, "evaluate__n": 2, "evaluate__score": "tests.scores:vowels"}
    wanted |= {"evaluate__batch_size": 4}  # more batches than ranks
    zero = {"deepspeed__config": ROOT / "ds_configs/zero3_cpu.json", "evaluate__layout": "padded"}
    for out, ranks, more in (("one", 1, {}), ("two", 2, {}), ("zero", 2, zero)):
        codes, output = run(forks, world, out, ranks, **wanted, **more)
        assert codes == [0] * ranks, output[-2000:]
        assert "dpo-ds: done:" in output and "win rate" in output
    return {out: evaluation(world, out) for out in ("one", "two", "zero")}


def numbers(value, path: str = "") -> dict[str, float]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, item in items for k, v in numbers(item, f"{path}.{name}").items()}
    return {path: value} if isinstance(value, int | float) else {}


@pytest.mark.distributed
@pytest.mark.parametrize("other", ["two", "zero"])
def test_the_number_of_ranks_changes_no_number(world, evaluations, other):
    one = numbers([evaluations["one"]["policies"], evaluations["one"]["reference"]])
    assert len(one) > 200
    assert numbers([evaluations[other]["policies"], evaluations[other]["reference"]]) == pytest.approx(one, abs=2e-5)
    rows, others = (pq.read_table(world / out / "completions.parquet").to_pylist() for out in ("one", other))
    assert [row["completion"] for row in others] == [row["completion"] for row in rows]
    assert len(rows) == 3 * PROMPTS * 2


@pytest.mark.distributed
def test_pairs_are_measured_as_training_does(world, evaluations):
    moved, still = evaluations["one"]["policies"]
    rewards = 0.5 * (pair_sums(world, "policy") - pair_sums(world, "model"))
    margins = rewards[:, 0] - rewards[:, 1]
    found = moved["pairs"]
    assert found["pairs"] == PAIRS and (moved["name"], moved["beta"]) == ("moved", 0.5)
    assert found["rewards/accuracies"]["mean"] == (margins > 0).mean()
    assert found["rewards/margins"]["mean"] == pytest.approx(margins.mean(), abs=1e-4)
    assert found["rewards/margins"]["standard_error"] == pytest.approx(margins.std(ddof=1) / PAIRS**0.5, rel=1e-3)
    assert found["rewards/chosen"]["mean"] == pytest.approx(rewards[:, 0].mean(), abs=1e-4)
    assert found["rewards/margins"]["quantiles"]["0.5"] == pytest.approx(np.median(margins), abs=1e-4)
    assert sum(found["rewards/margins"]["histogram"]["counts"]) == PAIRS
    assert still["pairs"]["rewards/accuracies"]["mean"] == 0, "equal rewards are not strictly higher"
    assert still["pairs"]["rewards/margins"]["mean"] == 0 and still["samples"]["kl"]["mean"] == 0


@pytest.mark.distributed
def test_every_number_follows_from_the_completions(world, evaluations):
    rows = pq.read_table(world / "one" / "completions.parquet").to_pylist()
    moved, reference = evaluations["one"]["policies"][0], evaluations["one"]["reference"]
    for model in (moved, reference):
        own = [row for row in rows if row["model"] == model["name"]]
        rewards = np.array([row["reward"] for row in own]).reshape(-1, 2)
        assert model["samples"]["reward"]["mean"] == pytest.approx(rewards.mean())
        assert rewards[0, 0] == pytest.approx(
            sum(c in "aeiou" for c in own[0]["completion"]) / len(own[0]["completion"])
        )
        assert model["samples"]["tokens"] == pytest.approx(np.mean([row["tokens"] for row in own]))
        assert model["samples"]["finished"] == pytest.approx(np.mean([row["finished"] for row in own]))
    ours = [row for row in rows if row["model"] == "moved"]
    kl = np.array([row["logp"] - row["reference_logp"] for row in ours]).reshape(-1, 2).mean(1)
    assert moved["samples"]["kl"]["mean"] == pytest.approx(kl.mean())
    assert moved["samples"]["kl"]["standard_error"] == pytest.approx(kl.std(ddof=1) / PROMPTS**0.5)
    theirs = [row["reward"] for row in rows if row["model"] == "reference"]
    wins = [(a["reward"] > b) + 0.5 * (a["reward"] == b) for a, b in zip(ours, theirs, strict=True)]
    rate = moved["samples"]["win_rate"]
    assert rate["win_rate"] == pytest.approx(np.mean(wins)) and rate["against"] == str(world / "model")
    assert rate["interval"][0] <= rate["win_rate"] <= rate["interval"][1]
    assert evaluations["one"]["reference"]["samples"]["kl"]["mean"] == 0
    by_model = {name: [row["completion"] for row in rows if row["model"] == name] for name in ("still", "reference")}
    same = [ours == theirs for ours, theirs in zip(*by_model.values(), strict=True)]
    assert len(same) == 2 * PROMPTS and not all(same), "a policy is compared with draws that are not its own"


def test_equal_texts_of_a_prompt_are_scored_once(monkeypatch):
    """By a scorer whose numbers depend on the place, as a reward model's last bits do."""
    calls = []

    def scorer(prompts, completions):
        calls.append(list(zip(prompts, completions, strict=True)))
        return np.arange(float(len(completions)))

    reference = Measured("reference", "r", 0.1, texts=[["a", "b"], ["a", "c"]])
    policy = Measured("policy", "p", 0.1, texts=[["b", "b"], ["c", "d"]])
    prompts = [SimpleNamespace(text="first"), SimpleNamespace(text="second")]
    outcome = SimpleNamespace(prompts=prompts, rows=[reference, policy], rival=reference)
    monkeypatch.setattr(judging, "over_ranks", lambda rows, compute: compute(np.arange(rows)))
    judging.give_scores(outcome, scorer)
    judging.give_preferences(outcome, judge=None)
    assert calls == [[("first", "a"), ("first", "b"), ("second", "a"), ("second", "c"), ("second", "d")]]
    assert reference.scores.tolist() == [[0, 1], [2, 3]] and policy.scores.tolist() == [[1, 1], [3, 4]]
    assert policy.preferred.tolist() == [[1, 0.5], [1, 1]] and reference.preferred is None


@pytest.mark.distributed
def test_the_report_needs_no_other_file(world, evaluations):
    folder = world / "one" / "report"
    page = (folder / "report.html").read_text()
    assert sorted(path.name for path in folder.iterdir()) == [
        "frontier.png", "margins.png", "report.html", "rewards.png",
    ]  # fmt: skip
    assert page.count("data:image/png;base64,iVBOR") == 3
    assert re.findall(r"(?:src|href)=\"(?!data:)", page) == [] and "http" not in page
    for text in ("moved", "still", "reference", "win rate", "KL, nats"):
        assert text in page
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert status(world / "one") == {"state": "done", "reason": "", "step": 0, "exit_code": 0}
    again, _ = config.load("evaluate", str(world / "one" / "config.yaml"), {})
    assert again.evaluate.policies[0].name == "moved" and again.evaluate.n == 2


@pytest.mark.distributed
def test_a_second_run_replaces_the_first(forks, world):
    """A judge, a baseline from a file, a bent temperature; then nothing but pairs, without a reference."""
    runs = world / "runs" / "dpo"
    shutil.copytree(world / "policy", runs / "final")
    lines = [{"step": step, "loss": 0.69, "rewards/accuracies": 0.5} for step in (1, 2)]
    (runs / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    asked = {"evaluate__judge": "tests.scores:first_one", "evaluate__baseline": world / "eval.jsonl"}
    codes, output = run(
        forks,
        world,
        "again",
        evaluate__policy=runs / "final",
        evaluate__temperature=0.5,
        evaluate__against="null",
        **asked,
    )
    assert codes == [0], output
    policy = evaluation(world, "again")["policies"][0]
    assert policy["name"] == "dpo", "final/ is called what its run is"
    rate = policy["samples"]["win_rate"]
    assert (rate["win_rate"], rate["ties"], rate["first_position"], rate["orders_disagree"]) == (0.5, 1, 1, 1)
    assert rate["interval"] == [0.5, 0.5] and "kl" not in policy["samples"]
    rows = pq.read_table(world / "again" / "completions.parquet").to_pylist()
    chosen = [json.loads(line)["chosen"] for line in (world / "eval.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows if row["model"] == "baseline"] == chosen
    assert {path.name for path in (world / "again" / "report").iterdir()} == {
        "curves.png",
        "margins.png",
        "report.html",
    }
    assert policy["pairs"]["rewards/chosen"]["mean"] == pytest.approx(0.1 * policy["pairs"]["logps/chosen"]["mean"])

    (world / "twice.jsonl").write_text(2 * (world / "eval.jsonl").read_text())
    codes, output = run(
        forks, world, "again", evaluate__n=0, evaluate__against="null", data__eval=world / "twice.jsonl"
    )
    assert codes == [0], output
    once, twice = policy["pairs"], evaluation(world, "again")["policies"][0]["pairs"]
    assert (once["pairs"], twice["pairs"]) == (PAIRS, 2 * PAIRS)
    for key in ("mean", "standard_error"):  # a prompt's pairs are one observation
        assert twice["rewards/margins"][key] == pytest.approx(once["rewards/margins"][key], rel=1e-3)
    assert not (world / "again" / "completions.parquet").exists()
    assert {path.name for path in (world / "again" / "report").iterdir()} == {"margins.png", "report.html"}
    assert "samples" not in evaluation(world, "again")["policies"][0]


@pytest.mark.distributed
def test_a_reward_model_scores_policy_and_a_baseline_of_another_tokenizer(forks, world):
    tokenizer = train_tokenizer(["words that the policy's tokenizer was not trained on"], vocab_size=270)
    save_tiny_model(world / "rival", tokenizer, tiny_llama(tokenizer, hidden=16, layers=1))
    of_one_label = tiny_config("llama", len(tokenizer), hidden=16, layers=1, eos_token_id=1, num_labels=1)
    save_tiny_model(world / "reward", tokenizer, AutoModelForSequenceClassification.from_config(of_one_label))
    asked = {"evaluate__baseline": world / "rival", "evaluate__score": world / "reward", "evaluate__against": "null"}
    codes, output = run(forks, world, "rivals", 2, evaluate__n=2, **asked)
    assert codes == [0, 0], output
    rows = pq.read_table(world / "rivals" / "completions.parquet").to_pylist()
    score, rewards = load_scorer(str(world / "reward"), "evaluate.score", 60), {}
    for model in ("policy", "baseline"):
        own = [row for row in rows if row["model"] == model]
        rewards[model] = np.array([row["reward"] for row in own])
        wanted = score([row["prompt"] for row in own], [row["completion"] for row in own])
        assert len(own) == 2 * PROMPTS and np.allclose(rewards[model], wanted, atol=1e-6)
    ours, theirs = rewards["policy"], rewards["baseline"]
    wins = ((ours > theirs) + 0.5 * (ours == theirs)).mean()
    assert 0 < wins < 1
    assert evaluation(world, "rivals")["policies"][0]["samples"]["win_rate"]["win_rate"] == pytest.approx(wins)


@pytest.mark.distributed
def test_a_model_of_no_numbers_ends_a_rank_without_prompts_too(forks, world):
    perturbed(world, "broken", math.nan)
    one = {"data__eval": "null", "evaluate__prompts": world / "one.jsonl", "evaluate__against": "null"}
    codes, output = run(forks, world, "broken.out", 2, evaluate__policy=world / "broken", **one)
    assert codes == [2, 2] and "LlamaForCausalLM: its logits are not finite numbers" in output


@pytest.mark.distributed
def test_a_bent_temperature_and_a_failing_score_are_told(forks, world):
    codes, output = run(
        forks, world, "failed", evaluate__score="tests.scores:nothing", evaluate__temperature=0.7, evaluate__top_k=5
    )
    assert codes == [2]
    assert "drawn with temperature 0.7, top_k 5, so the mean of log π - log π_ref is no estimate" in output
    error = next(line for line in output.splitlines() if "error:" in line)
    kept = world / "failed" / "completions.parquet"
    assert "tests.scores:nothing returned nan" in error and f"the completions are kept in {kept}" in error
    assert pq.read_table(kept).num_rows == 2 * PROMPTS and status(world / "failed")["state"] == "failed"


@pytest.mark.distributed
def test_a_model_that_was_measured_leaves_no_weights_behind(forks, world):
    zero = ROOT / "ds_configs/zero3_cpu.json"
    codes, output = forks.run([world / "model", zero], 1, world / "free.logs", module="tests.workers.free")
    assert codes == [0], output


MISTAKES = {
    "policy is missing": ({"evaluate.policy": "/nowhere"}, ["--evaluate.policy /nowhere", "does not exist"]),
    "policy is an adapter": ({"evaluate.policy": "adapter"}, ["a LoRA adapter", "names no base_model_name"]),
    "one of a list is missing": ({"evaluate.policy": "[policy, /nowhere]"}, ["--evaluate.policy /nowhere"]),
    "reference of other tokens": ({"evaluate.against": "other"}, ["--evaluate.against", "the same tokens"]),
    "no such score": ({"evaluate.score": "tests.scores:vowel"}, ["--evaluate.score", "'vowels'"]),
    "no such judge": ({"evaluate.judge": "tests.scores:shorter"}, ["--evaluate.judge", "shorter", "tests/scores.py"]),
    "judge is no function": ({"evaluate.judge": "policy"}, ["--evaluate.judge", "module:function"]),
    "baseline file is missing": (
        {"evaluate.baseline": "eva.jsonl", "evaluate.score": "regex:a"}, ["eva.jsonl", "no such file", "eval.jsonl"]
    ),
    "baseline is no model": (
        {"evaluate.baseline": "/nowhere", "evaluate.score": "regex:a"}, ["--evaluate.baseline /nowhere"]
    ),
    "baseline lacks prompts": (
        {"evaluate.baseline": "train.jsonl", "evaluate.score": "regex:a"}, ["20 of the 20 prompts", "the first is"]
    ),
    "baseline row is wrong": (
        {"evaluate.baseline": "bad.jsonl", "evaluate.score": "regex:a"}, ["evaluate.baseline", "bad.jsonl:1", "chosen"]
    ),
    "baseline of several models": (
        {"evaluate.baseline": "mixed.jsonl", "evaluate.score": "regex:a"}, ["mixed.jsonl:2", "'model'", "rows alone"]
    ),
    "no position for the pairs": (
        {"evaluate.policy": "short"}, ["eval data", "the model knows 10 positions", "--data.max_length 10"]
    ),
    "no position for completions": (
        {"evaluate.against": "short", "data.eval": "null", "evaluate.prompts": "one.jsonl"},
        ["evaluate.max_new_tokens", "the model knows 10 positions", "--data.max_prompt_length 4"],
    ),
    "prompts are missing": ({"evaluate.prompts": "nothing.jsonl"}, ["nothing.jsonl", "no such file"]),
    "pairs are wrong": ({"data.eval": "bad.jsonl"}, ["bad.jsonl:1", "chosen", "must be text"]),
    "DeepSpeed's file is missing": ({"deepspeed.config": "/nowhere.json"}, ["/nowhere.json", "no such file"]),
    "a training run's folder": ({"output_dir": "trained"}, ["trained", "metrics.jsonl", "trained/evaluation"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(world):
    """One process goes through every mistake; a test each looks at its line."""
    other = train_tokenizer(["another text", "of other words"], vocab_size=290)
    save_tiny_model(world / "other", other, tiny_llama(other, hidden=16, layers=1))
    words = AutoTokenizer.from_pretrained(world / "model")
    short = GPT2Config(vocab_size=len(words), n_positions=10, n_embd=8, n_layer=1, n_head=1)
    save_tiny_model(world / "short", words, GPT2LMHeadModel(short))
    (world / "adapter").mkdir()
    (world / "adapter" / "adapter_config.json").write_text("{}")
    (world / "bad.jsonl").write_text('{"prompt": "p", "chosen": 3}\n')
    mixed = [{"prompt": "p", "completion": "c", "model": name} for name in ("reference", "dpo")]
    (world / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    (world / "trained").mkdir()
    (world / "trained" / "metrics.jsonl").touch()
    argv = {}
    for name, (settings, _) in MISTAKES.items():
        keys = {
            key: world / value if (world / value).exists() or value.endswith((".jsonl", "trained")) else value
            for key, value in settings.items()
        }
        argv[name] = command(world, "mistake", **{key.replace(".", "__"): value for key, value in keys.items()})
    (world / "cases.json").write_text(json.dumps(argv))
    done = subprocess.run(
        [sys.executable, WORKERS / "mistakes.py", world / "cases.json", world / "results.json"],
        env={"PATH": "/nowhere", "PYTHONPATH": str(ROOT), "DPO_DS_CACHE": str(world / "cache"), "HF_HUB_OFFLINE": "1"},
        cwd=world, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((world / "results.json").read_text())


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_names_the_mistake(outcomes, name):
    code, stderr = outcomes[name]
    assert code == 2, stderr
    assert stderr.startswith("dpo-ds: error: ") and stderr.count("\n") == 1, stderr
    assert [part for part in MISTAKES[name][1] if part not in stderr] == [], stderr


def test_deepspeed_was_never_imported(outcomes):
    assert outcomes["deepspeed imported"] is False


NEEDED = {"evaluate.policy": "p", "deepspeed.config": "none", "output_dir": "o"}


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, ["nothing to evaluate on", "data.eval", "evaluate.prompts"]),
        ({"evaluate.prompts": "a", "evaluate.n": "0"}, ["nothing to evaluate on"]),
        ({"data.eval": "a", "evaluate.n": "0", "evaluate.score": "regex:a"}, ["evaluate.n 0"]),
        (
            {"data.eval": "a", "evaluate.min_new_tokens": "300"},
            ["evaluate.min_new_tokens 300 is above evaluate.max_new_tokens 256"],
        ),
        ({"data.eval": "a", "evaluate.judge": "m:f"}, ["evaluate.judge m:f", "evaluate.baseline"]),
        ({"data.eval": "a", "evaluate.baseline": "b"}, ["evaluate.baseline b", "evaluate.score"]),
        ({"data.eval": "a", "evaluate.policy": "[]"}, ["evaluate.policy", "empty list"]),
        ({"data.eval": "a", "evaluate.policy": "[{name: b}]"}, ["is not a policy"]),
        ({"data.eval": "a", "evaluate.policy": "[{path: b, beta: 0}]"}, ["beta 0 of b", "above 0"]),
        ({"data.eval": "a", "evaluate.policy": "[x/a, x/a]"}, ["'x/a' names two models"]),
        ({"data.eval": "a", "evaluate.policy": "[{path: a, name: reference}]"}, ["'reference'"]),
        ({"data.eval": "a", "evaluate.policy": r'[{path: a, name: "b\ud800"}]'}, ["half a surrogate pair"]),
        ({"data.train": "a"}, ["unknown key --data.train"]),
    ],
)
def test_what_does_not_fit_together_is_refused(settings, parts):
    with pytest.raises(ConfigError) as caught:
        config.load("evaluate", None, NEEDED | settings)
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value


def test_names_of_policies_and_the_yaml_of_a_training_run(tmp_path):
    settings = {
        "data.eval": "a",
        "evaluate.policy": "[runs/dpo/final, runs/ipo/final, org/model, {path: x/y, name: z}]",
    }
    run, _ = config.load("evaluate", None, NEEDED | settings)
    assert [policy.name for policy in run.evaluate.policies] == ["dpo", "ipo", "model", "z"]
    run, _ = config.load("evaluate", None, NEEDED | settings | {"evaluate.policy": "[a/dpo/final, b/dpo/final]"})
    assert [policy.name for policy in run.evaluate.policies] == ["a/dpo/final", "b/dpo/final"]

    shared = {
        "model": {"path": "m", "attn": "eager"}, "data": {"train": "t", "eval": "e", "limit": 3}, "train": {"seed": 1},
        "loss": {"name": "ipo", "beta": 0.3}, "deepspeed": {"config": "d", "reference_config": "r"}, "output_dir": "o",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(shared))
    run, notes = config.load("evaluate", str(tmp_path / "run.yaml"), {"evaluate.policy": "p"})
    assert (run.model.attn, run.data.eval, run.loss.beta) == ("eager", "e", 0.3)
    unused = notes[0].partition("does not use ")[2].split(", ")
    assert sorted(unused) == sorted(
        ["train", "model.path", "data.train", "data.limit", "loss.name", "deepspeed.reference_config"]
    )
    (tmp_path / "run.yaml").write_text("model: {pth: m}")
    with pytest.raises(ConfigError, match="unknown key 'model.pth'"):
        config.load("evaluate", str(tmp_path / "run.yaml"), NEEDED)
