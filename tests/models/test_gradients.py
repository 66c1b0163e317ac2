"""Two ranks under ZeRO-3, in both layouts, against single-process autograd on the whole batch."""

import json

import pytest

from tests.ranks import run_worker

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2")
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=["padded", "packed"])
def seen(request, tmp_path_factory):
    """What one launch saw of every family."""
    folder = tmp_path_factory.mktemp("gradients")
    run_worker("gradients.py", 2, folder, str(folder / "out.json"), request.param, *FAMILIES)
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_give_the_full_batch_gradient(seen, family):
    assert seen[family]["gradient_error"] < 1e-5, seen[family]["worst"]
    for ours, oracle in (seen[family]["loss"], seen[family]["norm"]):
        assert ours == pytest.approx(oracle, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_moves(seen, family):
    assert seen[family]["parameters"] > 20
    assert seen[family]["still"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_logit_scale_that_the_head_does_not_know_is_refused(seen, family):
    assert "computes its logits in a way that dpo_ds does not know" in seen[family]["refusal"]
