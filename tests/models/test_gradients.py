"""Ranks under ZeRO-3, in both layouts and with tokens spread over two or four of them, against single-process autograd
on the whole batch: uneven pairs and a group of four.
"""

import json

import pytest

from tests.ranks import run_worker

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2")
LAUNCHES = {2: ("padded", "packed"), 4: ("spread 2", "spread 4")}  # ranks: what they are asked to do
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=LAUNCHES)
def launched(request, tmp_path_factory):
    """What one launch saw of every family."""
    folder, layouts = tmp_path_factory.mktemp("gradients"), LAUNCHES[request.param]
    run_worker("gradients.py", request.param, folder, str(folder / "out.json"), ",".join(layouts), *FAMILIES)
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(params=[0, 1])
def seen(request, launched):
    return list(launched.values())[request.param]


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_give_the_full_batch_gradient(seen, family):
    assert seen[family]["gradient_error"] < 1e-5, seen[family]["worst"]
    for (ours, oracle), tolerance in ((seen[family]["loss"], 1e-6), (seen[family]["norm"], 1e-5)):
        assert ours == pytest.approx(oracle, rel=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_moves(seen, family):
    assert seen[family]["parameters"] > 20
    assert seen[family]["still"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_logit_scale_that_the_head_does_not_know_is_refused(seen, family):
    assert "computes its logits in a way that dpo_ds does not know" in seen[family]["refusal"]
