"""Two ranks under ZeRO-3 against single-process autograd on the whole batch."""

import json

import pytest

from tests.ranks import run_worker

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2")


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    run_worker("gradients.py", 2, folder, str(folder / "out.json"), "padded", *FAMILIES)
    return json.loads((folder / "out.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_give_the_full_batch_gradient(padded, family):
    seen = padded[family]
    assert seen["gradient_error"] < 1e-5, seen["worst"]
    assert seen["loss"][0] == pytest.approx(seen["loss"][1], rel=1e-5)
    assert seen["norm"][0] == pytest.approx(seen["norm"][1], rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_moves(padded, family):
    assert padded[family]["parameters"] > 20
    assert padded[family]["still"] == []
