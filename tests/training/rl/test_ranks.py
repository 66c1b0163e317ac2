"""An update by every algorithm on two ranks under ZeRO-3, one micro-batch empty, against autograd in one process."""

import json

import pytest

pytestmark = pytest.mark.distributed
NAMES = ("reinforce", "rloo", "grpo", "ppo", "online_dpo")


@pytest.fixture(scope="module")
def seen(forks, tmp_path_factory):
    """What one launch saw of all algorithms."""
    folder = tmp_path_factory.mktemp("rl")
    codes, output = forks.run([folder / "out.json"], 2, folder, module="tests.workers.rl")
    assert codes == [0, 0], output
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_all_completions_at_once(seen, name):
    found = seen[name]
    assert found["means"]["loss"] == pytest.approx(found["loss"], rel=1e-5, abs=1e-7)
    assert found["error"] < 1e-5
    if name != "online_dpo":
        assert 0 < found["means"]["clip_fraction"] < 1, "the test must see clipped and free ones"


def test_so_is_the_critics(seen):
    found = seen["ppo"]
    assert found["means"]["value_loss"] == pytest.approx(found["value_loss"], rel=1e-5)
    assert found["critic_error"] < 1e-5
    assert found["told"]["explained_variance"] < 1


def test_the_first_ratio_is_1_to_the_bit_and_the_kl_0(seen):
    """With and without gradients the policy gives the same log-probs, and the reference here is the policy."""
    assert seen["first"] == {"ratio is 1": True, "kl": 0.0} and seen["layout"] == "packed"
