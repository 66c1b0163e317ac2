"""The reward model: its loss and calibration by hand, both layouts, two ranks against autograd, whole jobs."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dpo_ds.batch import Group, packed_batch, padded_batch
from dpo_ds.data import prepare
from dpo_ds.demo.tiny import tiny_config
from dpo_ds.errors import DataError, ModelError
from dpo_ds.models.attention import packed_refusal
from dpo_ds.models.reward_model import RewardModel, last_rows, settle_padding
from dpo_ds.training.metrics import named
from dpo_ds.training.objectives.reward import BINS, BradleyTerry, Ranking, RewardObjective, calibration_gaps, evenly
from tests import data_helpers
from tests.oracle import score
from tests.small_jobs import make_world, run, steps, weights
from tests.tiny import VOCAB, random_pairs

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2")
EXACT = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm", "learning_rate", "tokens")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_loss_by_hand():
    """-log σ(2 - ½ - ½) = -log σ(1) = 0.3132617; centring: 0.1 (2 + ½)² = 0.625."""
    chosen, rejected = torch.tensor([2.0]), torch.tensor([0.5])
    assert BradleyTerry()(chosen, rejected).item() == pytest.approx(-math.log(sigmoid(1.5)), rel=1e-6)
    assert BradleyTerry()(chosen, rejected, torch.tensor([0.5])).item() == pytest.approx(0.3132617, rel=1e-6)
    assert BradleyTerry(0.1)(chosen, rejected, 0.5).item() == pytest.approx(0.3132617 + 0.625, rel=1e-6)


def test_calibration_by_hand():
    """σ(±ln 3) is ¾: confidence ¾, bin 5 of 10 over [½, 1]. Two of three right there: |2 - 3·¾| / 4. A tie is right by
    half at confidence ½, as it should be."""
    margins = torch.tensor([math.log(3), math.log(3), -math.log(3), 0.0], dtype=torch.float64)
    gaps = calibration_gaps(margins)
    assert gaps.shape == (4, BINS)
    assert gaps.nonzero().tolist() == [[0, 5], [1, 5], [2, 5]]
    error = named(["error"] * BINS, gaps.mean(0))
    assert error == {"error": pytest.approx(abs(2 - 3 * 0.75) / 4)}


class Scored:
    """A policy whose scores are given."""

    device = "cpu"

    def __init__(self, scores):
        self.given = torch.tensor(scores, requires_grad=True)

    def scores(self, batch):
        return self.given.flatten()


def test_an_evaluation_adds_brier_score_and_calibration_error():
    scored = Scored([[math.log(3), 0.0], [0.0, math.log(3)]])  # p = ¾, then ¼
    objective = RewardObjective(BradleyTerry()).for_evaluation()
    loss, sums = objective(scored, padded_batch(random_pairs(2)))
    means = named(objective.names, sums / 2)
    assert set(means) == {
        "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/brier",
        "rewards/calibration_error",
    }  # fmt: skip
    assert loss.item() / 2 == pytest.approx(means["loss"]) == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert (means["rewards/margins"], means["rewards/accuracies"]) == (pytest.approx(0, abs=1e-7), 0.5)
    assert means["rewards/brier"] == pytest.approx((0.25**2 + 0.75**2) / 2)
    assert means["rewards/calibration_error"] == pytest.approx(abs(1 - 2 * 0.75) / 2)


def test_each_comparison_has_its_margin():
    objective = RewardObjective(BradleyTerry())
    pairs = [replace(pair, margins=np.array([margin])) for pair, margin in zip(random_pairs(2), (0, 1.5), strict=True)]
    loss, _ = objective(Scored([[1.0, 0.0], [1.0, 0.0]]), padded_batch(pairs))
    assert loss.item() == pytest.approx(-math.log(sigmoid(1)) - math.log(sigmoid(-0.5)))


def test_a_ranking_by_hand():
    """Scores 2, 0, 1 in that order: -log(e²/(e²+e⁰+e¹)) - log(e⁰/(e⁰+e¹)), and a pair beside it: -log σ(1)."""
    first, second = random_pairs(2)
    completions = (first.chosen, first.rejected, first.chosen)
    masks = tuple(np.ones(len(ids), bool) for ids in completions)
    group = Group(first.prompt, completions, masks, np.array([[0, 1], [0, 2], [1, 2]]))
    e = math.e
    by_hand = -math.log(e**2 / (e**2 + 1 + e)) - math.log(1 / (1 + e)) - math.log(sigmoid(1))
    objective = RewardObjective(Ranking())
    batch = padded_batch([group, second])
    loss, sums = objective(Scored([2.0, 0.0, 1.0, 1.0, 0.0]), batch)
    assert objective.weight(batch) == 2 and objective.counts(None) is None
    assert loss.item() == pytest.approx(by_hand) == pytest.approx(sums[0].item())
    means = named(objective.names, sums / 2)
    assert means["rewards/accuracies"] == pytest.approx((2 / 3 + 1) / 2), "two of the group's three are right"
    centred = RewardObjective(Ranking(0.3))(Scored([2.0, 0.0, 1.0, 1.0, 0.0]), batch)[0]
    assert centred.item() == pytest.approx(by_hand + 0.3 * ((2**2 + 3**2 + 1**2) / 3 + 1))


def pair(prompt: int, chosen: int, rejected: int) -> Group:
    parts = np.split(np.arange(1, 1 + prompt + chosen + rejected), [prompt, prompt + chosen])
    return Group.pair(*parts, np.ones(chosen, bool), np.ones(rejected, bool))


def test_the_rows_of_the_last_tokens_by_hand():
    """Packed: rows 0-1 prompt, 2-4 chosen, 5 rejected, then 6-7, 8, 9-10. Padded: four rows of 5 tokens each."""
    pairs = [pair(2, 3, 1), pair(2, 1, 2)]
    packed, padded = packed_batch(pairs), padded_batch(pairs)
    assert last_rows(packed).tolist() == [4, 5, 8, 10]
    assert last_rows(padded).tolist() == [4, 5 + 2, 10 + 2, 15 + 3]
    assert last_rows(packed_batch([])).tolist() == last_rows(padded_batch([])).tolist() == []


def reward_model(family: str) -> RewardModel:
    torch.manual_seed(0)
    config = tiny_config(family, VOCAB, hidden=32, num_labels=1)
    return RewardModel(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)).eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_both_layouts_give_the_scores_of_the_models_own_forward(family):
    model, pairs = reward_model(family), random_pairs(6)
    own = [score(model.causal_lm, np.concatenate([p.prompt, side])) for p in pairs for side in (p.chosen, p.rejected)]
    padded = model(padded_batch(pairs))
    assert packed_refusal(model.causal_lm, model) is None
    packed = model(packed_batch(pairs))
    assert packed.dtype == torch.float32 and packed.shape == (12,)
    assert packed.std() > 0.01, "scores that differ, so that a wrong row would show"
    torch.testing.assert_close(padded, torch.stack(own), rtol=0, atol=1e-6)
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_canary_judges_small_scores_by_their_own_size():
    """Blind to positions, this model is off by less than the 1e-4 nats that log-probs may differ by."""
    model = reward_model("gpt2")
    model.causal_lm.score.weight.mul_(1e-4)

    def blind(batch):
        return model(replace(batch, position_ids=torch.zeros_like(batch.position_ids)))

    batch = padded_batch(random_pairs(2))
    assert 0 < (blind(batch) - model(batch)).abs().max() < 1e-4
    refusal = packed_refusal(model.causal_lm, lambda batch: blind(batch) if batch.segments else model(batch))
    assert "differ from unpacked ones" in refusal
    assert packed_refusal(model.causal_lm, model) is None


def test_a_head_that_is_no_score_layer_is_refused():
    config = tiny_config("llama", VOCAB, hidden=32, num_labels=3)
    with pytest.raises(ModelError, match="LlamaForSequenceClassification: its 'score' layer is Linear of 3 outputs"):
        RewardModel(AutoModelForSequenceClassification.from_config(config))


def test_padding_is_a_token_that_ends_no_text():
    classifier = reward_model("llama").causal_lm
    tokenizer = data_helpers.tokenizer()
    assert tokenizer.pad_token is None
    assert settle_padding(classifier, tokenizer) is None
    assert (tokenizer.pad_token, classifier.config.pad_token_id) == (data_helpers.BOS, 0)
    tokenizer.bos_token = tokenizer.pad_token = data_helpers.EOS  # as GPT-2's
    assert "one at a time" in settle_padding(classifier, tokenizer)
    assert classifier.config.pad_token_id is None


ROWS = [{"prompt": f"q{i}:", "chosen": " good", "rejected": " bad", "gap": i / 4} for i in range(4)]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_DS_CACHE", str(tmp_path / "cache"))

    def make(rows, margin_column="gap", **options):
        source = data_helpers.write_lines(tmp_path / "rows.jsonl", rows)
        keys = {"options": data_helpers.options(**options), "tokenizer": data_helpers.tokenizer()}
        return prepare(str(source), margin_column=margin_column, **keys)

    return make


def test_margins_come_with_the_pairs_only_if_asked_for(prepared):
    assert prepared(ROWS).margins.tolist() == [0, 0.25, 0.5, 0.75]
    assert prepared(ROWS, None).margins is None
    with pytest.raises(DataError, match="rows.jsonl:1: lacks 'gapp'; it has"):
        prepared(ROWS, "gapp")


@pytest.mark.parametrize(
    ("value", "rule"),
    [(-0.5, "must be between 0 and 1e"), ("much", "must be a number"), (True, "must be a number"), (None, "is null")],
)
def test_a_wrong_margin_names_its_row(prepared, value, rule):
    rows = [*ROWS, ROWS[0] | {"prompt": "q9:", "gap": value}]
    with pytest.raises(DataError, match=f"rows.jsonl:5: .*{rule}"):
        prepared(rows)
    kept = prepared(rows, on_bad_row="skip")
    assert len(kept) == len(kept.margins) == 4 and kept.census["rows_dropped"] == 1


def test_calibration_rows_are_spread_over_the_data():
    assert evenly(9, 3).tolist() == [0, 4, 8]
    assert evenly(3, 1024).tolist() == evenly(3, None).tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def seen(forks, tmp_path_factory):
    """What one launch of two ranks saw of three families."""
    folder = tmp_path_factory.mktemp("reward")
    argv = [folder / "out.json", "llama", "qwen2", "gpt2"]
    codes, output = forks.run(argv, 2, folder / "logs", module="tests.workers.reward")
    assert codes == [0, 0], output[-2000:]
    return json.loads((folder / "out.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_two_ranks_give_the_full_batch_gradient(seen, family, layout):
    found = seen[f"{family} {layout}"]
    assert found["settled"] == [layout, ""]
    assert found["gradient_error"] < 1e-5, found["worst"]
    for ours, oracle in (found["loss"], found["norm"]):
        assert ours == pytest.approx(oracle, rel=1e-5)
    assert found["still"] == []


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_language_model_gets_a_new_head_equal_on_all_ranks(seen, family):
    assert seen[f"{family} new head"] == {"equal_on_all_ranks": True, "drawn": True, "changed": ["score.weight"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pairs with a margin each, and a causal language model."""
    folder = make_world(tmp_path_factory.mktemp("reward_jobs"))
    for name in ("train", "eval"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        rows = [row | {"gap": i % 4 / 2} for i, row in enumerate(rows)]
        data_helpers.write_lines(folder / f"{name}.jsonl", rows)
    return folder


def job(forks, world, out, ranks=2, **settings):
    keys = {"data__eval": world / "eval.jsonl", "train__learning_rate": 3e-3, "train__max_steps": 6} | settings
    codes, output = run(forks, world, out, ranks, command="reward", **keys)
    assert codes == [0] * ranks, output[-2000:]
    return world / out, output


@pytest.fixture(scope="module")
def trained(forks, world):
    return job(forks, world, "trained", checkpoint__every=3)[0]


@pytest.mark.distributed
def test_metrics_are_those_of_training_without_logps(trained):
    train, *_, evaluation = map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
    assert set(train) == set(
        """step loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies grad_norm learning_rate epoch
        pairs tokens tokens_per_second pairs_per_second step_seconds data_seconds host_seconds
        peak_memory_bytes""".split()
    )
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/brier", "eval_rewards/calibration_error"} < set(
        evaluation
    )
    assert train["loss"] == pytest.approx(math.log(2), abs=0.1)
    assert steps(trained)[-1]["loss"] < train["loss"]


