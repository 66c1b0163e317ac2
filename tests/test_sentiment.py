"""The sentiment experiment's parts; the whole of it in miniature is tests/experiments/test_sentiment_small.py."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dpo_ds.commands import cli
from launch_scripts.recipes.sentiment import corpus, report
from launch_scripts.recipes.sentiment.outcome import Outcome, Verdict, compared, mean_and_error
from launch_scripts.recipes.sentiment.plan import FULL, SCORE, SMALL, Plan, Policy
from launch_scripts.recipes.sentiment.runner import Runner, Step, StepFailed, shown


def test_reviews_are_cut_into_prompt_and_completion_and_splits_share_none(tmp_path):
    reviews = corpus.generated_reviews(200)
    corpus.write_splits(tmp_path, reviews, train_prompts=50, held_out_prompts=10)
    splits = {name: corpus.texts(tmp_path / f"{name}.jsonl") for name in ("train", "held_out")}
    assert [len(texts) for texts, _ in splits.values()] == [180, 20]
    assert sorted(sum((list(zip(*split, strict=True)) for split in splits.values()), [])) == sorted(reviews)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert all(2 <= len(row["prompt"].split()) <= 8 and row["completion"][:1] == " " for row in rows)
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "train_prompts.jsonl").read_text().splitlines()]
    known = {row["prompt"] for row in rows}
    assert len(prompts) == len(set(prompts)) == 50 and set(prompts) <= known
    held_out = [json.loads(line)["prompt"] for line in (tmp_path / "held_out_prompts.jsonl").read_text().splitlines()]
    assert len(held_out) == 10 and not set(held_out) & known


def test_movie_reviews_are_taken_where_they_lie(tmp_path, capsys):
    assert len(corpus.reviews(tmp_path)) == corpus.GENERATED
    (tmp_path / "rt-polarity.pos").write_text("a fine film \nshort one\n")
    (tmp_path / "rt-polarity.neg").write_text("a bad , bad film\n")
    assert corpus.reviews(tmp_path) == [("a fine film", True), ("a bad , bad film", False)]  # two words are all prompt


def evaluation(folder, reference, **policies):
    """evaluation.json as `dpo-ds evaluate` writes it, as far as it is read."""
    folder.mkdir()

    def row(name, kl, reward):
        samples = {"kl": {"mean": kl}, "reward": {"mean": reward}, "tokens": 26.0, "finished": 0.99}
        return {"name": name.replace("_", "-"), "samples": samples}

    rows = [row(name, *of) for name, of in policies.items()]
    content = {"policies": rows, "reference": row("reference", 0.0, reference)}
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


def test_dpo_is_read_off_at_the_kl_of_the_others(tmp_path):
    first = evaluation(tmp_path / "0", 0.5, dpo_1=(2.0, 0.7), dpo_2=(6.0, 0.9), preferred_3=(1.0, 0.55))
    second = evaluation(tmp_path / "1", 0.4, dpo_1=(2.0, 0.8), dpo_2=(4.0, 1.0), preferred_3=(3.0, 0.6))
    policies = [Policy("dpo", 1e-3, beta=2.0), Policy("dpo", 1e-3, beta=1.0), Policy("preferred", 3.0)]
    outcome = Outcome.read([first, second], policies)
    (at,) = outcome.at_equal_kl()
    assert np.allclose(at.there, [0.6, 0.9])  # half way from (0, 0.5) to (2, 0.7); half way from (2, 0.8) to (4, 1)
    assert np.allclose(at.difference, [0.05, 0.3])
    mean, error = mean_and_error(at.difference)
    assert mean == pytest.approx(0.175) and error == pytest.approx(0.125)  # |0.3 - 0.05| / 2
    said = report.markdown(outcome)
    assert "| SFT on preferred, learning rate 3 | 2.00 ± 1.00 | 0.575 ± 0.025 | 26.0 | 99% |" in said
    assert "| SFT on preferred, learning rate 3 | 2.00 ± 1.00 | 0.575 ± 0.025 | 0.750 ± 0.150 | 0.175 ± 0.125 |" in said
    assert "- not told apart from DPO: SFT on preferred, learning rate 3 (0.575 against 0.750 at 2.00 nats)" in said
    report.write(outcome, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["at_equal_kl"][0]["kl"] == [1.0, 3.0]
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"


def test_beyond_the_last_point_of_dpo_its_own_reward_is_told_and_nothing_compared(tmp_path):
    folder = evaluation(tmp_path / "0", 0.5, dpo_1=(2.0, 0.7), preferred_3=(5.0, 0.6))
    outcome = Outcome.read([folder], [Policy("dpo", 1e-3, beta=1.0), Policy("preferred", 3.0)])
    assert outcome.at_equal_kl()[0].there == [0.7]
    assert "| 5.00 | 0.600 | the last point has 0.700 |  |" in report.markdown(outcome)
    assert "- at more KL than any point of DPO" in report.markdown(outcome)


def test_which_is_higher_is_read_from_the_seeds():
    """Student's t of three seeds is 4.30: differences 1, 2, 3 have a mean of 2 and an error of 0.577, 4.3 times which
    is 2.48; 2, 2, 3 have 2.33 and 0.333, which makes 1.43.
    """
    found = {(1, 2, 3): Verdict.NOT_APART, (2, 2, 3): Verdict.HIGHER, (-2, -2, -3): Verdict.LOWER, (1,): Verdict.HIGHER}
    for differences, verdict in found.items():
        assert compared(differences, [0] * len(differences)) is verdict


def test_a_learned_reward_is_set_against_the_ground_truth(tmp_path):
    """PPO of it has 0.8 at 2 nats, where the line from (0, ½) to (4, 0.7) has 0.6; DPO's, to (2, 0.9), has 0.9. No RLOO
    was trained with the ground truth.
    """
    rows = {"dpo_1": (2.0, 0.9), "ppo_1": (4.0, 0.7), "ppo_1_learned": (2.0, 0.8), "rloo_1_learned": (1.0, 0.8)}
    policies = [Policy("dpo", 1e-3, 1.0), Policy("ppo", 1e-3, 1.0)]
    policies += [Policy(loss, 1e-3, 1.0, learned=True) for loss in ("ppo", "rloo")]
    outcome = Outcome.read([evaluation(tmp_path / "0", 0.5, **rows)], policies)
    said = report.markdown(outcome)
    learned = "PPO of a learned reward, β 1"
    assert f"- higher than PPO of the ground truth: {learned} (0.800 against 0.600 at 2.00 nats)" in said
    assert f"- lower than DPO: {learned} (0.800 against 0.900 at 2.00 nats)" in said
    report.write(outcome, tmp_path)
    assert (tmp_path / "report.md").read_text() == f"![reward against KL](frontier.png)\n\n{said}\n"
    assert "as one seed has no interval" in said and "RLOO of the ground truth" not in said


@pytest.mark.parametrize("size", [FULL, SMALL])
def test_a_step_comes_behind_what_it_needs_and_every_policy_is_evaluated(tmp_path, size):
    steps = list(Plan(tmp_path, size, range(2)).steps())
    for place, step in enumerate(steps):
        assert set(step.needs) <= {before.name for before in steps[:place]}
    assert len({step.name for step in steps}) == len(steps)
    assert set(steps[-1].needs) == {f"seed-1/{policy.name}" for policy in size.policies}


def test_a_learned_reward_is_learned_from_the_pairs_before_it_is_asked(tmp_path):
    size = replace(SMALL, policies=[Policy("ppo", 1e-3, beta=0.5, learned=True), Policy("rloo", 1e-3, beta=0.1)])
    steps = {step.name: step for step in Plan(tmp_path, size, [3]).steps()}
    assert steps["seed-3/reward"].needs == ("seed-3/sample",)
    learned, true = steps["seed-3/ppo-0.5-learned"], steps["seed-3/rloo-0.1"]
    assert learned.needs == ("seed-3/reward",) and true.needs == ("reference",)
    for step, score in ((learned, f"{tmp_path}/seed-3/reward/final"), (true, SCORE)):
        command, run, _, _ = cli.parse(step.argv)
        assert (command, run.rl.score, run.rl.prompts) == ("rl", score, f"{tmp_path}/data/train_prompts.jsonl")
        assert run.rl.center_scores == (step is learned)
        assert run.train.max_steps == 24, "the miniature's"


def test_a_step_that_is_done_is_not_run_again_unless_something_before_it_changed(tmp_path, capsys):
    def run(content, argv=("-V",)):
        (read := tmp_path / "read").write_text(content)
        one = Step("one", ("-V",), tmp_path / "one", reads=(read,))
        Runner(tmp_path / "steps", 2).run([one, Step("two", argv, tmp_path / "two", ("one",))])
        return capsys.readouterr().out

    assert run("a").count("-m dpo_ds -V") == 2
    assert run("a").count("-m dpo_ds") == 0
    again = run("a", argv=("--version",))
    assert "one: done before" in again and again.count("-m dpo_ds") == 1
    assert run("b").count("-m dpo_ds -V") == 2


def test_a_step_that_fails_ends_the_rest_and_names_its_log(tmp_path):
    steps = [Step("bad", ("nonsense",), tmp_path / "bad"), Step("after", ("--version",), tmp_path / "after", ("bad",))]
    with pytest.raises(StepFailed, match="bad ended with exit code 2: dpo-ds: error: unknown command 'nonsense'"):
        Runner(tmp_path / "steps", 1).run(steps)
    assert not (tmp_path / "steps" / "after.log").exists()


def test_commands_are_shown_as_a_shell_takes_them():
    assert shown(["dpo-ds", "sft", "--a.b", "[1, 2]", "--c", "x"]) == "dpo-ds sft \\\n    --a.b '[1, 2]' \\\n    --c x"
