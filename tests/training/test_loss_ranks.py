"""Every loss on two ranks under ZeRO-3, uneven micro-batches with an empty one, against autograd in one process; each
rank with micro-batches of its own, and both with the tokens of each spread over them.
"""

import json

import pytest
import torch

from dpo_ds.losses import KTO, LOSSES
from dpo_ds.training.objectives.labelled import LabelledObjective
from tests.ranks import run_worker

GROUP_CASES = ("groups", "groups with a discount and a likelihood", "groups weighted", "rankings")
PARTS = ("sum", "ld", "sft", "wpo", "forward_kl", "js", "alpha", "all")
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=[1, 2], ids=["apart", "spread"])
def seen(request, tmp_path_factory):
    """What one launch saw of every loss."""
    folder = tmp_path_factory.mktemp("losses")
    run_worker("losses.py", 2, folder, str(folder / "out.json"), str(request.param))
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("case", [*(name for name, loss in LOSSES.items() if not loss.of_labels), *PARTS])
def test_the_gradient_is_that_of_all_pairs_at_once(seen, case):
    loss, expected = seen[case]["loss"]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert seen[case]["gradient_error"] < 1e-5


def test_a_reference_that_follows_is_the_mixture_of_both_models(seen):
    assert seen["follow"]["weights"] < 1e-7
    assert seen["follow"]["logps"] < 1e-4
    assert seen["follow"]["moved"] > 1e-2, "the forward still used the old weights"


@pytest.mark.parametrize("case", GROUP_CASES)
def test_a_group_is_its_comparisons_and_a_ranking_the_papers_formula(seen, case):
    """Groups against a row a comparison, or against one process."""
    found = seen[case]
    assert found["gradient_error"] < 1e-5
    means, expected = found["means"]
    assert means[: len(expected)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", ["labels, kto", "labels, bco"])
def test_labelled_completions_are_those_of_one_process(seen, case):
    """KTO's baseline is the mean over mismatched completions of all ranks."""
    found = seen[case]
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-5) and found["gradient_error"] < 1e-5
    if case == "labels, kto":
        assert found["baseline"] == pytest.approx(found["expected_baseline"], abs=1e-6)
        assert len(set(found["kl"])) == 7


def test_a_completion_on_the_baseline_is_on_neither_side():
    """Desirable ones above it and the others below it are right: 1 of 2 and 1 of 3; the rest is on it or across."""
    objective = LabelledObjective(KTO(beta=0.1), reference=None, baseline=0.5)
    rewards, labels = torch.tensor([0.6, 0.5, 0.5, 0.4, 0.6]), torch.tensor([True, True, False, False, False])
    sums = objective._sums(torch.zeros(5), rewards, torch.zeros(5), labels)
    assert dict(zip(objective.names, sums.tolist(), strict=True))["rewards/accuracies"] == 2