def rewards_of(folder, pairs) -> torch.Tensor:  # [pairs, 2]
    """As a user computes them: texts with EOS, padded batches, transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [row["prompt"] + row[side] + tokenizer.eos_token for row in pairs for side in ("chosen", "rejected")]
    scores = []
    with torch.no_grad():
        for start in range(0, len(texts), 16):
            ids = tokenizer(texts[start : start + 16], padding=True, return_tensors="pt")
            scores.append(model(**ids).logits[:, 0])
    return torch.cat(scores).view(-1, 2)


@pytest.mark.distributed
def test_final_gives_the_scores_of_the_run_and_has_mean_zero(trained, world):
    config = json.loads((trained / "final" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 1
    on_eval = rewards_of(trained / "final", map(json.loads, (world / "eval.jsonl").read_text().splitlines()))
    line = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    margins = on_eval[:, 0] - on_eval[:, 1]
    assert line["eval_rewards/chosen"] == pytest.approx(on_eval[:, 0].mean().item(), abs=1e-6)
    assert line["eval_rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-6)
    assert line["eval_rewards/accuracies"] == pytest.approx((margins > 0).float().mean().item())
    assert line["eval_rewards/brier"] == pytest.approx((1 - margins.sigmoid()).square().mean().item(), abs=1e-6)
    error = calibration_gaps(margins.double()).mean(0).abs().sum().item()
    assert line["eval_rewards/calibration_error"] == pytest.approx(error, abs=1e-6)
    on_train = rewards_of(trained / "final", map(json.loads, (world / "train.jsonl").read_text().splitlines()))
    assert abs(config["reward_mean"]) > 1e-3 and on_train.std() > 1e-3
    assert abs((on_train.double() - config["reward_mean"]).mean().item()) < 1e-5
    assert "reward_mean" in (trained / "final" / "README.md").read_text()


@pytest.mark.distributed
def test_halves_on_other_ranks_and_another_calibration_set_give_the_same_model(forks, world, trained):
    """Three steps on two ranks, three more on one: the same losses. Calibration may change on resume."""
    job(forks, world, "halves", train__max_steps=3, data__eval=world / "eval.jsonl")
    folder, output = job(
        forks, world, "halves", 1, reward__calibration=world / "eval.jsonl", reward__calibration_rows=5
    )
    assert "resumed from" in output and "over 5 of 20 pairs" in output
    for ours, whole in zip(steps(folder), steps(trained), strict=True):
        assert [ours[key] for key in EXACT] == pytest.approx([whole[key] for key in EXACT], rel=1e-4, abs=1e-5)
    mean = json.loads((folder / "final" / "config.json").read_text())["reward_mean"]
    rows = [json.loads(line) for line in (world / "eval.jsonl").read_text().splitlines()]
    assert mean == pytest.approx(rewards_of(folder / "final", [rows[i] for i in evenly(20, 5)]).mean().item(), abs=1e-6)
    assert "calibration" in json.loads((folder / "data_census.json").read_text())


@pytest.mark.distributed
def test_a_finished_run_resumed_is_bit_equal_and_a_checkpoint_exports_to_final(forks, world, trained, tmp_path):
    before = weights(trained)
    job(forks, world, "trained", checkpoint__every=3)
    assert weights(trained) == before
    codes, output = forks.run(["export", trained, "--to", tmp_path / "out"], 1, tmp_path / "logs")
    assert codes == [0] and "reward_mean is 0" in output, output
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", trained / "final")]
    assert configs[0].pop("reward_mean") == 0.0 and configs[1].pop("reward_mean") != 0.0
    assert configs[0] == configs[1]


@pytest.mark.distributed
def test_adapters_train_beside_the_head_and_come_merged(forks, world, tmp_path):
    lora = {"model__lora__r": 4, "train__max_steps": 3, "reward__margin_column": "gap", "reward__centering": 0.01}
    folder, _ = job(forks, world, "lora", **lora)
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    on_eval = rewards_of(folder / "final", map(json.loads, (world / "eval.jsonl").read_text().splitlines()))
    assert line["eval_rewards/chosen"] == pytest.approx(on_eval[:, 0].mean().item(), abs=1e-5)
    margins = on_eval[:, 0] - on_eval[:, 1] - torch.arange(20) % 4 / 2
    loss = -torch.nn.functional.logsigmoid(margins) + 0.01 * on_eval.sum(1) ** 2
    assert line["eval_loss"] == pytest.approx(loss.mean().item(), abs=1e-5)
    final, base = (load_file(each / "model.safetensors") for each in (folder / "final", world / "model"))
    changed = {name for name in final if name not in base or not final[name].equal(base[name])}
    assert changed == {"score.weight"} | {name for name in base if "proj" in name}
    codes, output = forks.run(["export", folder, "--to", tmp_path / "out"], 1, tmp_path / "logs")
    assert codes == [0], output
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == final.keys()
    for name, value in exported.items():
        torch.testing.assert_close(value, final[name], rtol=1e-6, atol=1e-7)


@pytest.mark.distributed
def test_a_reward_model_is_trained_on(forks, world, trained):
    """From where it ended: half of chosen's and rejected's mean is the mean over all pairs, which is reward_mean."""
    keys = {"model__path": trained / "final", "train__max_steps": 1, "train__layout": "padded"}
    folder, _ = job(forks, world, "again", 1, **keys, train__global_batch_size=50, train__micro_batch_tokens=9000)
    first = steps(folder)[0]
    mean = json.loads((trained / "final" / "config.json").read_text())["reward_mean"]
    assert (first["rewards/chosen"] + first["rewards/rejected"]) / 2 == pytest.approx(mean, abs=1e-5)
