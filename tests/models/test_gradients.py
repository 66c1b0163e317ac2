"""Ranks under ZeRO-3, in both layouts and with tokens spread over two or four of them, against single-process autograd
on the whole batch: uneven pairs and a group of four.
"""

import json

import pytest

from tests.ranks import run_worker

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2")
LAUNCHES = {  # ranks: what they are asked to do, with which families
    2: (("padded", "packed"), FAMILIES),
    4: (("spread 2", "spread 4"), ("llama", "qwen3", "gemma2", "gpt2")),  # biases are gpt2's, windows gemma2's, too
}
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=LAUNCHES)
def launched(request, tmp_path_factory):
    """What one launch saw of every family."""
    folder, (layouts, families) = tmp_path_factory.mktemp("gradients"), LAUNCHES[request.param]
    run_worker("gradients.py", request.param, folder, str(folder / "out.json"), ",".join(layouts), *families)
    found = json.loads((folder / "out.json").read_text())
    assert [(*of_layout,) for of_layout in found.values()] == [families] * len(layouts)
    return found


@pytest.fixture(params=[0, 1])
def seen(request, launched):
    return list(launched.values())[request.param].items()


def test_ranks_give_the_full_batch_gradient(seen):
    for family, found in seen:
        assert found["gradient_error"] < 1e-5, (family, found["worst"])
        for (ours, oracle), tolerance in ((found["loss"], 1e-6), (found["norm"], 1e-5)):
            assert ours == pytest.approx(oracle, rel=tolerance), family


def test_every_parameter_moves(seen):
    for family, found in seen:
        assert found["parameters"] > 20 and found["still"] == [], family


def test_a_logit_scale_that_the_head_does_not_know_is_refused(seen):
    for family, found in seen:
        assert "computes its logits in a way that dpo_ds does not know" in found["refusal"], family
