"""The best checkpoint is kept and exported, a run ends where evaluations get no better, and both survive resumption."""

import math
import shutil
from types import SimpleNamespace

import pytest

from dpo_ds.commands import cli
from dpo_ds.config import evaluation
from dpo_ds.errors import ConfigError
from dpo_ds.training import course as course_module
from dpo_ds.training.course import Course
from dpo_ds.training.metrics import PREFERENCE
from dpo_ds.training.objectives.labelled import LABELLED
from dpo_ds.training.objectives.reward import BradleyTerry, RewardObjective
from tests import small_jobs
from tests.small_jobs import status, weights

KEYS = {
    "train__learning_rate": 0.02, "train__eval_every": 1, "train__stop_after_worse": 3, "checkpoint__every": 2,
    "checkpoint__best": "eval_loss", "checkpoint__keep": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(course_module.collectives, "from_rank_0", lambda value: value)


@pytest.mark.parametrize(
    ("metric", "values", "kept"),
    [
        ("eval_loss", [0.7, 0.6, 0.65, 0.5, 0.5, 0.55], [1, 2, 4]),
        ("eval_rewards/accuracies", [0.5, 0.4, 0.6, 0.6, 0.6], [1, 3]),
        ("eval_loss", [math.nan, 0.6, math.nan, math.nan], [2]),
    ],
)
def test_equal_is_not_better_and_each_better_one_begins_the_count_anew(metric, values, kept):
    course, better, ends = Course(metric, keeps=True, patience=2), [], []
    for step, value in enumerate(values, 1):
        better += [step] if course.observe(step, {metric: value}, better[-1] if better else 0) else []
        ends += [step] if course.has_seen_enough else []
    assert better == kept and course.step == kept[-1]
    assert ends == [len(values)], "two after the best, not before"


def test_where_a_save_fails_the_next_better_one_is_kept_in_its_place():
    course = Course("eval_loss", keeps=True, patience=0)
    assert course.observe(1, {"eval_loss": 0.7}, 0) and course.observe(2, {"eval_loss": 0.5}, 1)
    assert course.note(2) == []
    assert "0.5 of step 2" in course.note(1)[0] and "of step 1, 0.7" in course.note(1)[0]
    assert course.observe(3, {"eval_loss": 0.6}, 1), "better than what is there, the disk was full at step 2"
    assert not course.observe(4, {"eval_loss": 0.65}, 3)
    assert course.step == 2 and course.worse == 2


def test_what_goes_by_evaluations_names_what_they_measure():
    def named(names) -> set[str]:
        return {f"eval_{name}" for name in names}

    assert set(evaluation.OF_PAIRS) == named(PREFERENCE)
    assert set(evaluation.OF_LABELS) <= named(LABELLED)
    assert set(evaluation.OF_SCORES) == named(RewardObjective(BradleyTerry(0.0)).for_evaluation().names)


@pytest.mark.parametrize(
    ("command", "keys", "said"),
    [
        ("train", ["--checkpoint.best", "eval_los"], "no metric that evaluations here could go by; did you mean"),
        ("sft", ["--checkpoint.best", "eval_rewards/margins"], "could go by"),
        ("train", ["--checkpoint.best", "eval_rewards/margins", "--loss.name", "kto"], "could go by"),
        ("train", ["--train.stop_after_worse", "2"], "need rows; give some as data.eval"),
        ("sft", ["--train.stop_after_worse", "2", "--data.eval", "e"], "give train.eval_every, which is 0"),
    ],
)
def test_what_cannot_be_followed_is_a_mistake_at_the_start(command, keys, said):
    needed = ["--model.path", "m", "--data.train", "t", "--deepspeed.config", "d", "--output_dir", "o"]
    has_rows = [] if "stop" in keys[0] else ["--data.eval", "e"]
    with pytest.raises(ConfigError) as mistake:
        cli.parse([command, *needed, *has_rows, *keys])
    assert said in str(mistake.value)


def test_a_best_checkpoint_that_is_gone_is_told_and_sought_anew(tmp_path):
    course, writer = Course("eval_loss", keeps=True, patience=0), SimpleNamespace(folder=tmp_path, best=0)
    state = {"metric": "eval_loss", "value": 0.5, "step": 4, "worse": 1, "kept": {4: 0.5}}
    (line,) = course.load_state(state, writer)
    assert "step-00000004" in line and course.kept == {} and writer.best == 0
    assert course.observe(5, {"eval_loss": 0.6}, 0), "the best of those that are there"
    assert Course("eval_loss", False, 2).load_state({"metric": "eval_logps/chosen", "value": 1.0}, writer) == []


def test_the_best_on_other_rows_does_not_count(tmp_path):
    course = Course("eval_loss", keeps=False, patience=2, rows="new")
    state = {"metric": "eval_loss", "rows": "old", "value": 0.01, "step": 4, "worse": 1}
    (line,) = course.load_state(state, SimpleNamespace(folder=tmp_path, best=0))
    assert "0.01 of step 4 does not count" in line and course.value is None and course.worse == 0
    assert course.load_state(state | {"rows": "new"}, SimpleNamespace(folder=tmp_path)) == [] and course.value == 0.01


@pytest.mark.distributed
def test_a_run_that_ends_early_exports_its_best_step_and_so_does_one_that_was_resumed(forks, tmp_path):
    world = small_jobs.make_world(tmp_path)
    keys = KEYS | {"data__eval": world / "eval.jsonl"}
    codes, output = small_jobs.run(forks, world, "whole", train__max_steps=20, **keys)
    assert codes == [0, 0], output
    told = status(world / "whole")
    best = int(told["reason"].rpartition("step ")[2])
    assert told["state"] == "done" and told["step"] == best + 3 < 20
    assert f"ends early: {told['reason']}" in output and f"final (step {best}, the best eval_loss)" in output
    checkpoints = world / "whole/checkpoints"
    steps = {int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*")}
    assert steps == {best, best + 3}, "keep 1, and the best"

    codes, output = small_jobs.run(forks, world, "resumed", train__max_steps=best + 1, **keys)
    assert codes == [0, 0] and status(world / "resumed")["reason"] == "", output
    assert weights(world / "resumed") == weights(world / "whole")
    shutil.rmtree(world / "resumed/final")
    codes, output = small_jobs.run(forks, world, "resumed", train__max_steps=20, **keys)
    assert codes == [0, 0] and status(world / "resumed") == told, output
    assert weights(world / "resumed") == weights(world / "whole")

    assert cli.main(["export", str(checkpoints / f"step-{best:08}"), "--to", str(world / "exported")]) == 0
    assert (world / "exported/model.safetensors").read_bytes() == weights(world / "whole")
