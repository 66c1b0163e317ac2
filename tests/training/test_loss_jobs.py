"""Losses and references with a state of their own from step to step, through jobs that are stopped and resumed."""

import shutil

import pytest

from tests.small_jobs import exact, make_world, run, steps, weights

pytestmark = pytest.mark.distributed

STATEFUL = {
    "train__max_steps": 8, "checkpoint__every": 4, "checkpoint__keep": 99, "loss__name": "[bco_pair, aot]",
    "loss__delta_decay": 0.5, "reference__update_every": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("losses"), layers=1)


@pytest.fixture(scope="module")
def whole(forks, world):
    codes, output = run(forks, world, "whole", **STATEFUL)
    assert codes == [0, 0], output
    return world / "whole"


def stopped_at_4(whole, folder):
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("final", "tensorboard", "step-00000008"))
    (folder / "checkpoints" / "latest").write_text("step-00000004\n")


def test_resumed_the_shift_and_the_reference_go_on_where_they_were(forks, world, whole):
    stopped_at_4(whole, world / "again")
    codes, output = run(forks, world, "again", **STATEFUL)
    assert codes == [0, 0] and "resumed from" in output, output
    assert len(exact(whole)) == 8 and exact(world / "again") == exact(whole)
    assert weights(world / "again") == weights(whole)


def test_on_another_number_of_ranks_too(forks, world, whole):
    stopped_at_4(whole, world / "alone")
    codes, output = run(forks, world, "alone", ranks=1, **STATEFUL)
    assert codes == [0] and "resharding" in output, output
    for ours, theirs in zip(steps(world / "alone"), steps(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["rewards/chosen"] == pytest.approx(theirs["rewards/chosen"], rel=1e-3, abs=1e-5)


def test_the_reference_follows_every_third_step(forks, world, whole):
    """After the update at step 3 the policy has moved less far from its reference."""
    codes, output = run(forks, world, "frozen", **{**STATEFUL, "reference__update_every": 0, "train__max_steps": 4})
    assert codes == [0, 0], output
    frozen, followed = steps(world / "frozen"), steps(whole)
    assert [line["loss"] for line in frozen[:3]] == [line["loss"] for line in followed[:3]]
    assert abs(followed[3]["rewards/chosen"]) < 0.8 * abs(frozen[3]["rewards/chosen"])


def test_orpo_loads_no_reference(forks, world):
    codes, output = run(forks, world, "orpo", loss__name="orpo", train__max_steps=3, data__eval=world / "eval.jsonl")
    assert codes == [0, 0], output
    for line in steps(world / "orpo"):
        assert line["rewards/chosen"] == pytest.approx(0.1 * line["logps/chosen"], rel=1e-6)
