"""Jobs on groups, rankings and labelled completions, two ranks through the commands: they learn, resume bit for bit,
read one cache, and take adapters and reward models along."""

import json

import pytest

from tests.small_jobs import make_world, run, steps, train_command, weights

pytestmark = pytest.mark.distributed
JOBS = {
    "groups": ("groups.jsonl", {"loss__name": "dpo"}),
    "rankings": ("groups.jsonl", {"loss__name": "plackett_luce", "train__global_batch_size": 4}),
    "pairs gathered": ("train.jsonl", {"data__group": "prompt"}),
    "labels, kto": ("labels.jsonl", {"loss__name": "kto"}),
    "labels, bco": ("labels.jsonl", {"loss__name": "bco"}),
}
SAME = ("step", "loss", "rewards/accuracies", "grad_norm", "tokens")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """With three completions a prompt, the third the second's words in another order, and with a label each."""
    folder = make_world(tmp_path_factory.mktemp("groups"))
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    with (folder / "groups.jsonl").open("w") as groups, (folder / "labels.jsonl").open("w") as labels:
        for number, row in enumerate(rows):
            worst = " " + " ".join(reversed(row["rejected"].split()))
            ranked = {"completions": [row["rejected"], row["chosen"], worst], "scores": [2, 3, 1]}
            print(json.dumps({"prompt": row["prompt"], **ranked}), file=groups)
            label = number % 2 == 0
            completion = row["chosen" if label else "rejected"]
            print(json.dumps({"prompt": row["prompt"], "completion": completion, "label": label}), file=labels)
    return folder


def same(folder) -> list[list]:
    return [[line[key] for key in SAME] for line in steps(folder)]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_learns_and_resumes_bit_for_bit(forks, world, name):
    data, keys = JOBS[name]
    keys = {"data__train": world / data, "checkpoint__every": 3, **keys}
    codes, output = run(forks, world, f"{name} whole", train__max_steps=6, **keys)
    assert codes == [0, 0], output
    for last in (3, 6):
        codes, output = run(forks, world, f"{name} halves", train__max_steps=last, **keys)
        assert codes == [0, 0], output
    whole, halves = (world / f"{name} {part}" for part in ("whole", "halves"))
    assert "resumed from" in output and same(halves) == same(whole) and weights(halves) == weights(whole)
    assert steps(whole)[-1]["loss"] < steps(whole)[0]["loss"]


def test_one_cache_serves_groups_and_their_pairs(forks, world):
    """Filled for groups, it has what pairs of the same completions need; training on it is training on a live one."""
    keys = {"data__train": world / "groups.jsonl", "train__max_steps": 3}
    given = ["--model.path", world / "model", "--deepspeed.config", "none", "--reference.cache", world / "cached"]
    precompute = ["precompute", *map(str, given), "--data.train", str(world / "groups.jsonl")]
    environment = {"DPO_DS_CACHE": str(world / "cache")}
    codes, output = forks.run(precompute, 2, world / "precompute.logs", **environment)
    assert codes == [0, 0] and "150 completions, cache id" in output, output
    cached = {"reference__kind": "cached", "reference__cache": world / "cached"}
    for out, more in (("live", {}), ("from the cache", cached)):
        codes, output = run(forks, world, out, **keys, **more)
        assert codes == [0, 0], output
    assert same(world / "from the cache") == same(world / "live")
    codes, output = run(forks, world, "pairs from it", train__max_steps=1, **cached)
    assert codes == [0, 0] and "8 pairs recomputed, within" in output, output
    codes, output = run(forks, world, "labels from it", data__train=world / "labels.jsonl", loss__name="kto", **cached)
    assert codes[0] == 2 and "needs the reference on completions of other prompts, which no cache has" in output


def test_adapters_and_reward_models_take_groups(forks, world):
    keys = {"data__train": world / "groups.jsonl", "train__max_steps": 4, "train__learning_rate": 3e-3}
    codes, output = run(forks, world, "adapters", model__lora__r=4, reference__kind="adapter", **keys)
    assert codes == [0, 0], output
    for loss in ("bradley_terry", "plackett_luce"):
        keys |= {"data__eval": world / "groups.jsonl", "reward__loss": loss, "train__global_batch_size": 8}
        for ranks, out in ((2, f"reward by {loss}"), (1, f"{loss} alone")):
            reward = train_command(world, out, "reward", **keys)
            codes, output = forks.run(reward, ranks, world / "reward.logs", DPO_DS_CACHE=str(world / "cache"))
            assert codes == [0] * ranks and "reward_mean" in output, output
        for ours, theirs in zip(steps(world / f"reward by {loss}"), steps(world / f"{loss} alone"), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    reward = train_command(world, "margins", "reward", **keys, reward__margin_column="gap")
    codes, output = forks.run(reward, 1, world / "reward.logs", DPO_DS_CACHE=str(world / "cache"))
    assert codes == [2] and "reward.margin_column gap: reward.loss plackett_luce takes no margins" in output, output
    for name in ("adapters", "reward by bradley_terry", "reward by plackett_luce"):
        assert steps(world / name)[-1]["loss"] < steps(world / name)[0]["loss"]


@pytest.mark.parametrize(
    ("data", "keys", "line"),
    [
        ("labels.jsonl", {}, "data.train: 50 rows have a label and nothing to compare with; they are for loss.name"),
        ("groups.jsonl", {"loss__name": "kto"}, "data.train: 50 rows rank more than two completions, which does not"),
    ],
)
def test_rows_that_a_loss_cannot_use_are_one_line(forks, world, data, keys, line):
    codes, output = run(forks, world, "refused", data__train=world / data, **keys)
    assert codes[0] == 2 and line in output and output.count("dpo-ds: error:") == 1, output
